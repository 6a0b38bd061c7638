"""Fixtures of tests that speak to a real Postgres through the store alone."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from durable.store.pool import Database
from tests.harness.postgres import PostgresServer
from tests.harness.store import Background, Store, open_database

EMPTY = "DELETE FROM durable.workflow_runs; DELETE FROM durable.workers; DELETE FROM durable.outbox"


@pytest.fixture(scope="module")
def module_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database of this module's tests: making one takes longer than most of them."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def store_url(module_database_url: str) -> str:
    """URL of a database without a run or a worker in it."""
    with psycopg.connect(module_database_url, autocommit=True) as conn:
        conn.execute(EMPTY)
    return module_database_url


@pytest.fixture
def database(store_url: str) -> Iterator[Database]:
    """The store's own connections to the test's database."""
    with open_database(store_url) as database:
        yield database


@pytest.fixture
def store(database: Database) -> Iterator[Store]:
    """The test's own connection."""
    with database.connect() as conn:
        yield Store(conn)


@pytest.fixture
def other(database: Database) -> Iterator[Store]:
    """A second connection, to be in the way of the first."""
    with database.connect() as conn:
        yield Store(conn)


@pytest.fixture
def third(database: Database) -> Iterator[Store]:
    """A third connection."""
    with database.connect() as conn:
        yield Store(conn)


@pytest.fixture
def background(store_url: str) -> Iterator[Background]:
    """Calls that wait for a lock."""
    background = Background(store_url)
    yield background
    background.close()
