"""A run outlives its process, its worker and its message."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import WorkerNode, every_broker, wait_for

STEPS = "SELECT count(*) FROM durable.step_attempts WHERE workflow_run_id = %s"
CHILD = "SELECT child_pid FROM durable.workflow_runs WHERE id = %s AND status = 'running'"


@every_broker
def test_a_killed_child_costs_only_the_step_in_flight(
    app_module: ModuleType, celery_worker: WorkerNode, query: Query, trace: Trace, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = app_module.gates.delay(4, str(go), 2)
    wait_for(lambda: "gate 2" in trace.lines(), what="the third step to run")

    celery_worker.kill_child(query(CHILD, run.id))
    wait_for(lambda: trace.count()["gate 2"] == 2, timeout=2, what="the run to go on")
    go.touch()

    assert run.get(timeout=10) == [0, 1, 2, 3]
    assert trace.count() == {"gate 0": 1, "gate 1": 1, "gate 2": 2, "gate 3": 1}


def test_a_killed_worker_is_taken_over_by_another(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first = start_worker()
    run = app_module.gates.delay(3, str(go), 1)
    wait_for(lambda: "gate 1" in trace.lines(), what="the second step to run")
    start_worker()

    first.kill()
    wait_for(lambda: trace.count()["gate 1"] == 2, timeout=20, what="the other worker to go on")
    go.touch()

    assert run.get(timeout=10) == [0, 1, 2]
    assert trace.count() == {"gate 0": 1, "gate 1": 2, "gate 2": 1}


@pytest.mark.parametrize("worker_pool", ["prefork", "gevent"], indirect=True)
def test_a_step_that_hangs_is_interrupted_at_its_timeout_and_tried_again(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace
) -> None:
    run = app_module.hangs.delay()
    assert run.get(timeout=10) == 2
    assert trace.lines() == ["hang 1", "hang 2"]
    assert [attempt.status for attempt in run.steps()] == ["failed", "succeeded"]
