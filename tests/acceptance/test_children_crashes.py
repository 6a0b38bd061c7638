"""A parent and its children outlive the moments at which a kill hurts most, on every broker."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from durable.testing.crashes import VARIABLE, CrashBoard, CrashPoint
from tests.acceptance.conftest import Query
from tests.conftest import StartWorker
from tests.harness import every_broker, wait_for

CHILDREN = "SELECT count(*) FROM durable.workflow_runs WHERE parent_run_id = %s"
OUTCOMES = (
    "SELECT count(*) FROM durable.step_attempts WHERE workflow_run_id = %s AND kind = 'result'"
)
STATUS = "SELECT status FROM durable.workflow_runs WHERE id = %s"

#: Whose process is killed, 0 the parent's and 1 its child's, and when.
MOMENTS = {
    "the child's row is there, the dispatch is not recorded": (0, "durable_insert"),
    "the dispatch is recorded": (0, "durable_record"),
    "the child has ended, nobody has rung the parent": (1, "durable_finish"),
}


@pytest.fixture
def app_name() -> str:
    return "tests.apps.sweep"


@pytest.fixture
def app_settings(database_url: str, tmp_path: Path) -> dict[str, Any]:
    effects = tmp_path / "effects"
    effects.mkdir()
    return {
        "durable_database_url": database_url,
        "durable_lease": 2,
        "durable_heartbeat_interval": 0.5,
        "durable_ring_interval": 1,
        "durable_poll_interval": 0.2,
        "effects": str(effects),
    }


@every_broker
def test_a_parent_and_its_children_outlive_each_moment(
    app_module: ModuleType, start_worker: StartWorker, query: Query, tmp_path: Path
) -> None:
    board = CrashBoard(tmp_path / "crashes")
    start_worker(env={VARIABLE: str(board.directory)})
    workloads = {moment: [str(uuid.uuid4()) for _ in range(4)] for moment in MOMENTS}
    for moment, (whose, operation) in MOMENTS.items():
        point = CrashPoint("child", f"sql exec_prepared {operation}", "after")
        board.arm(workloads[moment][whose], point)
        app_module.start("parent", workloads[moment])
    for moment, (whose, _) in MOMENTS.items():
        parent, child, *_ = workloads[moment]
        assert app_module.app.AsyncResult(parent).get(timeout=40) == 24, moment
        assert board.fired(workloads[moment][whose]), moment
        assert query(CHILDREN, parent) == 2
        assert query(OUTCOMES, parent) == 4
        assert executions(tmp_path, child) == 1


@every_broker
def test_a_parked_parent_outlives_its_worker(
    app_module: ModuleType, start_worker: StartWorker, query: Query, tmp_path: Path
) -> None:
    child = str(uuid.uuid4())
    first = start_worker()
    run = app_module.waits_for.delay(1, child)
    wait_for(lambda: query(STATUS, run.id) == "waiting", what="the parent to be parked")
    wait_for(lambda: query(STATUS, child) == "running", what="the child to run")
    first.kill()
    start_worker()
    assert run.get(timeout=40) == 2
    assert query(CHILDREN, run.id) == 1


def executions(directory: Path, run_id: str) -> int:
    return (directory / "effects" / f"{run_id}.plus").stat().st_size
