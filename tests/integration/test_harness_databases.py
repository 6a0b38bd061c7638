"""The tests' own databases: fresh, apart, and gone afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

import psycopg

from tests.harness import every_postgres
from tests.harness.names import PREFIX, is_left_over, unique_name
from tests.harness.own_postgres import OwnPostgres
from tests.harness.postgres import PostgresServer


def names_of(server: PostgresServer) -> set[object]:
    return {name for (name,) in server.execute("SELECT datname FROM pg_catalog.pg_database")}


@every_postgres
def test_a_database_is_dropped_even_while_somebody_is_connected(
    postgres_server: PostgresServer,
) -> None:
    before = names_of(postgres_server)
    url = postgres_server.create_database(migrated=False)
    with psycopg.connect(url) as connection:
        assert names_of(postgres_server) - before == {connection.info.dbname}
        postgres_server.drop_database(url)
    assert names_of(postgres_server) == before


def test_each_database_starts_from_the_migrated_template(own_postgres: OwnPostgres) -> None:
    def migrate(url: str) -> None:
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE migrated ()")

    server = PostgresServer(own_postgres.url, prepare=migrate)
    first, second = server.create_database(), server.create_database()
    assert first != second
    for url in (first, second):
        with psycopg.connect(url) as connection:
            connection.execute("SELECT FROM migrated")
    server.close()
    assert not [name for name in names_of(server) if str(name).startswith(PREFIX)]


def test_what_a_killed_run_left_is_swept_and_nothing_else(own_postgres: OwnPostgres) -> None:
    server = PostgresServer(own_postgres.url)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left_over = unique_name().replace(f"_{os.getpid()}_", f"_{dead.pid}_")
    for name in (left_over, "durable_test_000000_1_1", "customers"):
        server.execute(f"CREATE DATABASE {name}")
    assert is_left_over(left_over)

    swept = PostgresServer(own_postgres.url)
    assert left_over not in names_of(swept)
    assert {"durable_test_000000_1_1", "customers"} <= names_of(swept)


def test_the_servers_address_stays_over_a_crash(own_postgres: OwnPostgres) -> None:
    own_postgres.restart("immediate")
    with psycopg.connect(own_postgres.url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
