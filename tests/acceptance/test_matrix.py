"""SIGKILL of a whole worker, over pools, brokers and Postgres servers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.acceptance.conftest import Query, Trace
from tests.acceptance.rough import APP, HOLDER, short_settings
from tests.conftest import StartWorker
from tests.harness import BROKERS, POOLS, wait_for

SERVERS = ("default", "machine")

#: Each pool, broker and server at least once; ``make storm`` runs all of them.
LEAN = {
    ("prefork", "rabbitmq", "machine"),
    ("threads", "filesystem", "default"),
    ("gevent", "redis", "machine"),
    ("solo", "redis", "default"),
}


def combinations() -> list[Any]:
    return [
        pytest.param(*each, id="-".join(each), marks=() if each in LEAN else [pytest.mark.storm])
        for pool in POOLS
        for broker in BROKERS
        for each in ((pool, broker, server) for server in SERVERS)
    ]


@pytest.fixture
def app_name() -> str:
    return APP


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, Any]:
    return short_settings(database_url, trace.path)


@pytest.mark.parametrize(
    ("worker_pool", "celery_broker", "postgres_server"), combinations(), indirect=True
)
def test_a_killed_worker_costs_only_the_steps_in_flight(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = start_worker(name="first")
    run = app_module.walk.delay("r", 3, gate=str(gate), at=1)
    wait_for(lambda: "r.1" in trace.lines(), what="the second step to run")
    behind = [app_module.walk.delay(f"b{number}", 2) for number in range(5)]
    start_worker(name="second")

    first.kill()
    wait_for(lambda: trace.count()["r.1"] == 2, timeout=20, what="the other worker to go on")
    gate.touch()

    assert run.get(timeout=10) == 3
    assert [each.get(timeout=20) for each in behind] == [2] * 5
    assert query(HOLDER, run.id) == "second"
    assert trace.count().pop("r.1") == 2
    assert {key for key, count in trace.count().items() if count > 1} == {"r.1"}
