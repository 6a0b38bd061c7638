"""Starting, sending and canceling in SQL, as strict as in Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Json

from durable.store import dispatch, outbox
from durable.store.migrate import role_sql
from tests.harness.names import unique_name
from tests.harness.postgres import PostgresServer
from tests.harness.store import Store

UNKNOWN = "00000000-0000-4000-8000-000000000000"


def call(conn: Any, statement: str, *params: object) -> Any:
    row = conn.execute(f"SELECT {statement}".encode(), params).fetchone()
    assert row is not None
    return row[0]


def enqueue(store: Store, more: str = "", *params: object) -> str:
    return str(call(store.conn, f"durable.enqueue('shop.order'{more})", *params))


def due(store: Store, **options: Any) -> dispatch.Due:
    given = {"names": ["shop.order"], "idle_queues": [], "batch": 10, "ring_again": 20.0}
    given |= {"own": dispatch.Code(["shop.order"]), "late_error": "{}"}
    return dispatch.due(store.conn, store.namespace, **{**given, **options})


def test_a_run_is_as_one_that_python_has_started(store: Store) -> None:
    row = store.row(enqueue(store))
    expected = {"status": "pending", "rung": False, "namespace_id": "default", "tail": False}
    assert {key: row[key] for key in expected} == expected
    assert (row["input"], row["message"]) == ('{"args":[],"kwargs":{}}', None)
    run_id = enqueue(
        store,
        ", '[1, {\"b\": 1e16, \"a\": 2}]', '{\"x\": null}', queue => 'slow', priority => 3,"
        " deadline => '1 hour', expires => '10 minutes'",
    )
    row = store.row(run_id)
    assert row["input"] == '{"args":[1, {"b": 1e16, "a": 2}],"kwargs":{"x": null}}'
    assert (row["queue"], row["config"]) == ("slow", {"priority": 3})
    times = "(deadline_at - created_at)::text || ' ' || (expires_at - created_at)::text"
    assert call(store.conn, f"{times} FROM durable.workflow_runs WHERE id = %s", run_id) == (
        "01:00:00 00:10:00"
    )


def test_a_delay_is_an_interval_or_a_time(store: Store) -> None:
    for more in (", countdown => '1 minute'", ", eta => now() + interval '1 minute'"):
        row = store.row(enqueue(store, more))
        assert (row["status"], row["due_in"]) == ("sleeping", pytest.approx(60, abs=5))
    past = store.row(enqueue(store, ", eta => now() - interval '1 day'"))
    assert (past["status"], past["due_in"] <= 0) == ("pending", True)


def test_a_dispatcher_that_lacks_the_task_leaves_the_run_to_one_that_has_it(store: Store) -> None:
    run_id = enqueue(store)
    assert due(store, own=dispatch.Code()).doorbells == []
    [doorbell] = due(store).doorbells
    assert (doorbell.id, doorbell.message) == (run_id, None)


def test_the_transaction_notifies_at_its_commit(store: Store, other: Store) -> None:
    store.conn.execute("LISTEN durable")
    with other.conn.transaction():
        enqueue(other)
        assert list(store.conn.notifies(timeout=0.05)) == []
    [note] = store.conn.notifies(timeout=5, stop_after=1)
    assert note.payload == "default"


def test_a_key_starts_one_run(store: Store) -> None:
    first = enqueue(store, ", '[1]', idempotency_key => 'k'")
    assert enqueue(store, ", '[ 1 ]', idempotency_key => 'k'") == first
    with pytest.raises(psycopg.Error, match="with other arguments") as caught:
        enqueue(store, ", '[2]', idempotency_key => 'k'")
    assert (caught.value.sqlstate, f"belongs to run {first}" in str(caught.value)) == (
        "DU003",
        True,
    )
    store.finish(store.hold(first))
    again = enqueue(store, ", '[2]', idempotency_key => 'k', idempotency_reuse => 'after_end'")
    assert again != first


def test_an_event_is_delivered_after_the_commit(store: Store, other: Store) -> None:
    run_id = enqueue(store)
    with other.conn.transaction():
        event_id = call(other.conn, "durable.send_event(%s, 'approval', '{\"ok\": true}')", run_id)
        assert not outbox.deliver_next(store.conn, "default")
    assert outbox.deliver_next(store.conn, "default")
    rows = store.conn.execute(
        "SELECT id, event_type, payload FROM durable.workflow_events"
    ).fetchall()
    assert rows == [(event_id, "approval", '{"ok": true}')]
    assert store.row(run_id)["wake"] == 1


def test_of_events_with_one_key_the_first_counts(store: Store) -> None:
    run_id = enqueue(store)
    send = "durable.send_event(%s, 'approval', idempotency_key => 'k')"
    first = call(store.conn, send, run_id)
    assert call(store.conn, send, run_id) == first
    outbox.deliver_next(store.conn, "default")
    assert call(store.conn, send, run_id) == first
    assert not outbox.deliver_next(store.conn, "default")


def test_a_cancel_is_done_after_the_commit(store: Store) -> None:
    run_id = enqueue(store)
    assert call(store.conn, "durable.cancel(%s, 'out of stock')", run_id) is True
    assert store.status(run_id) == "pending"
    assert due(store).outbox
    assert outbox.deliver_next(store.conn, "default")
    row = store.row(run_id)
    assert (row["status"], row["reason"]) == ("canceled", "out of stock")
    assert call(store.conn, "durable.cancel(%s)", run_id) is False
    assert not outbox.deliver_next(store.conn, "default")


def test_the_namespace_is_given_or_set(store: Store) -> None:
    given = call(store.conn, "durable.enqueue('shop.order', namespace => 'tenant')")
    with store.conn.transaction():
        store.conn.execute("SET LOCAL durable.namespace = 'tenant'")
        of_setting = enqueue(store)
        assert call(store.conn, "durable.cancel(%s)", given) is True
    assert [store.row(str(each))["namespace_id"] for each in (given, of_setting)] == ["tenant"] * 2
    assert store.row(enqueue(store))["namespace_id"] == "default"


@pytest.mark.parametrize(
    ("statement", "state", "problem"),
    [
        ("enqueue(NULL)", "22023", "workflow is NULL"),
        ("enqueue('  ')", "22023", "workflow is '  '"),
        (r"enqueue(E'a\nb')", "22023", "1 to 255 printable"),
        ("enqueue(repeat('x', 256))", "22023", "1 to 255 printable"),
        ("enqueue('w', NULL)", "22023", "args is NULL"),
        ("enqueue('w', '{}')", "22023", "args is a JSON object, and has to be an array"),
        ("enqueue('w', '1')", "22023", "args is a JSON number"),
        ("enqueue('w', '[]', '[]')", "22023", "kwargs is a JSON array, and has to be an object"),
        (r"""enqueue('w', '["\u0000"]')""", "22023", "args cannot be stored: .*NUL"),
        (r"""enqueue('w', '["\ud800"]')""", "22023", "args cannot be stored"),
        (r"""enqueue('w', '[]', '{"a": "\u0000"}')""", "22023", "kwargs cannot be stored"),
        ("enqueue('w', json_build_array(repeat('x', 1048577)))", "54000", "more than the limit"),
        ("enqueue('w', (repeat('[', 200) || repeat(']', 200))::json)", "54000", "nested more"),
        ("enqueue('w', queue => '')", "22023", "queue is ''"),
        ("enqueue('w', countdown => '-1 s')", "22023", "countdown is -00:00:01.*zero to a hundred"),
        ("enqueue('w', countdown => '101 years')", "22023", "countdown is 101 years"),
        ("enqueue('w', deadline => '-1 s')", "22023", "deadline is"),
        ("enqueue('w', expires => '1000 years')", "22023", "expires is"),
        ("enqueue('w', eta => 'infinity')", "22023", "eta is infinity"),
        ("enqueue('w', eta => now(), countdown => '1 s')", "22023", "both countdown and eta"),
        ("enqueue('w', priority => 256)", "22023", "priority is 256"),
        ("enqueue('w', namespace => ' ')", "22023", "namespace is ' '"),
        ("enqueue('w', idempotency_key => '')", "22023", "idempotency_key is ''"),
        ("enqueue('w', idempotency_key => 'k', idempotency_ttl => NULL)", "22023", "ttl is NULL"),
        ("enqueue('w', idempotency_key => 'k', idempotency_reuse => 'x')", "22023", "after_end"),
        (f"send_event('{UNKNOWN}', 'e')", "DU001", f"there is no run {UNKNOWN}.*HINT"),
        ("send_event(NULL, 'e')", "DU001", "there is no run NULL"),
        (f"send_event('{UNKNOWN}', '')", "22023", "type is ''"),
        (f"send_event('{UNKNOWN}', 'e', NULL)", "22023", "payload is NULL"),
        (rf"""send_event('{UNKNOWN}', 'e', '"\u0000"')""", "22023", "payload cannot be stored"),
        (f"cancel('{UNKNOWN}')", "DU001", "there is no run"),
        (f"cancel('{UNKNOWN}', '')", "22023", "reason is ''"),
    ],
)
def test_what_is_wrong_is_refused(store: Store, statement: str, state: str, problem: str) -> None:
    with pytest.raises(psycopg.Error, match=f"(?s){problem}") as caught:
        call(store.conn, f"durable.{statement}")
    assert caught.value.sqlstate == state
    for table in ("workflow_runs", "outbox", "idempotency_keys"):
        assert call(store.conn, f"count(*) FROM durable.{table}") == 0


def test_other_peoples_runs_and_ended_ones_are_refused(store: Store) -> None:
    foreign = call(store.conn, "durable.enqueue('shop.order', namespace => 'tenant')")
    for function in ("cancel(%s)", "send_event(%s, 'e')"):
        with pytest.raises(
            psycopg.Error, match=r"(?s)to namespace 'tenant', not to 'default'.*HINT"
        ):
            call(store.conn, f"durable.{function}", foreign)
    ended = store.start()
    store.finish(store.hold(ended))
    with pytest.raises(
        psycopg.Error, match=r"has ended \(succeeded\), it takes no event 'e'"
    ) as no:
        call(store.conn, "durable.send_event(%s, 'e')", ended)
    assert no.value.sqlstate == "DU002"


def test_the_limit_of_size_is_a_setting_of_the_database(store: Store) -> None:
    with store.conn.transaction():
        store.conn.execute("SET LOCAL durable.max_payload_bytes = '100'")
        with pytest.raises(psycopg.Error, match="more than the limit of 100"):
            enqueue(store, ", %s", Json(["x" * 100]))


@pytest.fixture
def role(postgres_server: PostgresServer, store_url: str) -> Iterator[str]:
    name = unique_name("role")
    postgres_server.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    with psycopg.connect(store_url, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
    postgres_server.execute(f"DROP ROLE {name}")


def test_the_rights_that_migrate_prints_are_enough(store: Store, role: str) -> None:
    store.conn.execute(role_sql(role).encode())
    with store.conn.transaction():
        store.conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
        run_id = enqueue(store, ", idempotency_key => 'k'")
        call(store.conn, "durable.send_event(%s, 'e')", run_id)
        call(store.conn, "durable.cancel(%s)", run_id)
        while outbox.deliver_next(store.conn, "default"):
            pass
    assert store.status(run_id) == "canceled"
