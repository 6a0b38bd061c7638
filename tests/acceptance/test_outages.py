"""The broker goes away and comes back, full or empty: nothing is lost or doubled."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import group

from tests.acceptance.conftest import Query, Trace
from tests.acceptance.rough import (
    APP,
    BEATS,
    COUNT,
    LEASE,
    PUBLISH_TIMEOUT,
    UNFINISHED,
    assert_nobody_was_buried,
    moved,
    pass_time,
    short_settings,
)
from tests.conftest import StartWorker
from tests.harness import wait_for
from tests.harness.brokers import BrokerNode
from tests.harness.own_redis import OwnRedis


@pytest.fixture
def app_name() -> str:
    return APP


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, Any]:
    return short_settings(database_url, trace.path)


# --- the broker is emptied


@pytest.mark.parametrize(
    "celery_broker",
    ["own_redis", "rabbitmq", pytest.param("filesystem", marks=pytest.mark.storm)],
    indirect=True,
)
def test_an_emptied_broker_loses_no_run(
    app_module: ModuleType,
    start_worker: StartWorker,
    celery_broker: BrokerNode,
    query: Query,
    trace: Trace,
    tmp_path: Path,
) -> None:
    start_worker()
    gate = tmp_path / "gate"
    for number in range(50):
        app_module.backs_off.delay(f"b{number}")
    wait_for(lambda: query(COUNT, "sleeping") >= 40, what="runs to back off")
    for number in range(2):
        app_module.walk.delay(f"r{number}", 2, gate=str(gate))
    for number in range(448):
        app_module.walk.delay(f"p{number}", 1)
    wait_for(lambda: {"r0.0", "r1.0"} <= set(trace.lines()), what="both slots to be taken")

    assert celery_broker.empty() > 400
    gate.touch()

    wait_for(lambda: query(UNFINISHED) == 0, timeout=30, what="all runs to finish")
    count = trace.count()
    assert set(count.values()) == {1}
    assert len(count) == 50 * 3 + 2 * 2 + 448


# --- the broker does not answer, or is down


@pytest.mark.parametrize("celery_broker", ["own_redis", "stalling_rabbitmq"], indirect=True)
def test_a_stalled_broker_costs_no_lease_and_delay_returns_in_time(
    app_module: ModuleType, start_worker: StartWorker, celery_broker: BrokerNode, query: Query
) -> None:
    workers = start_worker(), start_worker()
    app_module.walk.delay("before", 1).get(timeout=10)

    celery_broker.container.stall()
    started = time.monotonic()
    # Canvas brings a producer of Celery's own, which would wait without end.
    during = group(app_module.walk.s(f"during{number}", 1) for number in range(3)).delay()
    assert time.monotonic() - started < PUBLISH_TIMEOUT + 0.5
    assert {run.run().status for run in during.results} == {"pending"}
    beats = query(BEATS)
    pass_time(LEASE * 1.2)
    wait_for(lambda: moved(query, beats), timeout=LEASE, what="every worker to beat")
    celery_broker.container.go()

    assert [run.get(timeout=15) for run in during.results] == [1, 1, 1]
    assert_nobody_was_buried(*workers)


@pytest.mark.parametrize("celery_broker", ["own_redis"], indirect=True)
def test_a_broker_that_is_down_and_comes_back_empty_loses_no_run(
    app_module: ModuleType,
    start_worker: StartWorker,
    celery_broker: BrokerNode,
    query: Query,
    trace: Trace,
    tmp_path: Path,
) -> None:
    redis: OwnRedis = celery_broker.container
    workers = start_worker(), start_worker()
    gate = tmp_path / "gate"
    running = app_module.walk.delay("running", 2, gate=str(gate))
    wait_for(lambda: "running.0" in trace.lines(), what="a run to begin")

    redis.stop()
    started = time.monotonic()
    during = app_module.walk.delay("during", 1)
    assert time.monotonic() - started < PUBLISH_TIMEOUT + 0.5
    beats = query(BEATS)
    pass_time(LEASE * 1.2)
    wait_for(lambda: moved(query, beats), timeout=LEASE, what="every worker to beat")
    gate.touch()
    redis.start()

    assert during.get(timeout=20) == 1
    assert running.get(timeout=20) == 2
    assert set(trace.count().values()) == {1}
    assert_nobody_was_buried(*workers)


@pytest.mark.parametrize("celery_broker", ["own_redis"], indirect=True)
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "never connected"])
def test_a_stalled_broker_that_is_the_result_backend_too_holds_no_delay(
    app_module: ModuleType, celery_broker: BrokerNode, connected: bool
) -> None:
    app_module.app.conf.result_backend = celery_broker.container.url
    if connected:
        app_module.walk.delay("before", 1)
    celery_broker.container.stall()
    started = time.monotonic()
    app_module.walk.delay("during", 1)
    assert time.monotonic() - started < PUBLISH_TIMEOUT + 0.5
