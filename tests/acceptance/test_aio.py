"""``async def`` workflows in real workers: branches, kills, waits."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import WorkerNode, wait_for

CHILD = "SELECT child_pid FROM durable.workflow_runs WHERE id = %s AND status = 'running'"
RECORDED = """
SELECT coalesce(json_agg(branch || '.' || ordinal), '[]') FROM durable.step_attempts
 WHERE workflow_run_id = %s AND status = 'succeeded'
"""
STATUS = "SELECT status FROM durable.workflow_runs WHERE id = %s"

two_pools = pytest.mark.parametrize("worker_pool", ["prefork", "threads"], indirect=True)


@pytest.fixture
def app_name() -> str:
    return "tests.apps.branches"


@pytest.fixture
def app_settings(app_settings: dict[str, Any]) -> dict[str, Any]:
    return {**app_settings, "durable_lease": "3s"}


@two_pools
def test_a_kill_in_the_middle_of_branches_repeats_no_committed_step_and_swaps_no_result(
    app_module: ModuleType,
    start_worker: StartWorker,
    worker_pool: str,
    query: Query,
    trace: Trace,
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    worker = start_worker()
    run = app_module.race.delay(4, 6, str(gate))
    wait_for(lambda: "0.2" in trace.lines(), what="the first branch to come to its gate")
    wait_for(lambda: "2.3" in query(RECORDED, run.id), what="another branch to be ahead of it")
    if worker_pool == "prefork":
        worker.kill_child(query(CHILD, run.id))
    else:
        worker.kill()
    recorded = set(query(RECORDED, run.id))
    assert "0.2" not in recorded
    gate.touch()
    if worker_pool == "threads":
        start_worker()

    wait_for(lambda: query(STATUS, run.id) == "succeeded", timeout=20, what="the run to end")
    assert run.get(timeout=5) == [[f"{b}.{each}" for each in range(6)] for b in range(4)]
    assert {step: trace.count()[step] for step in recorded} == dict.fromkeys(recorded, 1)
    assert trace.count()["0.2"] == 2
    assert set(trace.count().values()) <= {1, 2}


@pytest.mark.parametrize("worker_pool", ["prefork", "threads", "solo"], indirect=True)
def test_branches_wait_for_all_there_is_at_the_same_time(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace
) -> None:
    run = app_module.journey.delay()
    wait_for(lambda: "work 0" in trace.lines(), what="the run to begin")
    run.send_event("go", {"by": "test"})
    assert run.get(timeout=30) == {
        "sleep": "slept",
        "work": [f"work {number}" for number in range(5)],
        "children": [2, 3],
        "event": {"by": "test"},
        "items": ["item 0", "item 1"],
        "gathered": ["a", 8],
        "retries": [2, 2],
        "thread": None,
    }
    assert set(trace.count().values()) == {1}
    for complaint in ("never awaited", "was destroyed", "never retrieved", "Traceback"):
        assert complaint not in celery_worker.logs()


def test_runs_end_in_the_ways_that_celery_knows(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    canceled = app_module.waits.delay(str(gate))
    wait_for(lambda: "at the gate" in trace.lines(), what="a step to run")
    canceled.cancel()
    gate.touch()
    assert app_module.again.delay().get(timeout=20) == 2
    assert app_module.late.delay().get(timeout=20) == "in time"
    wait_for(lambda: canceled.state == "REVOKED", what="the run to be canceled")
    assert trace.count() == {
        "at the gate": 1,
        "once": 1,
        "before the retry": 1,
        "late": 1,
        "late is interrupted": 1,
        "in time": 1,
    }


def test_a_body_that_awaits_something_of_its_own_can_be_stopped(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    worker = start_worker(concurrency=3)
    runs = {
        label: app_module.absent.delay(label, how)
        for label, how in (("canceled", "event"), ("paused", "timer"), ("handed back", "event"))
    }
    wait_for(lambda: set(runs) <= set(trace.lines()), what="all bodies to wait")
    runs["canceled"].cancel()
    runs["paused"].pause()
    wait_for(lambda: query(STATUS, runs["canceled"].id) == "canceled", timeout=5, what="the cancel")
    wait_for(lambda: query(STATUS, runs["paused"].id) == "paused", timeout=5, what="the pause")
    worker.signal(signal.SIGTERM, main_only=True)
    assert worker.wait_gone() == 0
    assert query(STATUS, runs["handed back"].id) == "pending"
    assert trace.count() == {each: 1 for label in runs for each in (label, f"{label} is left")}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup came with Python 3.11")
def test_the_error_of_a_task_group_is_the_runs(
    app_module: ModuleType, celery_worker: WorkerNode
) -> None:
    run = app_module.fails.delay()
    with pytest.raises(Exception, match="unhandled errors in a TaskGroup"):
        run.get(timeout=20)
    assert run.state == "FAILURE"


@pytest.mark.parametrize("worker_pool", ["gevent"], indirect=True)
def test_a_worker_with_green_threads_pauses_the_run_and_says_why(
    app_module: ModuleType, celery_worker: WorkerNode, query: Query, trace: Trace
) -> None:
    run = app_module.journey.delay()
    wait_for(lambda: query(STATUS, run.id) == "paused", timeout=20, what="the run to be paused")
    assert "prefork, threads or solo" in (run.run().reason or "")
    assert trace.lines() == []


def test_a_pass_ends_when_the_steps_of_its_branches_have(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace
) -> None:
    run = app_module.endless.delay(0, 3)
    assert run.get(timeout=20) == ["a 2", "b 2", "slow 2"]
    assert sorted(trace.lines()) == sorted(
        f"{name} {n}" for name in ("a", "b", "slow") for n in range(3)
    )
    assert run.run().passes == 2
    assert {step.name for step in run.steps()} == {"tests.apps.branches.mark", "farewell"}
