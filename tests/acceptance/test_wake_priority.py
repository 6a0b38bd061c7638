"""A woken run gets ahead of a backlog of new ones, where the broker has priorities."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.acceptance.conftest import Trace
from tests.conftest import StartWorker
from tests.harness import wait_for
from tests.harness.brokers import BrokerNode

BACKLOG = 20
#: What a worker of one process has taken from the broker when it is let go.
PREFETCHED = 1

#: What a project that wants priorities sets anyway.
WITH_PRIORITIES = {
    "rabbitmq": {"task_queue_max_priority": 10},
    "redis": {"task_default_priority": 5},
}


@pytest.fixture
def app_name() -> str:
    return "tests.apps.waits"


@pytest.fixture
def app_settings(request: pytest.FixtureRequest, database_url: str, trace: Trace) -> dict[str, Any]:
    return {
        "durable_database_url": database_url,
        "worker_prefetch_multiplier": 1,
        "task_inherit_parent_priority": True,
        "trace": str(trace.path),
        **request.param,
    }


def cases(*wishes: dict[str, Any]) -> Any:
    given = [
        pytest.param(broker, {**settings, **wish}, id=" ".join([broker, *map(str, wish.values())]))
        for broker, settings in WITH_PRIORITIES.items()
        for wish in wishes
    ]
    return pytest.mark.parametrize(("celery_broker", "app_settings"), given, indirect=True)


@cases({}, {"durable_wake_priority": "off"})
def test_a_woken_run_does_not_wait_for_a_backlog_of_new_ones(
    app_module: ModuleType,
    app_settings: dict[str, Any],
    start_worker: StartWorker,
    celery_broker: BrokerNode,
    trace: Trace,
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    start_worker(concurrency=1)
    waiting = app_module.inherits.delay()
    wait_for(lambda: waiting.run().status == "waiting", what="the run to wait")
    busy = app_module.holds.delay(str(gate))
    wait_for(lambda: '"holds"' in "".join(trace.lines()), what="the worker to be busy")
    backlog = [app_module.quick.delay(f"{number}") for number in range(BACKLOG)]
    queued = BACKLOG - PREFETCHED
    wait_for(lambda: celery_broker.depth() == queued, what="the worker to have taken its share")
    waiting.send_event("approval", 1)
    wait_for(lambda: celery_broker.depth() == queued + 1, what="the woken run to be rung")
    gate.touch()

    for run in (busy, *backlog):
        run.get(timeout=20)
    waiting.get(timeout=20)
    done = [json.loads(line)[2] for line in trace.lines() if '"quick"' in line]
    # A child of the woken run was sent to the back of the queue, when it came to run.
    assert done[-1] == "child"
    claimed = next(step.completed_at for step in waiting.steps() if step.kind == "event")
    earlier = sum(run.run().completed_at < claimed for run in backlog)
    if app_settings.get("durable_wake_priority") == "off":
        assert earlier == BACKLOG
    else:
        assert earlier <= PREFETCHED
