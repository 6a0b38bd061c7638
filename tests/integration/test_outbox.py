"""Runs and events in somebody's transaction: there if and only if that is committed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from celery import Celery, chain, chord, group
from psycopg import sql
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import durable
from durable import Durable, Workflow
from durable.errors import MissingRights, OptionError, RunEnded, RunNotFound
from durable.store import dispatch, outbox, steps
from durable.store.dispatch import Code, Doorbell
from durable.store.pool import Database
from durable.store.runs import Park
from durable.worker.dispatcher import Dispatcher
from tests.harness import transactions
from tests.harness.names import unique_name
from tests.harness.postgres import PostgresServer
from tests.harness.store import Store, step_of
from tests.harness.transactions import Open

COUNT = "SELECT count(*) FROM durable.workflow_runs"


@pytest.fixture
def fulfil(store_url: str) -> Iterator[Any]:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.durable_database_url = store_url  # goes before the environment
    app.conf.task_default_queue = unique_name("queue")  # those of memory:// are the process's
    Durable(app)

    @app.task(shared=False, base=Workflow, name="shop.fulfil")
    def fulfil(order_id: str) -> None: ...

    @app.task(shared=False, name="shop.plain")
    def plain(order_id: str) -> None: ...

    yield fulfil
    app.durable.close()
    app.close()


@pytest.fixture(params=transactions.KINDS)
def opened(request: pytest.FixtureRequest, store_url: str) -> Iterator[Open]:
    with transactions.KINDS[request.param](store_url) as opened:
        yield opened


@pytest.fixture
def session(store_url: str) -> Iterator[Session]:
    with Session(transactions.engine(store_url, "postgresql+psycopg")) as session:
        yield session


def count(store: Store) -> int:
    row = store.conn.execute(COUNT).fetchone()
    assert row is not None
    return int(row[0])


def depth(fulfil: Any) -> int:
    """Messages that the caller has published."""
    with fulfil.app.connection_for_write() as connection:
        queue = fulfil.app.conf.task_default_queue
        return int(connection.default_channel.queue_declare(queue).message_count)


def due(store: Store) -> dispatch.Due:
    return dispatch.due(
        store.conn,
        store.namespace,
        names=["shop.fulfil"],
        idle_queues=[],
        batch=10,
        ring_again=20.0,
        late_error="{}",
    )


# --- runs


def test_a_run_is_there_when_the_transaction_is_committed(
    fulfil: Any, store: Store, opened: Open
) -> None:
    run = fulfil.apply_async(("o-42",), transaction=opened.given)
    assert (count(store), run.state) == (0, "PENDING")
    opened.commit()
    row = store.row(run.id)
    assert (row["status"], row["rung"], row["input"]) == (
        "pending",
        False,
        '{"args":["o-42"],"kwargs":{}}',
    )
    assert row["due_in"] <= 0
    assert depth(fulfil) == 0  # the dispatcher rings
    fulfil.delay("o-43")
    assert depth(fulfil) == 1


def test_a_run_is_not_there_when_the_transaction_is_rolled_back(
    fulfil: Any, store: Store, opened: Open
) -> None:
    fulfil.apply_async(("o-42",), transaction=opened.given)
    opened.rollback()
    assert count(store) == 0


def test_many_runs_and_a_keyed_one_in_one_transaction(
    fulfil: Any, store: Store, opened: Open
) -> None:
    options = {"transaction": opened.given}
    runs = durable.start_many(fulfil, [(f"o-{n}",) for n in range(5)], chunk=2, **options)
    keyed = fulfil.apply_async(("o-42",), idempotency_key="o-42", **options)
    again = fulfil.apply_async(("o-42",), idempotency_key="o-42", **options)
    assert (count(store), again.id) == (0, keyed.id)
    opened.commit()
    assert count(store) == 6
    assert [store.row(run.id)["input"] for run in runs][-1] == '{"args":["o-4"],"kwargs":{}}'


def test_an_error_in_a_savepoint_takes_only_its_own_runs(
    fulfil: Any, store: Store, session: Session
) -> None:
    kept = fulfil.apply_async(("o-1",), transaction=session)
    with session.begin_nested() as savepoint:
        fulfil.apply_async(("o-2",), transaction=session)
        savepoint.rollback()
    session.commit()
    assert (count(store), store.status(kept.id)) == (1, "pending")


def test_the_commit_notifies_the_dispatchers_and_not_before(
    fulfil: Any, store: Store, session: Session
) -> None:
    store.conn.execute("LISTEN durable")
    fulfil.apply_async(("o-42",), transaction=session)
    assert list(store.conn.notifies(timeout=0.05)) == []
    session.commit()
    [note] = store.conn.notifies(timeout=5, stop_after=1)
    assert note.payload == "default"


def test_a_delayed_start_waits_from_the_transaction_on(
    fulfil: Any, store: Store, session: Session
) -> None:
    run = fulfil.apply_async(("o-42",), countdown=60, transaction=session)
    session.commit()
    row = store.row(run.id)
    assert (row["status"], row["due_in"]) == ("sleeping", pytest.approx(60, abs=5))


def test_one_id_is_one_run_also_in_a_transaction(
    fulfil: Any, store: Store, session: Session
) -> None:
    options = {"task_id": str(uuid.uuid4()), "transaction": session}
    for _ in range(2):
        assert fulfil.apply_async(("o-42",), **options).id == options["task_id"]
    session.commit()
    assert count(store) == 1


def test_an_async_session_starts_runs_in_run_sync(
    fulfil: Any, store: Store, store_url: str
) -> None:
    async def main() -> Any:
        url = make_url(store_url).set(drivername="postgresql+psycopg_async")
        engine = create_async_engine(url)
        async with AsyncSession(engine) as session:
            with pytest.raises(OptionError, match=r"is asynchronous: use `await session.run_sync"):
                fulfil.apply_async(("o-42",), transaction=session)
            run = await session.run_sync(
                lambda inner: fulfil.apply_async(("o-42",), transaction=inner)
            )
            assert count(store) == 0
            await session.commit()
        await engine.dispose()
        return run

    assert store.status(asyncio.run(main()).id) == "pending"


# --- events


def test_an_event_is_sent_when_the_transaction_is_committed(
    fulfil: Any, store: Store, opened: Open
) -> None:
    run = fulfil.delay("o-42")
    claim = store.hold(run.id)
    store.park(claim, Park("waiting", "event approval"))
    event_id = run.send_event("approval", {"ok": True}, transaction=opened.given)
    assert run.events() == []
    opened.commit()
    [event] = run.events()  # also before the delivery
    assert (event.id, event.type, event.payload) == (event_id, "approval", '{"ok":true}')
    assert store.status(run.id) == "waiting"
    assert due(store).outbox
    assert outbox.deliver_next(store.conn, "default")
    [event] = run.events()
    assert (event.id, store.status(run.id)) == (event_id, "pending")
    assert not outbox.deliver_next(store.conn, "default")
    assert not due(store).outbox


def test_an_event_is_not_sent_when_the_transaction_is_rolled_back(
    fulfil: Any, store: Store, opened: Open
) -> None:
    run = fulfil.delay("o-42")
    run.send_event("approval", transaction=opened.given)
    opened.rollback()
    assert run.events() == []
    assert not outbox.deliver_next(store.conn, "default")


def test_an_event_for_a_run_of_the_same_transaction(
    fulfil: Any, store: Store, session: Session
) -> None:
    run = fulfil.apply_async(("o-42",), transaction=session)
    run.send_event("approval", transaction=session)
    session.commit()
    assert [event.type for event in run.events()] == ["approval"]


def test_an_open_transaction_keeps_nobody_from_the_run(
    fulfil: Any, store: Store, other: Store, store_url: str
) -> None:
    """Its worker's step, park and claim, the dispatcher, a direct sender, a cancel."""
    store.conn.execute("SET lock_timeout = '2s'")
    run = fulfil.delay("o-42")
    with Session(transactions.engine(store_url, "postgresql+psycopg")) as session:
        for number in range(3):
            options = {"idempotency_key": "k", "transaction": session} if number == 2 else {}
            run.send_event("approval", **{"transaction": session, **options})
        session.execute(text("SELECT durable.cancel(:run)"), {"run": run.id})

        claim = store.hold(run.id)
        steps.record(store.conn, step_of(claim))
        assert store.park(claim, Park("sleeping", "sleep", delay=0.0))
        assert [bell.id for bell in due(store).doorbells] == [run.id]  # not passed over as locked
        claim = store.hold(run.id)
        run.send_event("approval", idempotency_key="k")  # the same key, of somebody else
        assert store.finish(claim)
        again = fulfil.delay("o-43")
        again.send_event("approval", transaction=session)
        assert store.cancel(again.id) == {again.id: "canceled"}
        session.commit()


def test_the_first_event_of_a_key_counts(fulfil: Any, store: Store, session: Session) -> None:
    run = fulfil.delay("o-42")
    options: Any = {"idempotency_key": "k", "transaction": session}
    first = run.send_event("approval", 1, **options)
    assert run.send_event("approval", 2, **options) == first  # in the outbox
    session.commit()
    while outbox.deliver_next(store.conn, "default"):
        pass
    assert run.send_event("approval", 3, **options) == first  # delivered
    assert run.send_event("approval", 4, idempotency_key="k") == first
    assert [event.payload for event in run.events()] == ["1"]


def test_of_two_open_transactions_with_one_key_the_first_delivered_event_counts(
    fulfil: Any, store: Store, store_url: str
) -> None:
    run = fulfil.delay("o-42")
    with (
        Session(transactions.engine(store_url, "postgresql+psycopg")) as left,
        Session(transactions.engine(store_url, "postgresql+psycopg")) as right,
    ):
        for payload, session in enumerate((left, right)):
            run.send_event("approval", payload, idempotency_key="k", transaction=session)
        right.commit()
        left.commit()
    while outbox.deliver_next(store.conn, "default"):
        pass
    assert [event.payload for event in run.events()] == ["0"]


def test_an_event_that_comes_after_the_end_wakes_nobody(
    fulfil: Any, store: Store, session: Session
) -> None:
    run = fulfil.delay("o-42")
    run.send_event("approval", transaction=session)
    store.finish(store.hold(run.id))
    session.commit()
    assert outbox.deliver_next(store.conn, "default")
    assert store.status(run.id) == "succeeded"
    assert [event.consumed_at for event in run.events()] == [None]


def test_two_dispatchers_deliver_in_order(
    fulfil: Any, store: Store, other: Store, session: Session, background: Any
) -> None:
    run = fulfil.delay("o-42")
    for number in range(2):
        run.send_event("approval", number, transaction=session)
    session.commit()
    with store.conn.transaction():
        assert outbox.deliver_next(store.conn, "default")  # and is not committed yet
        second = background.blocked(other, outbox.deliver_next, other.conn, "default")
    assert second.result(5)
    while outbox.deliver_next(other.conn, "default"):
        pass
    assert [event.payload for event in run.events()] == ["0", "1"]


def test_a_rows_run_that_is_gone_stops_nobody(fulfil: Any, store: Store, session: Session) -> None:
    run = fulfil.delay("o-42")
    run.send_event("approval", transaction=session)
    session.commit()
    store.conn.execute("DELETE FROM durable.workflow_runs")
    assert outbox.deliver_next(store.conn, "default")
    assert not outbox.deliver_next(store.conn, "default")


def dispatcher_of(database: Database, ring: Callable[[Doorbell], object]) -> Dispatcher:
    return Dispatcher(
        database,
        SimpleNamespace(ring=lambda bell, _: ring(bell)),  # type: ignore[arg-type]
        namespace="default",
        interval=1.0,
        listen=False,
        batch=10,
        ring_again=20.0,
        directory=list,
        own=Code(["shop.fulfil"]),
        own_id="",
        own_queue=SimpleNamespace(refused=False),  # type: ignore[arg-type]
        direct=False,
        late_error="{}",
    )


def test_what_was_sent_without_a_worker_is_there_when_its_run_is_rung(
    fulfil: Any, store: Store, session: Session, database: Database
) -> None:
    """Else a wait whose time has passed meanwhile would miss an event that came in time."""
    run = fulfil.delay("o-42")
    store.park(store.hold(run.id), Park("waiting", "event approval", delay=0.0))
    run.send_event("approval", transaction=session)
    session.commit()
    there: list[int] = []

    def ring(_: Doorbell) -> None:
        row = store.conn.execute("SELECT count(*) FROM durable.workflow_events").fetchone()
        there.extend(row or ())

    dispatcher = dispatcher_of(database, ring)
    dispatcher.tick()
    dispatcher.recover()
    assert there == [1]


def test_what_cannot_be_delivered_keeps_nothing_behind_it_waiting(
    fulfil: Any, store: Store, session: Session, database: Database
) -> None:
    run = fulfil.delay("o-42")
    for payload in (*["poison"] * 12, "meat"):  # more than a batch
        run.send_event("approval", payload, transaction=session)
    session.commit()
    store.conn.execute(
        "ALTER TABLE durable.workflow_events ADD CONSTRAINT no_poison"
        " CHECK (payload::text <> '\"poison\"')"
    )
    rung: list[str] = []
    dispatcher = dispatcher_of(database, lambda bell: rung.append(bell.id))
    try:
        store.set(run.id, rung="false", available_at="now()")
        dispatcher.tick()
        waiting = store.conn.execute("SELECT payload FROM durable.outbox").fetchall()
        delivered = store.conn.execute("SELECT payload FROM durable.workflow_events").fetchall()
        assert (waiting, delivered, rung) == ([('"poison"',)] * 12, [('"meat"',)], [run.id])
    finally:
        dispatcher.recover()
        store.conn.execute("ALTER TABLE durable.workflow_events DROP CONSTRAINT no_poison")


def test_an_events_key_is_checked_by_the_sender(fulfil: Any, session: Session) -> None:
    run = fulfil.delay("o-42")
    for options in ({}, {"transaction": session}):
        with pytest.raises(OptionError, match=r"idempotency_key='x.*1 to 255"):
            run.send_event("approval", idempotency_key="x" * 3000, **options)


def test_what_is_sent_to_no_run_leaves_the_transaction_usable(
    fulfil: Any, store: Store, opened: Open
) -> None:
    ended = fulfil.delay("o-1")
    store.finish(store.hold(ended.id))
    unknown = fulfil.AsyncResult(str(uuid.uuid4()))
    with pytest.raises(RunEnded, match=r"has ended \(succeeded\): it takes no event 'approval'"):
        ended.send_event("approval", transaction=opened.given)
    with pytest.raises(RunNotFound, match="there is no run"):
        unknown.send_event("approval", transaction=opened.given)
    fulfil.apply_async(("o-2",), transaction=opened.given)
    opened.commit()
    assert count(store) == 2


# --- what is refused


@pytest.mark.parametrize("kind", ["psycopg", "psycopg2", "session", "connection", "django"])
def test_an_aborted_transaction_is_refused(fulfil: Any, store_url: str, kind: str) -> None:
    with transactions.KINDS[kind](store_url) as opened:
        break_it = getattr(opened.given, "execute", None) or opened.given.cursor().execute
        with pytest.raises(Exception, match="division by zero"):
            break_it(text("SELECT 1/0") if kind in {"session", "connection"} else "SELECT 1/0")
        with pytest.raises(Exception, match=r"aborted|roll it back|rolled back") as caught:
            fulfil.apply_async(("o-42",), transaction=opened.given)
        if kind != "django":  # whose own error it is, outside atomic()
            assert isinstance(caught.value, OptionError)
        opened.rollback()
        fulfil.apply_async(("o-42",), transaction=opened.given)


@pytest.mark.parametrize("kind", ["psycopg", "psycopg2", "connection"])
def test_a_closed_transaction_is_refused(fulfil: Any, store_url: str, kind: str) -> None:
    with transactions.KINDS[kind](store_url) as opened:
        opened.given.close()
        with pytest.raises(OptionError, match=r"transaction=.* is closed"):
            fulfil.apply_async(("o-42",), transaction=opened.given)


def test_a_connection_that_commits_each_statement_is_refused(fulfil: Any, store_url: str) -> None:
    with psycopg.connect(store_url, autocommit=True) as conn:
        with pytest.raises(OptionError, match=r"commits each statement at once: use `with"):
            fulfil.apply_async(("o-42",), transaction=conn)
        with conn.transaction():
            fulfil.apply_async(("o-42",), transaction=conn)
    engine = transactions.engine(store_url, "postgresql+psycopg", isolation_level="AUTOCOMMIT")
    with engine.connect() as conn, pytest.raises(OptionError, match="commits each statement"):
        fulfil.apply_async(("o-42",), transaction=conn)
    with transactions.django(store_url) as opened:
        opened.given.set_autocommit(True)
        with pytest.raises(OptionError, match=r"use `with transaction.atomic\(\):`"):
            fulfil.apply_async(("o-42",), transaction=opened.given)


def test_other_things_than_transactions_are_refused(fulfil: Any, store_url: str) -> None:
    accepted = "a SQLAlchemy Session or Connection"
    for given in (object(), True, store_url):
        with pytest.raises(OptionError, match=f"give {accepted}"):
            fulfil.apply_async(("o-42",), transaction=given)
    with pytest.raises(OptionError, match="is an engine: give a Session or Connection"):
        fulfil.apply_async(("o-42",), transaction=create_engine("sqlite://"))
    with psycopg.connect(store_url) as conn, pytest.raises(OptionError, match="is a cursor"):
        fulfil.apply_async(("o-42",), transaction=conn.cursor())


def test_other_drivers_are_refused(fulfil: Any, store_url: str) -> None:
    with (
        Session(create_engine("sqlite://")) as session,
        pytest.raises(
            OptionError, match=r"driver is sqlite\+pysqlite, and a run can be started by"
        ),
    ):
        fulfil.apply_async(("o-42",), transaction=session)
    with Session() as unbound, pytest.raises(OptionError, match="cannot be used"):
        fulfil.apply_async(("o-42",), transaction=unbound)


@pytest.mark.parametrize("migrated", [True, False])
def test_a_session_on_another_database_is_refused(
    fulfil: Any, postgres_server: PostgresServer, migrated: bool
) -> None:
    url = postgres_server.create_database(migrated=migrated)
    problem = r"is on database '.*'" + ("" if migrated else ", which has no schema 'durable'")
    with (
        transactions.session(url, "postgresql+psycopg") as opened,
        pytest.raises(OptionError, match=problem + r", and runs are kept in another one, '.*'"),
    ):
        fulfil.apply_async(("o-42",), transaction=opened.given)
    postgres_server.drop_database(url)


def test_a_role_without_rights_is_told_so(
    fulfil: Any, postgres_server: PostgresServer, store_url: str
) -> None:
    role = unique_name("role")
    postgres_server.execute(f"CREATE ROLE {role} LOGIN")
    try:
        with psycopg.connect(store_url) as conn:
            conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            with pytest.raises(MissingRights, match="durable migrate --role"):
                fulfil.apply_async(("o-42",), transaction=conn)
    finally:
        postgres_server.execute(f"DROP ROLE {role}")


def test_plain_and_unknown_tasks_are_refused(fulfil: Any, session: Session) -> None:
    app = fulfil.app
    with pytest.raises(OptionError, match=r"transaction= is for workflows.*is a plain task"):
        app.tasks["shop.plain"].apply_async(("o-42",), transaction=session)
    with pytest.raises(OptionError, match=r"idempotency_key= is for workflows.*not registered"):
        app.send_task("shop.unknown", idempotency_key="o-42")


def test_a_canvas_is_refused(fulfil: Any, session: Session) -> None:
    keyed = fulfil.si("o-42").set(idempotency_key="o-42")
    with pytest.raises(OptionError, match=r"cannot go together.*In a canvas"):
        chain(keyed, fulfil.si("o-43")).apply_async()
    with pytest.raises(OptionError, match="idempotency_key= in a canvas"):
        chain(fulfil.si("o-43"), keyed).apply_async()
    with pytest.raises(OptionError, match="idempotency_key= in a canvas"):
        fulfil.apply_async(("o-41",), link=keyed)


def test_a_group_and_a_chain_go_into_the_transaction(
    fulfil: Any, session: Session, store: Store
) -> None:
    group([fulfil.si("o-42"), fulfil.si("o-43")]).apply_async(transaction=session)
    chain(fulfil.si("o-44"), fulfil.si("o-45")).apply_async(transaction=session)
    count = "SELECT count(*) FROM durable.workflow_runs"
    assert store.conn.execute(count).fetchone() == (0,)
    session.commit()
    assert store.conn.execute(count).fetchone() == (3,)


def test_a_chord_is_refused_in_a_transaction(fulfil: Any, session: Session) -> None:
    members = chord([fulfil.si("o-42"), fulfil.si("o-43")], fulfil.si("o-44"))
    with pytest.raises(OptionError, match=r"transaction= for a chord"):
        members.apply_async(transaction=session)


def test_with_accept_only_a_child_is_started_without_its_tie(
    fulfil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fulfil.app.conf.durable_accept_only = True
    fulfil.apply_async(("o-42",), on_parent_cancel="cancel")
    assert "shop.fulfil is started without on_parent_cancel='cancel'" in caplog.text
    with pytest.raises(OptionError, match=r"'shop\.plain' is a plain task"):
        fulfil.app.tasks["shop.plain"].apply_async(("o-42",), on_parent_cancel="cancel")


def test_with_accept_only_nothing_is_promised(fulfil: Any, session: Session) -> None:
    fulfil.app.conf.durable_accept_only = True
    for options in ({"transaction": session}, {"idempotency_key": "o-42"}):
        with pytest.raises(OptionError, match="durable_accept_only"):
            fulfil.apply_async(("o-42",), **options)
    with pytest.raises(OptionError, match="durable_accept_only"):
        durable.start_many(fulfil, [("o-42",)])
