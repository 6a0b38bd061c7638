"""A step's rows and its result are one commit: both are there, or neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from durable.errors import UnsupportedByDurable
from durable.store import steps
from durable.store.pool import Database
from durable.store.sessions import Sessions
from durable.store.steps import Written
from tests.harness.postgres import PostgresServer
from tests.harness.store import Background, Store, step_of

SHOP = """
DROP TABLE IF EXISTS stock;
CREATE TABLE stock (sku text, n int CHECK (n >= 0), UNIQUE (sku) DEFERRABLE INITIALLY DEFERRED)
"""
INSERT = text("INSERT INTO stock VALUES (:sku, :n)")


@pytest.fixture
def sessions(database: Database, store: Store) -> Iterator[Sessions]:
    store.conn.execute(SHOP)
    sessions = Sessions(database, 4)
    yield sessions
    if sessions._engine is not None:
        sessions._engine.dispose()


def stock(store: Store) -> list[tuple[object, ...]]:
    return store.conn.execute("SELECT sku, n FROM stock ORDER BY sku").fetchall()


def test_rows_and_result_are_one_commit(store: Store, sessions: Sessions) -> None:
    claim = store.running()
    transaction = sessions.open()
    transaction.session.execute(INSERT, {"sku": "tea", "n": 1})
    assert (stock(store), store.steps(claim.id)) == ([], [])

    assert transaction.commit(step_of(claim)) is Written.RECORDED

    assert (stock(store), len(store.steps(claim.id))) == ([("tea", 1)], 1)
    xids = store.conn.execute(
        "SELECT (SELECT xmin FROM stock), (SELECT xmin FROM durable.step_attempts)"
    ).fetchone()
    assert xids is not None
    assert xids[0] == xids[1]


def test_a_session_that_nothing_was_asked_of_still_records_the_step(
    store: Store, sessions: Sessions
) -> None:
    claim = store.running()
    assert sessions.open().commit(step_of(claim)) is Written.RECORDED
    assert len(store.steps(claim.id)) == 1


def test_a_with_block_of_the_users_does_not_end_the_transaction(
    store: Store, sessions: Sessions
) -> None:
    claim = store.running()
    transaction = sessions.open()
    with transaction.session as session, session.begin_nested():
        session.execute(INSERT, {"sku": "tea", "n": 1})
    transaction.session.close()
    assert transaction.commit(step_of(claim)) is Written.RECORDED
    assert (stock(store), len(store.steps(claim.id))) == ([("tea", 1)], 1)


def test_a_with_block_that_is_left_by_an_error_is_rolled_back(
    store: Store, sessions: Sessions
) -> None:
    claim = store.running()
    transaction = sessions.open()
    with suppress(KeyError), transaction.session as session:
        session.execute(INSERT, {"sku": "tea", "n": 1})
        raise KeyError
    assert transaction.commit(step_of(claim)) is Written.RECORDED
    assert (stock(store), len(store.steps(claim.id))) == ([], 1)


def test_an_early_commit_is_refused_and_nothing_is_stored(store: Store, sessions: Sessions) -> None:
    store.running()
    for commit in (lambda session: session.commit(), lambda session: session.begin().commit()):
        transaction = sessions.open()
        with pytest.raises(UnsupportedByDurable, match="committed together with the result"):
            commit(transaction.session)
        transaction.rollback()
    transaction = sessions.open()
    with (
        pytest.raises(UnsupportedByDurable, match="leave out commit"),
        transaction.session.begin(),
    ):
        transaction.session.execute(INSERT, {"sku": "tea", "n": 1})
    transaction.rollback()
    assert stock(store) == []


def test_the_rows_of_a_fenced_worker_are_rolled_back(store: Store, sessions: Sessions) -> None:
    claim = store.running()
    transaction = sessions.open()
    transaction.session.execute(INSERT, {"sku": "tea", "n": 1})
    store.release_child()
    assert transaction.commit(step_of(claim)) is Written.FENCED
    assert (stock(store), store.steps(claim.id)) == ([], [])


def test_a_take_over_waits_for_the_commit(
    store: Store, other: Store, sessions: Sessions, background: Background
) -> None:
    claim = store.running()
    transaction = sessions.open()
    transaction.session.execute(INSERT, {"sku": "tea", "n": 1})
    connection = transaction.session.connection().connection
    assert steps.record_in(connection.cursor(), step_of(claim)) is Written.RECORDED
    released = background.blocked(other, other.release_child)
    transaction.session.ending = True
    transaction.session.commit()
    assert released.result() == [claim.id]
    found = store.claim(claim.id)
    assert found is not None
    assert len(found[1]) == 1


def test_a_run_that_was_asked_to_stop_keeps_rows_and_result(
    store: Store, sessions: Sessions
) -> None:
    claim = store.running()
    store.cancel(claim.id)
    transaction = sessions.open()
    transaction.session.execute(INSERT, {"sku": "tea", "n": 1})
    assert transaction.commit(step_of(claim)) is Written.CANCEL
    assert (stock(store), len(store.steps(claim.id))) == ([("tea", 1)], 1)


def test_a_constraint_that_is_checked_at_the_commit_is_the_steps_own_failure(
    store: Store, sessions: Sessions
) -> None:
    claim = store.running()
    transaction = sessions.open()
    for _ in range(2):
        transaction.session.execute(INSERT, {"sku": "tea", "n": 1})
    with pytest.raises(IntegrityError, match="duplicate key"):
        transaction.commit(step_of(claim))
    assert (stock(store), store.steps(claim.id)) == ([], [])


def test_a_failed_step_leaves_no_row_and_gives_its_connection_back(
    store: Store, sessions: Sessions
) -> None:
    pids = set()
    for _ in range(6):  # more than the pool has
        transaction = sessions.open()
        pids.add(transaction.session.execute(text("SELECT pg_backend_pid()")).scalar())
        transaction.session.execute(INSERT, {"sku": "tea", "n": 1})
        transaction.rollback()
    assert stock(store) == []
    assert len(pids) == 1


@pytest.mark.parametrize("committed", [True, False])
def test_a_connection_lost_at_the_commit_leaves_both_or_neither(
    store: Store,
    sessions: Sessions,
    postgres_server: PostgresServer,
    committed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = store.running()
    transaction = sessions.open()
    transaction.session.execute(INSERT, {"sku": "tea", "n": 1})
    pid = transaction.session.execute(text("SELECT pg_backend_pid()")).scalar()
    commit = transaction.session.commit

    def cut() -> None:
        if committed:
            commit()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        postgres_server.execute("SELECT pg_terminate_backend(%s)", pid)
        commit()

    monkeypatch.setattr(transaction.session, "commit", cut)
    assert transaction.commit(step_of(claim)) is None  # ask
    assert steps.was_recorded(store.conn, step_of(claim)) is committed
    assert (len(stock(store)), len(store.steps(claim.id))) == (committed, committed)


def test_a_full_disk_at_the_commit_is_an_answer_and_a_failure(
    store: Store, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Taken for a lost answer, the body would run again and again without a pause.
    claim = store.running()
    transaction = sessions.open()

    def full() -> None:
        raise psycopg.errors.DiskFull("could not extend file")

    monkeypatch.setattr(transaction.session, "commit", full)
    with pytest.raises(psycopg.errors.DiskFull):
        transaction.commit(step_of(claim))


def test_a_rollback_over_a_dead_connection_is_quiet(
    sessions: Sessions, postgres_server: PostgresServer
) -> None:
    transaction = sessions.open()
    pid = transaction.session.execute(text("SELECT pg_backend_pid()")).scalar()
    postgres_server.execute("SELECT pg_terminate_backend(%s)", pid)
    transaction.rollback()
    again = sessions.open()
    assert again.session.execute(text("SELECT 1")).scalar() == 1
    again.rollback()
