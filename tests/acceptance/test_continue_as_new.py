"""An endless workflow begins anew, pass after pass, whatever is killed meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from durable.testing.crashes import VARIABLE, CrashBoard, CrashPoint
from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import WorkerNode, wait_for

ROW = "SELECT row_to_json(r) FROM durable.workflow_runs r WHERE id = %s"
STEPS = "SELECT count(*) FROM durable.step_attempts WHERE workflow_run_id = %s"
CHILD = "SELECT child_pid FROM durable.workflow_runs WHERE id = %s AND status = 'running'"


@pytest.fixture
def app_name() -> str:
    return "tests.apps.changing"


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, Any]:
    return {
        "durable_database_url": database_url,
        "trace": str(trace.path),
        "durable_lease": 2,
        "durable_heartbeat_interval": 0.5,
        "durable_ring_interval": 1,
        "durable_poll_interval": 0.2,
        "durable_max_recoveries": 50,
    }


def numbers(trace: Trace) -> list[int]:
    return [int(line.split()[1]) for line in trace.lines() if line.startswith("number")]


def test_two_hundred_passes_survive_kills(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    worker, other = start_worker(), start_worker()
    follower = app_module.follower.s()
    run = app_module.counting.apply_async((0, 200), link=follower)

    killed = 0
    for at in (20, 60, 100):
        wait_for(lambda at=at: len(numbers(trace)) > at, timeout=30, what=f"{at} passes")
        pid = wait_for(lambda: query(CHILD, run.id), what="a child to have the run")
        for node in (worker, other):
            if pid in node.children():
                node.kill_child(pid)
                killed += 1
    assert killed == 3
    wait_for(lambda: len(numbers(trace)) > 140, timeout=30, what="140 passes")
    other.kill()

    number, passes, version, _ = run.get(timeout=60)
    assert (number, passes, version) == (200, 199, "1")
    done = numbers(trace)
    assert sorted(set(done)) == list(range(1, 201)), "no pass is lost"
    assert done == sorted(done), "and none is begun again"
    assert len(done) <= 200 + 4, "a step in flight runs again, no other"
    keys = {line.split()[2] for line in trace.lines() if line.startswith("number")}
    assert len(keys) == 200, "an outside call of another pass is another call"
    row = query(ROW, run.id)
    assert (row["generation"], row["passes"]) == (199, 199)
    assert query(STEPS, run.id) == 1
    wait_for(lambda: any("follower" in line for line in trace.lines()), what="the callback")
    assert sum("follower" in line for line in trace.lines()) == 1


@pytest.mark.parametrize("moment", ["before", "refused", "after", "lost"])
def test_a_crash_at_the_statement_neither_loses_nor_doubles_a_pass(
    app_module: ModuleType,
    start_worker: StartWorker,
    query: Query,
    trace: Trace,
    tmp_path: Path,
    moment: str,
) -> None:
    board = CrashBoard(tmp_path / "crashes")
    start_worker(env={VARIABLE: str(board.directory)})
    run_id = "6d1b1c86-4a8f-4a5c-8f0e-0d6b8f5a7a11"
    board.arm(run_id, CrashPoint("child", "sql passes._BEGIN_ANEW", moment, 2))
    run = app_module.counting.apply_async((0, 4), task_id=run_id)
    number, passes, _, _ = run.get(timeout=30)
    assert (number, passes) == (4, 3)
    assert board.fired(run_id)
    assert numbers(trace) == [1, 2, 3, 4], "the step of the pass that was cut off had its result"


def test_events_wait_for_the_next_pass_and_the_parent_for_the_last_one(
    app_module: ModuleType, celery_worker: WorkerNode, query: Query
) -> None:
    run = app_module.mailbox.delay([], of=3)
    for letter in "abc":
        run.send_event("mail", letter)
    parent = app_module.parent.delay(3)
    assert run.get(timeout=20) == ["a", "b", "c"]
    assert run.run().passes == 2
    assert parent.get(timeout=20) == [3, 2]
    assert [event.payload for event in run.events()] == ['"c"'], "what a pass took goes with it"


def test_a_cancel_between_two_passes_counts(
    app_module: ModuleType, celery_worker: WorkerNode, query: Query, trace: Trace
) -> None:
    run = app_module.counting.delay(0, 100_000)
    wait_for(lambda: len(numbers(trace)) > 5, what="some passes")
    assert run.cancel("enough")
    wait_for(lambda: query(ROW, run.id)["status"] == "canceled", what="its end")
    assert query(ROW, run.id)["reason"] == "enough"
