"""``start_many``: everything is checked first, and each chunk is all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

import durable
from durable import Durable, Workflow
from durable.errors import OptionError, PartlyStarted, PayloadError
from durable.store.connections import Connection
from durable.store.pool import Database
from tests.harness.store import Store, traced

COUNT = "SELECT count(*) FROM durable.workflow_runs"


@pytest.fixture
def fulfil(store_url: str) -> Iterator[Any]:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.durable_database_url = store_url  # goes before the environment
    app.conf.task_routes = {"shop.fulfil": "orders"}
    Durable(app)

    @app.task(shared=False, base=Workflow, name="shop.fulfil")
    def fulfil(order_id: str, cents: int = 0) -> str:
        return f"{order_id} for {cents}"

    @app.task(shared=False, name="shop.plain")
    def plain(order_id: str) -> None: ...

    yield fulfil
    app.durable.close()
    app.close()


def count(store: Store) -> int:
    row = store.conn.execute(COUNT).fetchone()
    assert row is not None
    return int(row[0])


def test_each_item_is_a_run_with_its_own_arguments(fulfil: Any, store: Store) -> None:
    items = [("o-1",), ["o-2", 5], {"order_id": "o-3", "cents": 7}]
    results = durable.start_many(fulfil, items)
    rows = [store.row(result.id) for result in results]
    assert [row["input"] for row in rows] == [
        '{"args":["o-1"],"kwargs":{}}',
        '{"args":["o-2",5],"kwargs":{}}',
        '{"args":[],"kwargs":{"order_id":"o-3","cents":7}}',
    ]
    assert {(row["status"], row["rung"], row["queue"]) for row in rows} == {
        ("pending", False, "orders")
    }
    assert "o-2" in str(rows[1]["message"])  # what Flower shows
    assert results[0].state == "PENDING"


def test_a_signatures_arguments_and_options_go_to_all(fulfil: Any, store: Store) -> None:
    signature = fulfil.s(9).set(queue="bulk", countdown=60, priority=3)
    for result in durable.start_many(signature, [("o-1",), ("o-2",)]):
        row = store.row(result.id)
        assert (row["queue"], row["status"]) == ("bulk", "sleeping")
        assert '",9]' in str(row["input"])
        assert '"priority": 3' in str(row["message"])


def test_items_may_come_from_a_generator_and_none_is_fine(fulfil: Any, store: Store) -> None:
    assert len(durable.start_many(fulfil, ((f"o-{n}",) for n in range(3)))) == 3
    assert durable.start_many(fulfil, []) == []
    assert count(store) == 3


def test_a_chunk_is_one_statement(fulfil: Any, store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        Database, "call", lambda _, query, *args, **kw: query(store.conn, *args, **kw)
    )
    with traced(store.conn) as counted:
        durable.start_many(fulfil, [(f"o-{n}",) for n in range(7)], chunk=3)
    assert counted.statements == 3


@pytest.mark.parametrize(
    ("bad", "error", "problem"),
    [
        ("o-9", OptionError, r"item 3 of start_many\(\) is 'o-9': give a tuple.*\('o-9',\)"),
        (("a", "b", "c"), TypeError, "item 3: .*takes from 1 to 2 positional arguments"),
        ({"colour": "red"}, TypeError, "item 3: .*colour"),
        (
            ({1, object()},),
            PayloadError,
            r"item 3: the arguments of 'shop.fulfil' cannot be stored",
        ),
        (("a\0",), PayloadError, "item 3: .*NUL"),
    ],
)
def test_an_item_that_cannot_be_is_found_before_anything_is_written(
    fulfil: Any, store: Store, bad: Any, error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        durable.start_many(fulfil, [("a",), ("b",), ("c",), bad], chunk=1)
    assert count(store) == 0


def test_what_is_no_workflow_is_refused(fulfil: Any) -> None:
    for given in (fulfil.app.tasks["shop.plain"], fulfil.app.tasks["shop.plain"].s(), "fulfil", 1):
        with pytest.raises(OptionError, match="give a workflow"):
            durable.start_many(given, [("o-1",)])


@pytest.mark.parametrize(
    "option", [{"idempotency_key": "k"}, {"task_id": "x"}, {"link": "x"}, {"transaction": 1}]
)
def test_options_that_are_of_one_run_are_refused(fulfil: Any, option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"cannot give {next(iter(option))}= to each"):
        durable.start_many(fulfil.s().set(**option), [("o-1",)])


def test_a_chunk_is_a_number_of_runs(fulfil: Any) -> None:
    for chunk in (0, -1, True, 1.5):
        with pytest.raises(OptionError, match="chunk="):
            durable.start_many(fulfil, [("o-1",)], chunk=chunk)


def test_of_a_chunk_that_fails_nothing_is_there_and_what_was_started_is_told(
    fulfil: Any, store: Store
) -> None:
    # The server takes no run of that name: one row of the second chunk is enough.
    store.conn.execute(
        "ALTER TABLE durable.workflow_runs ADD CONSTRAINT no_poison"
        " CHECK (input::text NOT LIKE '%poison%')"
    )
    try:
        items = [("o-1",), ("o-2",), ("o-3",), ("poison",), ("o-5",)]
        with pytest.raises(
            PartlyStarted, match=r"the first 2 of 5 runs of 'shop.fulfil'"
        ) as caught:
            durable.start_many(fulfil, items, chunk=2)
        assert [store.row(run.id)["input"] for run in caught.value.started] == [
            '{"args":["o-1"],"kwargs":{}}',
            '{"args":["o-2"],"kwargs":{}}',
        ]
        assert count(store) == 2
    finally:
        store.conn.execute("ALTER TABLE durable.workflow_runs DROP CONSTRAINT no_poison")


def test_a_chunk_whose_answer_was_lost_is_there_once(
    fulfil: Any, store: Store, monkeypatch: Any
) -> None:
    from durable.store import runs

    insert, calls = runs.insert_many, []

    def lose_the_first_answer(conn: Connection, rows: Any) -> None:
        insert(conn, rows)
        calls.append(len(rows))
        if len(calls) == 1:
            conn.close()
            raise conn.OperationalError("server closed the connection")  # type: ignore[attr-defined]

    monkeypatch.setattr(runs, "insert_many", lose_the_first_answer)
    durable.start_many(fulfil, [("o-1",), ("o-2",)])
    assert (calls, count(store)) == ([2, 2], 2)


def test_eager_runs_are_executed(fulfil: Any) -> None:
    fulfil.app.conf.task_always_eager = True
    assert [each.get() for each in durable.start_many(fulfil, [("o-1",), ("o-2", 5)])] == [
        "o-1 for 0",
        "o-2 for 5",
    ]
