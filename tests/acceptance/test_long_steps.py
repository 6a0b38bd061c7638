"""Long steps report and go on where they were; what may happen once never happens twice."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from durable.testing.crashes import VARIABLE, CrashBoard, CrashPoint
from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import WorkerNode, every_broker, wait_for

CHILD = "SELECT child_pid FROM durable.workflow_runs WHERE id = %s AND status = 'running'"
ITEM = "SELECT id::text FROM durable.workflow_runs WHERE parent_run_id = %s"
RUN_ID = "2c9d8a1e-51f0-4a43-9d1b-6f8e0f7b3c55"


@pytest.fixture
def app_name() -> str:
    return "tests.apps.long_steps"


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


@pytest.mark.parametrize("task", ["loads", "aloads"])
def test_a_killed_step_goes_on_where_it_reported_to_be(
    app_module: ModuleType,
    celery_worker: WorkerNode,
    query: Query,
    trace: Trace,
    tmp_path: Path,
    task: str,
) -> None:
    go = tmp_path / "go"
    run = getattr(app_module, task).delay(5, 3, str(go))
    wait_for(lambda: [step.output for step in run.steps()] == ["4"], what="the fourth row")
    [step] = run.steps()
    assert (step.status, step.attempt) == ("running", 1)
    celery_worker.kill_child(query(CHILD, run.id))
    go.touch()
    assert run.get(timeout=10) == 5
    assert trace.lines() == ["row 0 1", "row 1 1", "row 2 1", "row 3 1", "row 4 1"]
    assert [(step.status, step.attempt) for step in run.steps()] == [("succeeded", 1)]


def test_so_does_an_item_of_a_fan_out(
    app_module: ModuleType, celery_worker: WorkerNode, query: Query, trace: Trace, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = app_module.loads_many.delay(3, str(go))
    wait_for(lambda: "row 1 1" in trace.lines(), what="the second row")
    item = app_module.app.AsyncResult(query(ITEM, run.id))
    wait_for(lambda: [step.output for step in item.steps()] == ["2"], what="its report")
    celery_worker.kill_child(query(CHILD, item.id))
    go.touch()
    assert run.get(timeout=10) == [3]
    assert trace.lines() == ["row 0 1", "row 1 1", "row 2 1"]
    assert [step.status for step in item.steps()] == ["succeeded"]


@pytest.mark.parametrize("task", ["loads", "aloads"])
def test_a_heartbeat_is_where_a_step_is_paused_and_canceled(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, task: str
) -> None:
    run = getattr(app_module, task).delay(3, 1, "")
    wait_for(lambda: "row 1 1" in trace.lines(), what="the second row")
    run.pause()
    wait_for(lambda: run.run().status == "paused", what="the run to pause")
    wait_for(lambda: [step.output for step in run.steps()] == ["2"], what="its report")
    run.resume()
    assert run.get(timeout=10) == 3
    assert trace.lines() == ["row 0 1", "row 1 1", "row 2 1"]

    other = getattr(app_module, task).delay(30, 20, "")
    wait_for(lambda: "row 20 1" in trace.lines(), what="the row that lasts")
    other.cancel()
    wait_for(lambda: other.run().status == "canceled", what="the run to be canceled")
    assert [step.status for step in other.steps()] == ["running"]


def test_a_step_of_a_run_that_was_taken_over_stops_at_its_heartbeat(
    app_module: ModuleType, start_worker: StartWorker, trace: Trace, tmp_path: Path
) -> None:
    frozen = start_worker()
    run = app_module.loads.delay(6, 1, "")
    wait_for(lambda: "row 1 1" in trace.lines(), what="the second row")
    frozen.sigstop()
    start_worker()
    assert run.get(timeout=30) == 6
    done = trace.lines()
    assert done == [f"row {number} 1" for number in range(6)], "it goes on from the report"
    frozen.sigcont()
    wait_for(lambda: "goes on elsewhere: fenced" in frozen.logs(), what="the other to be told")
    assert trace.lines() == done


# --- at most once


@every_broker
def test_a_step_that_was_killed_in_the_middle_waits_for_a_word(
    app_module: ModuleType, celery_worker: WorkerNode, query: Query, trace: Trace, tmp_path: Path
) -> None:
    run = app_module.pays.delay(5, str(tmp_path / "never"))
    wait_for(lambda: "charge 5" in trace.lines(), what="the step to run")
    assert [step.status for step in run.steps()] == ["running"]
    for _ in range(2):
        if (child := query(CHILD, run.id)) is not None:
            celery_worker.kill_child(child)
        wait_for(lambda: run.run().status == "paused", timeout=20, what="the run to pause")
        reason = run.run().reason
        assert "long_steps.charge" in reason
        assert "result.settle(" in reason
        assert [step.status for step in run.steps()] == ["running"]
        run.resume()
    wait_for(lambda: run.run().status == "paused", timeout=20, what="it to pause once more")
    run.settle("tests.apps.long_steps.charge", 5)
    run.resume()
    assert run.get(timeout=10) == 6
    assert trace.lines() == ["charge 5"]


@pytest.mark.parametrize("task", ["pays", "apays", "pays_many"])
def test_it_runs_again_if_somebody_says_so(
    app_module: ModuleType,
    celery_worker: WorkerNode,
    query: Query,
    trace: Trace,
    tmp_path: Path,
    task: str,
) -> None:
    go = tmp_path / "go"
    run = getattr(app_module, task).delay(5, str(go))
    wait_for(lambda: "charge 5" in trace.lines(), what="the step to run")
    charging = run
    if task == "pays_many":
        charging = app_module.app.AsyncResult(query(ITEM, run.id))
    celery_worker.kill_child(query(CHILD, charging.id))
    wait_for(lambda: charging.run().status == "paused", what="the run to pause")
    go.touch()
    [step] = charging.steps()
    charging.restart(from_step=step.name)
    assert run.get(timeout=10) == ([5] if task == "pays_many" else 6)
    assert trace.lines() == ["charge 5", "charge 5"]


@pytest.mark.parametrize("moment", ["before", "refused", "after", "lost"])
def test_a_crash_at_the_intent_never_runs_it_twice(
    app_module: ModuleType,
    start_worker: StartWorker,
    trace: Trace,
    tmp_path: Path,
    moment: str,
) -> None:
    board = CrashBoard(tmp_path / "crashes")
    start_worker(env={VARIABLE: str(board.directory)})
    board.arm(RUN_ID, CrashPoint("child", "sql long_steps._OPEN", moment, 1))
    run = app_module.pays.apply_async((5,), task_id=RUN_ID)
    if moment == "after":  # nobody knows whether the body has begun
        wait_for(lambda: run.run().status == "paused", what="the run to pause")
        assert trace.lines() == []
    else:
        assert run.get(timeout=20) == 6
        assert trace.lines() == ["charge 5"]
    assert board.fired(RUN_ID)


@pytest.mark.parametrize("moment", ["before", "after", "lost"])
def test_nor_does_one_at_its_record(
    app_module: ModuleType,
    start_worker: StartWorker,
    trace: Trace,
    tmp_path: Path,
    moment: str,
) -> None:
    board = CrashBoard(tmp_path / "crashes")
    start_worker(env={VARIABLE: str(board.directory)})
    board.arm(RUN_ID, CrashPoint("child", "sql steps._END", moment, 1))
    run = app_module.pays.apply_async((5,), task_id=RUN_ID)
    if moment == "before":
        wait_for(lambda: run.run().status == "paused", what="the run to pause")
    else:
        assert run.get(timeout=20) == 6
    assert board.fired(RUN_ID)
    assert trace.lines() == ["charge 5"]
