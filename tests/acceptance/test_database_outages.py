"""Postgres restarts or is away for longer than a lease: workers recover by themselves."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import psycopg
import pytest

from durable.errors import DatabaseUnavailable
from tests.acceptance.conftest import Query, Trace
from tests.acceptance.rough import (
    APP,
    LEASE,
    UNFINISHED,
    WORKERS,
    assert_nobody_was_buried,
    pass_time,
    short_settings,
)
from tests.conftest import StartWorker
from tests.harness import wait_for
from tests.harness.own_postgres import OwnPostgres
from tests.harness.postgres import PostgresServer


@pytest.fixture
def database_url(own_postgres: OwnPostgres) -> str:
    return PostgresServer(own_postgres.url).create_database()  # it goes with its server


@pytest.fixture
def query(database_url: str) -> Query:
    """As usual, with a new connection for each question."""

    def ask(statement: str, *params: object) -> Any:
        with psycopg.connect(database_url) as conn:
            row = conn.execute(statement, params).fetchone()
        return None if row is None else row[0]

    return ask


@pytest.fixture
def app_name() -> str:
    return APP


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, Any]:
    return short_settings(database_url, trace.path)


@pytest.mark.parametrize("mode", ["immediate", pytest.param("fast", marks=pytest.mark.storm)])
def test_a_restart_under_load_doubles_no_step(
    app_module: ModuleType,
    start_worker: StartWorker,
    own_postgres: OwnPostgres,
    query: Query,
    trace: Trace,
    mode: str,
) -> None:
    workers = start_worker(), start_worker()
    runs = [app_module.walk.delay(f"r{number}", 5, 0.02) for number in range(60)]
    for share in (50, 150):
        wait_for(lambda share=share: len(trace.lines()) > share, what=f"{share} steps to run")
        own_postgres.restart(mode)

    wait_for(lambda: query(UNFINISHED) == 0, timeout=30, what="all runs to finish")
    assert [run.get(timeout=5) for run in runs] == [5] * 60
    assert set(trace.count().values()) == {1}
    assert len(trace.count()) == 300
    wait_for(lambda: query(WORKERS) == 2, what="both workers to beat")
    assert_nobody_was_buried(*workers)


def test_an_outage_longer_than_a_lease_is_survived_by_every_worker(
    app_module: ModuleType,
    start_worker: StartWorker,
    own_postgres: OwnPostgres,
    query: Query,
    trace: Trace,
) -> None:
    workers = start_worker(), start_worker()
    runs = [app_module.walk.delay(f"r{number}", 4, 0.05) for number in range(40)]
    wait_for(lambda: len(trace.lines()) > 20, what="some steps to run")

    own_postgres.stop()
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable, match=r"no connection to Postgres.*Check that"):
        app_module.walk.delay("refused", 1)
    assert time.monotonic() - started < 2
    pass_time(LEASE * 1.5)
    own_postgres.start()

    wait_for(lambda: query(UNFINISHED) == 0, timeout=30, what="all runs to finish")
    assert [run.get(timeout=5) for run in runs] == [4] * 40
    assert set(trace.count().values()) == {1}
    assert len(trace.count()) == 160
    assert app_module.walk.delay("after", 1).get(timeout=10) == 1
    assert_nobody_was_buried(*workers)
