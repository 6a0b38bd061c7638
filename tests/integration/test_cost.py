"""What a step and a run cost: statements and round trips on the wire, commits on the server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import make_url, text

from durable.store import queries, steps
from durable.store.pool import Database
from durable.store.sessions import Sessions
from durable.store.steps import Written
from tests.harness import wait_for
from tests.harness.postgres import PostgresServer
from tests.harness.store import Store, open_database, step_of, traced

STEPS = 7


@pytest.mark.parametrize("prepare_threshold", [5, None])
def test_a_step_is_one_statement_and_one_round_trip(
    store: Store, store_url: str, prepare_threshold: int | None
) -> None:
    claim = store.running()
    with (
        open_database(store_url, prepare_threshold=prepare_threshold) as database,
        database.connect() as conn,
    ):
        steps.record(conn, step_of(claim, 0))
        with traced(conn) as counted:
            for ordinal in range(1, STEPS + 1):
                steps.record(conn, step_of(claim, ordinal))
    assert (counted.statements, counted.round_trips) == (STEPS, STEPS)


Work = Callable[[Database], object]


@pytest.fixture
def cost(postgres_server: PostgresServer, store_url: str) -> Callable[[Work], int]:
    """Commits of some work on the store, without those of connecting."""
    name = make_url(store_url).database

    def committed() -> int:
        # A connection counts for sure when it has ended.
        busy = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = %s AND backend_type = 'client backend'"
        )
        wait_for(lambda: postgres_server.execute(busy, name) == [(0,)], what="connections to end")
        statement = "SELECT xact_commit FROM pg_stat_database WHERE datname = %s"
        [(number,)] = postgres_server.execute(statement, name)
        return int(str(number))

    def once(work: Work) -> int:
        before = committed()
        with open_database(store_url) as database:
            work(database)
        return committed() - before

    def cost(work: Work) -> int:
        with open_database(store_url) as database:
            database.call(queries.known, [], "default")  # the first one of all looks at the schema
        # Autovacuum commits too, though hardly twice in the same moment.
        return min(once(work), once(work)) - min(once(connect_only), once(connect_only))

    return cost


def connect_only(database: Database) -> None:
    with database.connect():
        pass


@pytest.mark.parametrize("count", [0, STEPS])
def test_a_plain_run_of_n_steps_is_n_plus_three_commits(
    cost: Callable[[Work], int], count: int
) -> None:
    def runs_through(database: Database, times: int) -> None:
        with database.connect() as conn:
            store = Store(conn)
            for _ in range(times):
                claim = store.running()
                for ordinal in range(count):
                    steps.record(conn, step_of(claim, ordinal))
                assert store.finish(claim)

    # The first one of a connection prepares its statements, too.
    first = cost(lambda database: runs_through(database, 1))
    assert cost(lambda database: runs_through(database, 4)) - first <= 3 * (count + 3)


def test_a_step_and_the_rows_of_its_session_are_one_commit(cost: Callable[[Work], int]) -> None:
    def one_step(database: Database) -> None:
        sessions = Sessions(database, 1)
        with database.connect() as conn:
            claim = Store(conn).running()
        transaction = sessions.open()
        transaction.session.execute(text("CREATE TABLE IF NOT EXISTS stock (sku text)"))
        transaction.session.execute(text("INSERT INTO stock VALUES ('tea')"))
        assert transaction.commit(step_of(claim)) is Written.RECORDED
        assert sessions._engine is not None
        sessions._engine.dispose()

    def nothing_in_it(database: Database) -> None:
        sessions = Sessions(database, 1)
        with database.connect() as conn:
            Store(conn).running()
        transaction = sessions.open()
        transaction.session.connection()
        transaction.rollback()
        assert sessions._engine is not None
        sessions._engine.dispose()

    assert cost(one_step) - cost(nothing_in_it) == 1


def test_looking_at_a_run_is_one_round_trip(store: Store) -> None:
    run_id = store.start()
    queries.outcome(store.conn, run_id, store.namespace)  # prepares it
    with traced(store.conn) as counted:
        queries.outcome(store.conn, run_id, store.namespace)
    assert (counted.statements, counted.round_trips) == (1, 1)
