"""Workers that are told to stop: what they held goes on elsewhere at once."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.acceptance.conftest import Query, Trace
from tests.acceptance.rough import APP, HOLDER, UNFINISHED, short_settings
from tests.conftest import StartWorker
from tests.harness import wait_for

SIGNED_ON = "SELECT array_agg(split_part(id, '@', 1)) FROM durable.workers"
CONNECTIONS = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'celery-durable'
"""


@pytest.fixture
def app_name() -> str:
    return APP


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, Any]:
    # What is not handed back at once would take a minute.
    settings = short_settings(database_url, trace.path)
    return {**settings, "durable_ring_interval": 60, "durable_poll_interval": 5}


@pytest.mark.parametrize(
    "worker_pool",
    [
        "prefork",
        "threads",
        *(pytest.param(pool, marks=pytest.mark.storm) for pool in ("gevent", "solo")),
    ],
    indirect=True,
)
def test_a_warm_shutdown_hands_its_runs_back_at_a_step_boundary(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = start_worker(concurrency=1)
    run = app_module.walk.delay("r", 3, gate=str(gate), at=1)
    wait_for(lambda: "r.1" in trace.lines(), what="the second step to run")
    # Messages that the first worker has taken already: they wait behind the step.
    more = [app_module.walk.delay(f"m{number}", 1) for number in range(4)]
    second = start_worker(name="second")

    first.signal(signal.SIGTERM, main_only=True)
    wait_for(lambda: "Warm shutdown" in first.logs(), what="the shutdown to begin")
    gate.touch()
    started = time.monotonic()
    assert run.get(timeout=10) == 3
    assert [each.get(timeout=10) for each in more] == [1] * 4
    assert time.monotonic() - started < 10  # not the ring interval
    assert first.wait_gone() == 0

    assert query(HOLDER, run.id) == "second"
    assert set(trace.count().values()) == {1}
    assert query(SIGNED_ON) == ["second"]
    assert second.stop() == 0
    assert query(SIGNED_ON) is None
    app_module.app.durable.close()
    wait_for(lambda: query(CONNECTIONS) == 0, what="all connections to be closed")


def test_a_shutdown_by_remote_control_stops_at_a_step_boundary(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = start_worker(concurrency=1)
    run = app_module.walk.delay("r", 3, gate=str(gate), at=1)
    wait_for(lambda: "r.1" in trace.lines(), what="the second step to run")
    app_module.app.control.shutdown()
    wait_for(lambda: "Got shutdown from remote" in first.logs(), what="the shutdown to begin")
    time.sleep(0.5)  # its pool is waited for by now
    gate.touch()
    assert first.wait_gone() == 0
    assert run.run().status == "pending"
    start_worker(name="second")
    assert run.get(timeout=10) == 3
    assert set(trace.count().values()) == {1}


def test_a_cold_shutdown_is_recovered_from(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = start_worker()
    run = app_module.walk.delay("r", 3, gate=str(gate), at=1)
    wait_for(lambda: "r.1" in trace.lines(), what="the second step to run")
    start_worker(name="second")

    first.signal(signal.SIGQUIT, main_only=True)
    wait_for(lambda: trace.count()["r.1"] == 2, timeout=20, what="the other worker to go on")
    gate.touch()

    assert run.get(timeout=10) == 3
    assert query(HOLDER, run.id) == "second"
    assert trace.count() == {"r.0": 1, "r.1": 2, "r.2": 1}
    assert query(UNFINISHED) == 0
