"""What a failed or canceled run has done is undone, whatever is killed meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from durable import PermanentError
from durable.errors import NotAllowed
from durable.testing.crashes import VARIABLE, CrashBoard, CrashPoint
from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import WorkerNode, every_broker, wait_for

CHILD = "SELECT child_pid FROM durable.workflow_runs WHERE id = %s AND status = 'running'"
RUN_ID = "7e2f4b0c-93a5-4c1e-8f0a-2f6f0b7d1c11"

DONE = ["reserve hotel", "reserve flaky", "reserve car"]
UNDONE = ["tell car", "release flaky 1", "release flaky 2", "release hotel 1"]


@pytest.fixture
def app_name() -> str:
    return "tests.apps.compensation"


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, Any]:
    return {
        "durable_database_url": database_url,
        "trace": str(trace.path),
        "durable_lease": 2,
        "durable_heartbeat_interval": 0.5,
        "durable_ring_interval": 1,
        "durable_poll_interval": 0.2,
    }


def ends(run: Any, status: str) -> None:
    wait_for(lambda: run.run().status == status, timeout=20, what=f"the run to be {status}")


def test_a_failed_run_is_undone_and_a_good_one_is_not(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace
) -> None:
    assert app_module.trip.delay("").get(timeout=10) == "booked"
    assert trace.lines() == DONE
    trace.path.unlink()
    run = app_module.trip.delay("fail")
    with pytest.raises(PermanentError, match="the card is gone"):
        run.get(timeout=10)
    assert trace.lines() == [*DONE, "refuse", *UNDONE]
    assert (run.run().status, run.run().reason) == ("failed", None)
    assert [(step.branch, step.ordinal) for step in run.steps() if step.branch][-1] == ("undo", 3)


@every_broker
def test_a_child_that_dies_while_it_undoes_costs_only_the_undo_step_in_flight(
    app_module: ModuleType, celery_worker: WorkerNode, query: Query, trace: Trace, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = app_module.trip.delay("raise", undo_go=str(go))
    wait_for(lambda: "release flaky 1" in trace.lines(), what="the undo")
    celery_worker.kill_child(query(CHILD, run.id))
    wait_for(lambda: trace.count()["release flaky 1"] == 2, what="the undo step to run again")
    go.touch()
    with pytest.raises(ValueError, match="no step"):
        run.get(timeout=10)
    ran = [line for line in trace.lines() if line != "raise"]
    assert ran == [*DONE, "tell car", "release flaky 1", *UNDONE[1:]]
    assert run.run().status == "failed"


def test_a_parked_run_is_canceled_by_a_worker_that_undoes(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace
) -> None:
    run = app_module.trip.delay("sleep")
    wait_for(lambda: run.run().status == "sleeping", what="the run to sleep")
    assert run.cancel("no holidays")
    ends(run, "canceled")
    assert run.run().reason == "no holidays"
    assert trace.lines() == [*DONE, *UNDONE]


def test_a_cancel_waits_for_a_worker_and_lasts(
    app_module: ModuleType, start_worker: StartWorker, trace: Trace
) -> None:
    worker = start_worker()
    run = app_module.trip.delay("sleep")
    wait_for(lambda: run.run().status == "sleeping", what="the run to sleep")
    worker.stop()
    assert run.cancel("no holidays")
    assert run.run().status == "pending"
    assert not run.cancel()
    with pytest.raises(NotAllowed, match="being canceled"):
        run.pause()
    start_worker()
    ends(run, "canceled")
    assert run.run().reason == "no holidays"
    assert trace.lines() == [*DONE, *UNDONE]


def test_a_cancel_while_a_step_runs_undoes_that_step_too(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    go, other = tmp_path / "go", tmp_path / "other"
    run, first = app_module.trip.delay("hold", str(go)), app_module.once.delay(str(other))
    wait_for(lambda: len(trace.lines()) == 4, what="both runs to hold")
    for each in (run, first):
        each.cancel("no holidays")
    go.touch()
    ends(run, "canceled")
    assert [line for line in trace.lines() if not line.startswith("reserve")] == UNDONE
    other.touch()
    ends(first, "canceled")
    assert trace.lines()[-1] == "release hotel 1"
    assert (run.run().reason, first.run().reason) == ("no holidays", "no holidays")


@pytest.mark.parametrize("way", ["settle", "restart"])
@pytest.mark.parametrize("how", ["fail", "sleep"])
def test_what_cannot_be_undone_waits_for_a_person_and_the_run_still_ends_as_it_was_to(
    app_module: ModuleType,
    celery_worker: WorkerNode,
    trace: Trace,
    tmp_path: Path,
    way: str,
    how: str,
) -> None:
    repaired = tmp_path / "repaired"
    run = app_module.trip.delay(how, repaired=str(repaired))
    if how == "sleep":
        wait_for(lambda: run.run().status == "sleeping", what="the run to sleep")
        run.cancel("no holidays")
    ends(run, "paused")
    reason = run.run().reason
    name = "tests.apps.compensation.release"
    assert f"undo step {name!r}" in reason
    assert "flaky is stuck" in reason
    run.resume()
    wait_for(lambda: run.run().attempt > 1 and run.run().status == "paused", what="it to pause")
    if way == "settle":
        run.settle(name, None, ordinal=2)
        run.resume()
    else:
        repaired.touch()
        run.restart()
    ends(run, "canceled" if how == "sleep" else "failed")
    assert run.run().reason == ("no holidays" if how == "sleep" else None)
    released = [line for line in trace.lines() if line.startswith(("release", "tell"))]
    more = ["release flaky 1", "release flaky 2"] if way == "restart" else []
    assert released == ["tell car", "release flaky 1", *more, "release hotel 1"]


def test_a_run_is_paused_while_it_undoes_and_goes_on(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = app_module.trip.delay("fail", undo_go=str(go))
    wait_for(lambda: "release flaky 1" in trace.lines(), what="the undo")
    run.pause()
    go.touch()
    ends(run, "paused")
    assert run.resume()
    ends(run, "failed")
    assert trace.lines() == [*DONE, "refuse", *UNDONE]


def test_a_cancel_does_not_keep_a_run_from_undoing(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = app_module.trip.delay("fail", undo_go=str(go))
    wait_for(lambda: "release flaky 1" in trace.lines(), what="the undo")
    assert run.cancel()
    go.touch()
    ends(run, "failed")
    assert trace.lines() == [*DONE, "refuse", *UNDONE]


@pytest.mark.parametrize(
    "operation",
    ["sql compensation._MARK", "sql compensation._DECIDE", "sql exec_prepared durable_finish"],
)
@pytest.mark.parametrize("moment", ["before", "after", "lost"])
def test_a_crash_at_a_statement_neither_loses_nor_doubles_an_undo(
    app_module: ModuleType,
    start_worker: StartWorker,
    trace: Trace,
    tmp_path: Path,
    operation: str,
    moment: str,
) -> None:
    board = CrashBoard(tmp_path / "crashes")
    start_worker(env={VARIABLE: str(board.directory)})
    board.arm(RUN_ID, CrashPoint("child", operation, moment, 1))
    run = app_module.trip.apply_async(("fail",), task_id=RUN_ID)
    with pytest.raises(PermanentError, match="the card is gone"):
        run.get(timeout=20)
    assert board.fired(RUN_ID)
    assert trace.lines() == [*DONE, "refuse", *UNDONE]


def test_a_child_that_dies_on_the_way_to_undo_does_not_end_the_cancel(
    app_module: ModuleType, start_worker: StartWorker, trace: Trace, tmp_path: Path
) -> None:
    board = CrashBoard(tmp_path / "crashes")
    start_worker(env={VARIABLE: str(board.directory)})
    board.arm(RUN_ID, CrashPoint("child", "sql compensation._DECIDE", "before", 1))
    run = app_module.trip.apply_async(("sleep",), task_id=RUN_ID)
    wait_for(lambda: run.run().status == "sleeping", what="the run to sleep")
    run.cancel("no holidays")
    ends(run, "canceled")
    assert board.fired(RUN_ID)
    assert run.run().reason == "no holidays"
    assert trace.lines() == [*DONE, *UNDONE]


@pytest.mark.parametrize("how", ["fail", "cancel", "hold"])
def test_branches_are_undone_the_newest_first(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path, how: str
) -> None:
    go = tmp_path / "go"
    run = app_module.atrip.delay(how, str(go) if how == "hold" else "")
    if how == "hold":
        wait_for(lambda: len(trace.lines()) == 3, what="both branches to hold")
        run.cancel("no holidays")
        go.touch()
    if how == "cancel":
        wait_for(lambda: run.run().status == "sleeping", what="the run to sleep")
        run.cancel("no holidays")
    ends(run, "failed" if how == "fail" else "canceled")
    done = [line.removeprefix("reserve ") for line in trace.lines() if line.startswith("reserve")]
    undone = [line.split()[1:-1] for line in trace.lines() if line.startswith("release")]
    assert sorted(map(" ".join, undone)) == sorted(done)
    assert undone[-1] == ["hotel"]


def test_a_run_that_was_undone_is_restarted_from_its_beginning(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace
) -> None:
    run = app_module.trip.delay("fail")
    ends(run, "failed")
    run.restart()
    wait_for(lambda: run.run().attempt > 3 and run.run().status == "failed", what="the same end")
    assert trace.lines() == [*DONE, "refuse", *UNDONE], "all of it is recorded"
    trace.path.unlink()
    run.restart(from_beginning=True)
    with pytest.raises(PermanentError, match="the card is gone"):
        run.get(timeout=10)
    assert trace.lines() == [*DONE, "refuse", *UNDONE]
