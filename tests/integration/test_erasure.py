"""Erasure: what a run held of people is gone, that it took place is not."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from celery import Celery
from cryptography.fernet import Fernet

from durable import Durable
from durable.codec import Codec
from durable.encryption import Keyring
from durable.errors import NotAllowed, OptionError, RunErased, RunNotFound
from durable.failures import decode_failure
from durable.store import events, migrate, runs, steps
from durable.store.events import NewEvent
from tests.harness.store import Background, Store, step_of

DATA = '"Ada Lovelace"'
KEY = Fernet.generate_key().decode()


@pytest.fixture
def app(store_url: str) -> Iterator[Celery]:
    app = Celery("erasure", broker="memory://", set_as_current=False)
    app.conf.durable_database_url = store_url
    Durable(app)
    yield app
    app.durable.close()


@pytest.fixture
def durable(app: Celery) -> Durable:
    durable: Durable = app.durable
    return durable


def held(store: Store, run_id: str) -> str:
    """All that Postgres has of a run, its steps and its events."""
    tables = {"workflow_runs": "id", "step_attempts": "workflow_run_id"}
    tables["workflow_events"] = "workflow_run_id"
    found = [
        store.conn.execute(
            f"SELECT t::text FROM durable.{table} t WHERE {column} = %s".encode(), (run_id,)
        ).fetchall()
        for table, column in tables.items()
    ]
    return "\n".join(row[0] for rows in found for row in rows)


def filled(store: Store, *, status: str = "succeeded", **options: Any) -> str:
    """Store a run that has the data in every column, and end it; its id."""
    options = {
        "input": f'{{"args":[{DATA}],"kwargs":{{}}}}',
        "message": f'{{"argsrepr":{DATA},"link":[{DATA}],"headers":{{"to":{DATA}}}}}',
        **options,
    }
    claim = store.running(**options)
    steps.record(store.conn, step_of(claim, output=DATA))
    error = f'{{"type":"x","message":{DATA}}}'
    about = f'{{"reason":{DATA}}}'
    failed = step_of(claim, 1, status="failed", error=error, context=about)
    steps.record(store.conn, failed)
    runs.set_progress(store.conn, claim.id, claim.attempt, DATA)
    new = NewEvent(str(uuid.uuid4()), claim.id, store.namespace, "pin", DATA, DATA)
    events.send(store.conn, new)
    store.conn.execute("UPDATE durable.workflow_events SET error = %s", (DATA,))
    outcome = {"output": DATA} if status == "succeeded" else {"error": error}
    assert store.finish(claim, status, **outcome, reason=DATA)
    return claim.id


def test_everything_of_a_user_goes_and_the_skeleton_stays(
    app: Celery, durable: Durable, store: Store
) -> None:
    run_id = filled(store, subject="customer-Ada")
    before = store.row(run_id)
    assert held(store, run_id).count("Ada") > 10
    assert durable.erase(run_id, reason="request 7", actor="dpo") == [run_id]
    assert "Ada" not in held(store, run_id)
    after = store.row(run_id)
    for kept in ("id", "workflow_name", "status", "created_at", "started_at", "completed_at"):
        assert after[kept] == before[kept]
    assert after["erased_at"] is not None
    assert store.steps(run_id) == [(0, "charge", 1, "succeeded", 0), (1, "charge", 1, "failed", 0)]
    [action] = durable.control.actions(run_id)
    assert (action.action, action.actor, action.reason) == ("erase", "dpo", "request 7")


@pytest.mark.parametrize(("status", "state"), [("succeeded", "SUCCESS"), ("failed", "FAILURE")])
def test_the_result_of_an_erased_run_is_an_error_that_says_so(
    app: Celery, durable: Durable, store: Store, status: str, state: str
) -> None:
    run_id = filled(store, status=status)
    durable.erase(run_id)
    result = app.AsyncResult(run_id)
    with pytest.raises(RunErased, match=f"run {run_id} has ended, and its data was erased since"):
        result.get(timeout=5)
    assert isinstance(result.get(timeout=5, propagate=False), RunErased)
    assert (result.state, result.ready()) == (state, True)
    row = result.run()
    assert (row.input, row.output, row.error, row.erased_at is None) == (None, None, None, False)


def test_all_runs_of_a_subject_go_with_their_children_and_no_others(
    durable: Durable, store: Store
) -> None:
    first, second = (filled(store, subject="customer-42") for _ in range(2))
    child = filled(store, parent=first)
    grandchild = filled(store, parent=child)
    others = [
        filled(store),
        filled(store, subject="customer-43"),
        filled(Store(store.conn, "theirs"), subject="customer-42"),
    ]
    assert set(durable.erase(subject="customer-42")) == {first, second, child, grandchild}
    assert all("Ada" not in held(store, run) for run in (first, second, child, grandchild))
    assert all("Ada" in held(store, run) for run in others)
    with pytest.raises(RunNotFound, match="no run of subject 'customer-42' in namespace 'default'"):
        durable.erase(subject="customer-42")
    assert durable.erase(first) == []  # again: there is nothing left to do


@pytest.mark.parametrize("where", ["itself", "its child"])
def test_a_run_that_has_not_ended_is_refused_and_nothing_is_erased(
    durable: Durable, store: Store, where: str
) -> None:
    if where == "itself":
        run_id = open_run = store.running().id
    else:
        run_id = filled(store)
        open_run = store.start(parent=run_id)
    with pytest.raises(NotAllowed) as caught:
        durable.erase(run_id)
    assert f"run {open_run} (shop.order, {store.status(open_run)}) has not ended" in str(
        caught.value
    )
    assert "Cancel first" in str(caught.value)
    assert store.row(run_id)["erased_at"] is None
    store.cancel(open_run)
    if where == "its child":
        assert set(durable.erase(run_id)) == {run_id, open_run}


def test_a_run_whose_callbacks_are_not_delivered_is_refused_without_force(
    durable: Durable, store: Store
) -> None:
    run_id = filled(store, tail=True)
    with pytest.raises(NotAllowed, match="Celery has still to deliver"):
        durable.erase(run_id)
    assert durable.erase(run_id, force=True) == [run_id]
    assert store.row(run_id)["due_in"] is None
    assert store.claim(run_id) is None


def test_an_erased_run_is_not_restarted(durable: Durable, store: Store) -> None:
    run_id = filled(store, status="failed")
    durable.erase(run_id)
    with pytest.raises(NotAllowed, match=f"the data of run {run_id} was erased"):
        durable.control.restart(run_id)
    assert store.status(run_id) == "failed"


def test_neither_a_run_nor_a_subject_or_an_unknown_one_is_refused(durable: Durable) -> None:
    with pytest.raises(OptionError):
        durable.erase()
    with pytest.raises(OptionError):
        durable.erase(str(uuid.uuid4()), subject="x")
    with pytest.raises(RunNotFound, match="which is a UUID"):
        durable.erase("o-42")
    with pytest.raises(RunNotFound, match="there is no run"):
        durable.erase(str(uuid.uuid4()))


# --- what parents have of it


def test_the_outcome_in_the_history_of_a_parent_goes_too(durable: Durable, store: Store) -> None:
    parent = store.running()
    child = filled(store, parent=parent.id, reports=True)
    with pytest.raises(NotAllowed, match=f"run {parent.id} .running. has started run {child}"):
        durable.erase(child)
    assert "Ada" in held(store, parent.id)
    store.finish(parent)
    durable.erase(child)
    assert "Ada" not in held(store, parent.id)
    [row] = steps.of_run(store.conn, parent.id, "default")
    error = decode_failure(row.error or "", Codec())
    assert (row.kind, row.status, type(error)) == ("result", "failed", RunErased)
    assert child in str(error)


@pytest.mark.parametrize("codec", [Codec(), Codec(keyring=Keyring([KEY]))], ids=["plain", "sealed"])
def test_an_item_goes_out_of_the_gathered_outcomes(
    durable: Durable, store: Store, codec: Codec
) -> None:
    durable.__dict__["codec"] = codec
    parent = store.running()
    fan_out = str(uuid.uuid4())
    items = [
        filled(store, parent=parent.id, fan_out=fan_out, fan_index=index) for index in range(3)
    ]
    values = [codec.encode(f"{name}'s", "x") for name in ("Ada", "Bob", "Cy")]
    place = step_of(parent, 0, "greet", output=f"[{', '.join(values)}]")
    context = json.dumps({"fan_out": fan_out, "items": 3})
    steps.record(store.conn, place._replace(kind="fan_out", context=context))
    store.finish(parent)
    durable.erase(items[0])
    durable.erase(items[2])
    [row] = steps.of_run(store.conn, parent.id, "default")
    assert codec.decode(row.output or "") == [None, "Bob's", None]
    failed = json.loads(codec.open(row.error or ""))
    assert [each["about"]["item"] for each in failed] == [0, 2]
    errors = [decode_failure(json.dumps(each["error"]), codec) for each in failed]
    assert all(isinstance(error, RunErased) for error in errors)
    assert "Ada" not in held(store, parent.id)


# --- races, forced


def test_a_child_that_starts_while_its_parent_is_found_is_found_too(
    durable: Durable, store: Store, other: Store, background: Background, store_url: str
) -> None:
    """The first look has the parent running and no child; it has to look again."""
    parent = store.running()
    other.conn.execute("BEGIN")
    child = other.start(parent=parent.id)
    other.cancel(child)
    other.finish(parent)
    with psycopg.connect(store_url, autocommit=True) as conn:
        waiting = Store(conn)
        durable.database._connections.give_back(conn)  # the one that the erasure takes
        done = background.blocked(waiting, durable.erase, parent.id)
        other.conn.execute("COMMIT")
        assert set(done.result(10)) == {parent.id, child}


def test_a_restart_that_comes_second_finds_the_run_erased(
    durable: Durable, store: Store, other: Store, background: Background
) -> None:
    run_id = filled(store, status="failed")
    other.conn.execute("BEGIN")
    other.conn.execute(
        "UPDATE durable.workflow_runs SET erased_at = now(), input = NULL WHERE id = %s", (run_id,)
    )
    restart = background.call(durable.control.restart, run_id)
    other.conn.execute("COMMIT")
    with pytest.raises(NotAllowed, match="was erased"):
        restart.result(10)
    assert store.status(run_id) == "failed"


# --- the migration


OF_0002 = """
INSERT INTO durable.workflow_runs
       (id, workflow_name, status, input, message, output, available_at, completed_at)
VALUES ('{ended}', 'shop.order', 'succeeded', '{{"args":["Ada"],"kwargs":{{}}}}', '{{}}', '"Ada"',
        'infinity', now()),
       ('{open}', 'shop.order', 'pending', '{{"args":[],"kwargs":{{}}}}', '{{}}', NULL,
        now(), NULL)
"""


def test_rows_of_the_schema_before_are_finished_and_erased(empty_database_url: str) -> None:
    from alembic import command

    engine = sa.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(empty_database_url),
        poolclass=sa.NullPool,
    )
    config = migrate._alembic_config()
    with engine.begin() as connection:
        migrate._create_schema(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
    ended, open_run = str(uuid.uuid4()), str(uuid.uuid4())
    with psycopg.connect(empty_database_url, autocommit=True) as conn:
        conn.execute(OF_0002.format(ended=ended, open=open_run).encode())
    app = Celery("erasure", broker="memory://", set_as_current=False)
    app.conf.durable_database_url = empty_database_url
    durable = Durable(app)
    try:
        assert durable.erase(ended) == [ended]
        with durable.database.connect() as conn:
            store = Store(conn)
            assert "Ada" not in held(store, ended)
            assert store.finish(store.hold(open_run))
        assert set(durable.erase(open_run)) == {open_run}
    finally:
        durable.close()
