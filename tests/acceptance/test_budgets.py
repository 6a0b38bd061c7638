"""What may be used up: connections, statements, recoveries."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest

from durable.errors import RunLost
from tests.acceptance.conftest import Query, Trace
from tests.acceptance.rough import APP, short_settings
from tests.conftest import StartWorker
from tests.harness import wait_for

MAX_RECOVERIES = 2

CONNECTIONS = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'celery-durable'
"""
BEAT = "SELECT coalesce(max(beat), 0) FROM durable.workers"
TRANSACTIONS = """
SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s
"""


@pytest.fixture
def app_name() -> str:
    return APP


@pytest.fixture
def app_settings(request: pytest.FixtureRequest, database_url: str, trace: Trace) -> dict[str, Any]:
    if getattr(request, "param", "") == "defaults":
        return {"durable_database_url": database_url}
    short = short_settings(database_url, trace.path)
    return {**short, "durable_max_recoveries": MAX_RECOVERIES}


def test_a_run_that_kills_its_process_each_time_is_stopped(
    app_module: ModuleType, start_worker: StartWorker, trace: Trace
) -> None:
    start_worker(concurrency=1)
    run = app_module.dies.delay("r", times=99)
    with pytest.raises(RunLost, match=r"down 2 times.*durable_max_recoveries"):
        run.get(timeout=30)
    assert trace.count() == {"r.0": MAX_RECOVERIES}
    assert run.state == "FAILURE"
    assert run.run().reason == "lost"


def test_the_count_of_recoveries_starts_anew_with_each_committed_step(
    app_module: ModuleType, start_worker: StartWorker, trace: Trace
) -> None:
    start_worker(concurrency=1)
    run = app_module.dies.delay("r", times=MAX_RECOVERIES - 1, steps=3)
    assert run.get(timeout=40) == 3
    assert trace.count() == {f"r.{number}": MAX_RECOVERIES for number in range(3)}


def test_connections_stay_within_the_documented_budget(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    start_worker(concurrency=2)
    client, main, children, sessions = 1, 2, 2, 2
    for number in range(50):
        app_module.walk.delay(f"r{number}", 3)
    most = 0

    def all_done() -> bool:
        nonlocal most
        most = max(most, query(CONNECTIONS))
        return len(trace.lines()) == 150

    wait_for(all_done, what="the runs to finish")
    assert most <= client + main + children
    assert query(CONNECTIONS) == client + main + children

    for number in range(2):
        app_module.holds_session.delay(f"s{number}", str(gate))
    wait_for(lambda: {"s0", "s1"} <= set(trace.lines()), what="both sessions to be in use")
    assert query(CONNECTIONS) == client + main + children + sessions
    gate.touch()


@pytest.mark.storm
@pytest.mark.parametrize("app_settings", ["defaults"], indirect=True)
def test_an_idle_worker_asks_little_more_than_once_a_second(
    start_worker: StartWorker, database_url: str
) -> None:
    def has_settled() -> bool:
        with psycopg.connect(database_url) as conn:  # its end brings its count up to date
            row = conn.execute(BEAT).fetchone()
            return row is not None and row[0] >= 3

    start_worker()
    wait_for(has_settled, timeout=20, what="the worker to have settled")
    # From another database, so that these questions do not count.
    elsewhere = psycopg.conninfo.make_conninfo(database_url, dbname="postgres")
    database = psycopg.conninfo.conninfo_to_dict(database_url)["dbname"]
    seconds = 10.0
    with psycopg.connect(elsewhere, autocommit=True) as conn:

        def transactions() -> int:
            row = conn.execute(TRANSACTIONS, (database,)).fetchone()
            assert row is not None
            return int(row[0])

        before, started = transactions(), time.monotonic()
        # Statistics reach the view up to a second late: one is allowed for at each end.
        wait_for(lambda: time.monotonic() - started > seconds, timeout=seconds + 1)
        asked = transactions() - before
    assert 0 < asked <= 1.2 * seconds + 2
