"""Connections: shared with nobody, replaced when the server was away, errors that tell."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from durable.errors import DatabaseReadOnly, DatabaseUnavailable, StoreError
from durable.store import queries, runs, steps
from durable.store.connections import Connection
from durable.store.pool import Database
from durable.store.steps import Written
from tests.harness import wait_for
from tests.harness.own_postgres import OwnPostgres
from tests.harness.postgres import PostgresServer, with_database
from tests.harness.store import Store, open_database, step_of

OURS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'celery-durable' AND datname = %s"


def backend(conn: Connection) -> int:
    return conn.info.backend_pid


def backends(server: PostgresServer, url: str) -> set[object]:
    return {row[0] for row in server.execute(OURS, make_url(url).database)}


# --- one process


def test_a_thread_at_a_time_shares_one_connection(database: Database) -> None:
    assert len({database.call(backend) for _ in range(5)}) == 1


def test_no_more_connections_are_opened_than_allowed(store_url: str) -> None:
    with open_database(store_url, pool_size=2) as database:
        open_ones: set[int] = set()
        most = [0]
        lock = threading.Lock()

        def query(conn: Connection) -> None:
            with lock:
                open_ones.add(backend(conn))
                most[0] = max(most[0], len(open_ones))
            conn.execute("SELECT pg_sleep(0.01)")

        threads = [threading.Thread(target=database.call, args=(query,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(open_ones) == 2


def test_closing_leaves_no_connection_and_the_next_call_opens_one(
    postgres_server: PostgresServer, store_url: str
) -> None:
    with open_database(store_url) as database:
        database.call(backend)
        database.close()
        wait_for(lambda: not backends(postgres_server, store_url), what="the connection to go")
        assert database.call(backend)


def test_constructing_one_asks_for_nothing() -> None:
    def url() -> str:
        raise AssertionError("asked for")

    Database(url).close()


def test_json_comes_as_the_text_that_was_stored(database: Database) -> None:
    text = '{"b": 1, "a": -0.0}'

    def query(conn: Connection) -> object:
        return conn.execute("SELECT %s::json", (text,)).fetchone()

    assert database.call(query) == (text,)


# --- forks


def in_child(function: object, *args: object) -> int:
    """Run it in a forked child that ends like Python does; the exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            code = 0 if function(*args) else 1  # type: ignore[operator]
        except BaseException:  # noqa: BLE001 - the child must not go on as pytest
            code = 2
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def forking(database: Database) -> Database:
    """A database with an open connection in this process."""
    database.call(backend)
    return database


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_has_connections_of_its_own_and_does_not_close_the_parents(
    forking: Database,
) -> None:
    before = forking.call(backend)

    def use_and_close() -> bool:
        differs = forking.call(backend) != before
        forking.close()
        return differs

    assert in_child(use_and_close) == 0
    assert forking.call(backend) == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_drops_what_it_inherited_does_not_harm_the_parent(
    forking: Database,
) -> None:
    before = forking.call(backend)

    def drop() -> bool:
        import gc

        from durable import forks

        forks._inherited.clear()
        gc.collect()
        return True

    assert in_child(drop) == 0
    assert forking.call(backend) == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_every_connection_is_in_use_does_not_hang_the_child(
    forking: Database,
) -> None:
    lent = [forking._connections.take() for _ in range(forking._pool_size)]
    assert in_child(lambda: forking.call(backend) > 0) == 0
    for conn in lent:
        forking._connections.give_back(conn)


def test_when_every_connection_stays_in_use_the_error_names_the_setting(store_url: str) -> None:
    database = Database(lambda: store_url, pool_size=1, connect_timeout=0.05)
    lent = database._connections.take()
    with pytest.raises(DatabaseUnavailable, match=r"all 1 connections.*durable_pool_size"):
        database.call(backend)
    database._connections.give_back(lent)
    assert database.call(backend) == lent.info.backend_pid  # nothing was thrown away
    database.close()


# --- a server that goes and comes


def kill_backends(server: PostgresServer, url: str) -> None:
    server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'celery-durable' AND datname = %s",
        make_url(url).database,
    )
    wait_for(lambda: not backends(server, url), what="the connections to be gone")


def test_after_one_dead_connection_all_are_suspected(
    postgres_server: PostgresServer, store_url: str
) -> None:
    with open_database(store_url, pool_size=4) as database:
        barrier = threading.Barrier(3)

        def together(conn: Connection) -> int:
            barrier.wait(5)
            return backend(conn)

        threads = [threading.Thread(target=database.call, args=(together,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        database.call(together)
        for thread in threads:
            thread.join()
        old = backends(postgres_server, store_url)
        assert len(old) == 3
        kill_backends(postgres_server, store_url)
        assert {database.call(ask) for _ in range(4)}.isdisjoint(old)


def ask(conn: Connection) -> int:
    """Speak to the server, unlike `backend`."""
    row = conn.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("prepare_threshold", [5, None])
def test_a_step_is_recorded_over_a_connection_that_died(
    postgres_server: PostgresServer, store_url: str, store: Store, prepare_threshold: int | None
) -> None:
    claim = store.running()
    with open_database(store_url, prepare_threshold=prepare_threshold) as database:
        database.call(steps.record, step_of(claim, 0))
        pid = database.call(ask)
        postgres_server.execute("SELECT pg_terminate_backend(%s)", pid)
        wait_for(lambda: pid not in backends(postgres_server, store_url), what="its end")
        assert database.call(steps.record, step_of(claim, 1)) is Written.RECORDED
    assert [step[0] for step in store.steps(claim.id)] == [0, 1]


def test_a_commit_whose_answer_was_lost_is_repeated_and_found(
    postgres_server: PostgresServer, store_url: str, store: Store
) -> None:
    claim = store.running()
    tries: list[int] = []

    def committed_then_cut(conn: Connection) -> Written:
        tries.append(backend(conn))
        written = steps.record(conn, step_of(claim))
        if len(tries) == 1:
            postgres_server.execute("SELECT pg_terminate_backend(%s)", backend(conn))
            conn.execute("SELECT 1")
        return written

    with open_database(store_url) as database:
        assert database.call(committed_then_cut) is Written.RECORDED
    assert len(tries) == 2
    assert len(store.steps(claim.id)) == 1


def test_a_restart_costs_a_repeat_and_a_longer_absence_is_waited_for(
    own_postgres: OwnPostgres,
) -> None:
    url = own_postgres.url
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            own_postgres.start()

    with open_database(url, sleep=sleep, jitter=lambda: 0.5, connect_timeout=2.0) as database:
        database.call(queries.known, [], "default")
        own_postgres.restart()
        assert database.call(queries.known, [], "default") == set()

        own_postgres.stop("immediate")
        with pytest.raises(DatabaseUnavailable) as caught:
            database.call(queries.known, [], "default")
        text = str(caught.value)
        assert text.startswith("no connection to Postgres: ")
        assert text.endswith("Check that the server is up and that durable_database_url is right")
        assert "\n" not in text

        assert database.patiently(queries.known, [], "default") == set()
        assert waited == [0.05, 0.1, 0.2]


# --- errors that tell what to do


def first_error(url: str) -> StoreError:
    with open_database(url, connect_timeout=2.0) as database, pytest.raises(StoreError) as caught:
        database.call(queries.known, [], "default")
    assert "\n" not in str(caught.value)
    return caught.value


def test_nobody_listens() -> None:
    error = first_error("postgresql://127.0.0.1:1/shop")
    assert isinstance(error, DatabaseUnavailable)
    assert "Connection refused" in str(error)
    assert str(error).endswith("Check that the server is up and that durable_database_url is right")


def test_an_unknown_database_is_named(postgres_server: PostgresServer) -> None:
    error = first_error(with_database(postgres_server.url, "no_such_shop"))
    assert isinstance(error, DatabaseUnavailable)
    assert 'database "no_such_shop" does not exist' in str(error)
    assert "durable_database_url" in str(error)


def test_a_wrong_password_is_told_and_not_shown(own_postgres: OwnPostgres) -> None:
    with psycopg.connect(own_postgres.url, autocommit=True) as conn:
        conn.execute("CREATE ROLE shop LOGIN PASSWORD 'right'")
        row = conn.execute("SHOW hba_file").fetchone()
        assert row is not None
        hba = Path(row[0])
        hba.write_text("local all shop scram-sha-256\n" + hba.read_text())
        conn.execute("SELECT pg_reload_conf()")
    url = make_url(own_postgres.url).set(username="shop", password="wrong")
    wait_for(lambda: refuses(url.render_as_string(hide_password=False)), what="the new rule")
    error = first_error(url.render_as_string(hide_password=False))
    assert isinstance(error, DatabaseUnavailable)
    assert 'password authentication failed for user "shop"' in str(error)
    assert "wrong" not in str(error)


def refuses(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return True
    return False


def test_a_standby_or_a_read_only_database_is_told(
    postgres_server: PostgresServer, store_url: str
) -> None:
    url = make_url(store_url).update_query_dict({"options": "-cdefault_transaction_read_only=on"})
    run = runs.NewRun("00000000-0000-4000-8000-000000000000", "default", "x", "{}", "{}")
    with (
        open_database(url.render_as_string(hide_password=False)) as database,
        pytest.raises(DatabaseReadOnly) as caught,
    ):
        database.call(runs.insert, run)
    assert str(caught.value) == (
        "Postgres accepts no writes (cannot execute INSERT in a read-only transaction): point"
        " durable_database_url at the primary"
    )


def test_what_postgres_refuses_is_no_reason_to_try_again(database: Database) -> None:
    tries: list[int] = []

    def query(conn: Connection) -> None:
        tries.append(1)
        conn.execute("SELECT 1 / 0")

    with pytest.raises(StoreError, match="Postgres refused a statement: division by zero"):
        database.patiently(query)
    assert len(tries) == 1


def test_an_error_of_the_callers_own_comes_out_as_it_is(database: Database) -> None:
    def query(conn: Connection) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        database.call(query)


def test_statements_that_psycopg_has_thrown_away_are_prepared_again(store: Store) -> None:
    """It does so with a ROLLBACK, once it has prepared something itself."""
    before = store.running()
    store.conn.execute("DEALLOCATE ALL")
    claim = store.running()
    store.conn.execute("DEALLOCATE ALL")
    assert steps.record(store.conn, step_of(claim)) is Written.RECORDED
    store.conn.execute("DEALLOCATE ALL")
    assert store.finish(claim)
    assert store.finish(before)


def test_a_rolled_back_transaction_leaves_a_connection_usable(store: Store) -> None:
    claim = store.running()
    for _ in range((store.conn.prepare_threshold or 0) + 2):
        store.conn.execute("SELECT 1")
    with suppress(ZeroDivisionError), store.conn.transaction():
        raise ZeroDivisionError
    assert store.finish(claim)
