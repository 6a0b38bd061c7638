"""The harness itself, with plain Celery: were it broken, no other test would tell why."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import StartWorker
from tests.harness import WorkerNode, every_broker, every_pool, wait_for
from tests.harness.brokers import BrokerNode


@pytest.fixture
def app_name() -> str:
    return "tests.apps.plain"


@pytest.fixture
def app_settings(tmp_path: Path) -> dict[str, Any]:
    results = tmp_path / "results"
    results.mkdir()
    return {"result_backend": results.as_uri()}


@every_broker
def test_a_task_runs_and_an_inspector_sees_its_worker(
    app_module: ModuleType, celery_worker: WorkerNode
) -> None:
    assert app_module.add.delay(2, 3).get(timeout=10) == 5
    replies = app_module.app.control.ping(timeout=5, limit=1)
    assert replies == [{celery_worker.hostname(): {"ok": "pong"}}]


@every_pool
def test_a_killed_worker_leaves_no_process_and_starts_again(
    app_module: ModuleType, celery_worker: WorkerNode
) -> None:
    first = app_module.pid.delay().get(timeout=10)
    celery_worker.kill()
    assert not celery_worker.is_running()
    assert not celery_worker.children()

    celery_worker.restart()
    assert app_module.pid.delay().get(timeout=10) != first


def test_a_killed_child_is_replaced_and_its_worker_lives_on(
    app_module: ModuleType, celery_worker: WorkerNode, tmp_path: Path
) -> None:
    # A busy child: where the pool shares one pipe (filesystem), an idle one may
    # hold the lock of that pipe, and killed with it leaves the pool deaf.
    here = tmp_path / "here"
    app_module.hold.delay(str(here), str(tmp_path / "gate"))
    busy = int(wait_for(lambda: here.exists() and here.read_text(), what="the task to start"))
    main, full = celery_worker.pid, len(celery_worker.children())

    assert celery_worker.kill_child(busy) == busy
    wait_for(
        lambda: len(celery_worker.children()) == full,
        timeout=20,
        what="the pool to be full again",
    )
    assert busy not in celery_worker.children()
    assert celery_worker.pid == main
    assert app_module.add.delay(1, 1).get(timeout=10) == 2


def test_a_main_process_killed_alone_can_leave_children_which_teardown_ends(
    celery_worker: WorkerNode,
) -> None:
    celery_worker.kill(main_only=True)
    assert not celery_worker.is_running()
    celery_worker.teardown()
    assert not celery_worker.children()


def test_a_frozen_worker_answers_again_once_continued(
    app_module: ModuleType, celery_worker: WorkerNode
) -> None:
    celery_worker.sigstop()
    result = app_module.add.delay(4, 4)
    assert not result.ready()
    celery_worker.sigcont()
    assert result.get(timeout=10) == 8


def test_a_warm_stop_ends_with_success_and_a_log(
    celery_worker: WorkerNode, app_module: ModuleType
) -> None:
    assert celery_worker.stop() == 0
    assert "Warm shutdown" in celery_worker.logs()


def test_two_workers_on_their_own_queues(
    start_worker: StartWorker, app_module: ModuleType, celery_broker: BrokerNode
) -> None:
    left = start_worker(name="left", queues=[f"{celery_broker.queue}.left"], pool="solo")
    right = start_worker(name="right", queues=[f"{celery_broker.queue}.right"], pool="solo")
    asked = {
        side: app_module.pid.apply_async(queue=f"{celery_broker.queue}.{side}")
        for side in ("left", "right")
    }
    pids = {side: result.get(timeout=10) for side, result in asked.items()}
    assert pids == {"left": left.pid, "right": right.pid}


@every_broker
def test_a_broker_can_be_emptied(app_module: ModuleType, celery_broker: BrokerNode) -> None:
    for _ in range(3):
        app_module.add.delay(1, 2)
    assert celery_broker.depth() == 3
    assert celery_broker.empty() == 3
    assert celery_broker.depth() == 0
