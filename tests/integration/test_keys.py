"""Idempotency keys: one run for each, whoever comes at the same time, and until when."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import psycopg
import pytest
from celery import Celery
from cryptography.fernet import Fernet
from sqlalchemy.orm import Session

from durable import Durable, Workflow
from durable.errors import IdempotencyConflict, OptionError
from durable.store import runs
from durable.store.runs import Key, NewRun
from tests.harness import transactions
from tests.harness.store import Background, Store

INPUT = '{"args":[],"kwargs":{}}'


@pytest.fixture
def fulfil(store_url: str) -> Iterator[Any]:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.durable_database_url = store_url  # goes before the environment
    app.conf.durable_pool_size = 50
    Durable(app)

    @app.task(shared=False, base=Workflow, name="shop.fulfil")
    def fulfil(*args: object, **kwargs: object) -> None: ...

    @app.task(shared=False, base=Workflow, name="shop.refund")
    def refund(*args: object) -> None: ...

    @app.task(shared=False, base=Workflow, name="shop.refund_to")
    def refund_to(email: str, address: object, cents: int) -> None: ...

    yield fulfil
    app.durable.close()
    app.close()


def keyed(fulfil: Any, *args: object, **options: Any) -> Any:
    return fulfil.apply_async(args, **{"idempotency_key": "o-42", **options})


def take(store: Store, run_id: str, plain: str = INPUT, **key: Any) -> tuple[str, bool]:
    run = NewRun(run_id, store.namespace, "shop.fulfil", plain, "{}")
    return runs.insert_keyed(
        store.conn,
        run,
        Key(**{"key": "k", "plain": plain, "ttl": 60.0, "reuse": "after_ttl", **key}),
    )


def test_fifty_callers_at_once_start_one_run(fulfil: Any, store: Store) -> None:
    barrier = Barrier(50)

    def start(_: int) -> str:
        barrier.wait()
        return str(keyed(fulfil, "o-42").id)

    with ThreadPoolExecutor(50) as threads:
        ids = set(threads.map(start, range(50)))
    row = store.conn.execute("SELECT count(*), min(id::text) FROM durable.workflow_runs").fetchone()
    assert row is not None
    assert (ids, row[0]) == ({row[1]}, 1)


FIRST, SECOND = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"


def test_the_second_waits_for_the_first_to_commit_and_gets_its_run(
    store: Store, other: Store, background: Background
) -> None:
    with store.conn.transaction():
        assert take(store, FIRST) == (FIRST, True)
        second = background.blocked(other, take, other, SECOND)
    assert second.result(5) == (FIRST, True)


def test_the_second_starts_its_own_if_the_first_is_rolled_back(
    store: Store, other: Store, background: Background
) -> None:
    with store.conn.transaction(force_rollback=True):
        take(store, FIRST)
        second = background.blocked(other, take, other, SECOND)
    assert second.result(5) == (SECOND, True)


def test_of_two_that_find_a_key_free_again_one_takes_it(
    store: Store, other: Store, background: Background
) -> None:
    old = "00000000-0000-4000-8000-000000000000"
    take(store, old)
    store.finish(store.hold(old))
    with store.conn.transaction():
        assert take(store, FIRST, reuse="after_end") == (FIRST, True)
        second = background.blocked(other, take, other, SECOND, reuse="after_end")
    assert second.result(5) == (FIRST, True)


def test_a_taken_key_is_read_without_a_lock(store: Store, other: Store) -> None:
    """Callers who find a run in an open transaction keep nobody else with that key waiting."""
    take(store, FIRST)
    other.conn.execute("SET lock_timeout = '2s'")
    with store.conn.transaction():
        assert take(store, SECOND) == (FIRST, True)
        assert take(other, SECOND) == (FIRST, True)


def test_a_repeat_after_a_lost_answer_finds_its_own_run(store: Store) -> None:
    assert take(store, FIRST) == take(store, FIRST) == (FIRST, True)


def test_all_callers_get_the_handle_of_the_run(fulfil: Any, store: Store) -> None:
    first = keyed(fulfil, "o-42", kwargs={"a": 1, "b": 2})
    again = keyed(fulfil, "o-42", kwargs={"b": 2, "a": 1})  # no other input
    assert again.id == first.id
    assert again.run().input == '{"args":["o-42"],"kwargs":{"a":1,"b":2}}'


def test_a_key_is_one_of_a_workflow_and_of_a_namespace(fulfil: Any, store_url: str) -> None:
    first = keyed(fulfil, "o-42")
    assert keyed(fulfil.app.tasks["shop.refund"], "o-42").id != first.id
    fulfil.app.durable.__dict__["settings"] = fulfil.app.durable.settings.__class__(
        database_url=store_url, namespace="elsewhere"
    )
    assert keyed(fulfil, "o-42").id != first.id


def test_another_input_is_a_conflict_that_shows_the_difference(fulfil: Any) -> None:
    first = fulfil.apply_async(
        ("o-42", {"lines": [1, 2], "card_number": "4111"}), {"cents": 990}, idempotency_key="o-42"
    )
    with pytest.raises(IdempotencyConflict) as caught:
        fulfil.apply_async(
            ("o-42", {"lines": [1, 3], "card_number": "4222"}),
            {"cents": 880},
            idempotency_key="o-42",
        )
    assert caught.value.run_id == first.id
    assert str(caught.value) == (
        f"idempotency key 'o-42' of 'shop.fulfil' belongs to run {first.id}, which was started with"
        " other arguments (args[1].lines[1]: there 2, here 3; args[1].card_number: there ***, here"
        " ***; kwargs.cents: there 990, here 880). Use another key for another input, or the same"
        " arguments"
    )


def test_a_conflict_shows_nothing_that_is_masked(fulfil: Any, store: Store) -> None:
    fulfil.app.conf.durable_mask = ["email", "Street"]
    refund = fulfil.app.tasks["shop.refund_to"]
    refund.apply_async(("Ada", {"street": "A 1", "town": 1}, 5), idempotency_key="k")
    with pytest.raises(IdempotencyConflict) as caught:
        refund.apply_async(("Bob", {"street": "B 2", "town": 1}, 6), idempotency_key="k")
    assert "(args[0]: there ***, here ***; args[1].street: there ***, here ***; args[2]" in str(
        caught.value
    )


def test_a_conflict_of_encrypted_inputs_only_says_where(fulfil: Any) -> None:
    fulfil.app.conf.durable_encryption_keys = [Fernet.generate_key().decode()]
    fulfil.apply_async(("o", {"Ada": 1}), {"cents": 1}, idempotency_key="k")
    with pytest.raises(IdempotencyConflict) as caught:
        fulfil.apply_async(("o", {"Ada": 2}), {"note": "x"}, idempotency_key="k")
    assert "(args[1]; kwargs.cents only there; kwargs.note only here)" in str(caught.value)


def test_a_key_of_an_erased_run_stands_for_it_with_any_input(fulfil: Any, store: Store) -> None:
    first = keyed(fulfil, "o-42")
    store.finish(store.hold(first.id))
    fulfil.app.durable.erase(first.id)
    row = store.conn.execute("SELECT input_hash FROM durable.idempotency_keys").fetchone()
    assert row == (None,)
    assert keyed(fulfil, "o-43").id == first.id


def test_a_conflict_leaves_the_callers_transaction_usable(
    fulfil: Any, store: Store, store_url: str
) -> None:
    keyed(fulfil, 1)
    with Session(transactions.engine(store_url, "postgresql+psycopg2")) as session:
        with pytest.raises(IdempotencyConflict, match=r"args\[0\]: there 1, here 2"):
            keyed(fulfil, 2, transaction=session)
        other = keyed(fulfil, 2, idempotency_key="o-43", transaction=session)
        session.commit()
    assert store.status(other.id) == "pending"


END = {"succeeded": {}, "failed": {"error": '{"message": "no"}'}}


@pytest.mark.parametrize(
    ("reuse", "ended", "starts"),
    [
        ("after_ttl", "succeeded", False),
        ("after_ttl", "failed", False),
        ("after_failure", "succeeded", False),
        ("after_failure", "failed", True),
        ("after_end", "succeeded", True),
        ("after_end", "failed", True),
    ],
)
def test_when_a_key_can_be_taken_again(
    fulfil: Any, store: Store, reuse: str, ended: str, starts: bool
) -> None:
    first = keyed(fulfil, 1)
    claim = store.hold(first.id)
    assert keyed(fulfil, 1, idempotency_reuse=reuse).id == first.id  # it runs
    store.finish(claim, ended, **END[ended])
    assert (keyed(fulfil, 1, idempotency_reuse=reuse).id != first.id) is starts
    if starts:  # also with another input: it is another run
        store.finish(store.hold(keyed(fulfil, 1).id), ended, **END[ended])
        keyed(fulfil, 2, idempotency_reuse=reuse)


def test_a_canceled_run_counts_as_failed(fulfil: Any) -> None:
    first = keyed(fulfil, 1)
    first.cancel()
    assert keyed(fulfil, 1, idempotency_reuse="after_failure").id != first.id


def test_a_key_expires_so_long_after_the_end_of_its_run(fulfil: Any, store: Store) -> None:
    first = keyed(fulfil, 1, idempotency_ttl="1h")
    store.set(first.id, created_at="now() - interval '1 day'")
    assert keyed(fulfil, 1).id == first.id
    store.finish(store.hold(first.id))
    store.set(first.id, completed_at="now() - interval '59 minutes'")
    assert keyed(fulfil, 1, idempotency_ttl=0).id == first.id  # the first call's counts
    store.set(first.id, completed_at="now() - interval '61 minutes'")
    assert keyed(fulfil, 2).id != first.id


def test_without_a_word_it_is_a_week_or_the_setting(fulfil: Any, store: Store) -> None:
    keyed(fulfil, 1)
    fulfil.app.durable.__dict__["settings"] = fulfil.app.durable.settings.__class__(
        database_url="set already", idempotency_ttl=60.0
    )
    keyed(fulfil, 1, idempotency_key="o-43")
    rows = store.conn.execute(
        "SELECT extract(epoch FROM ttl)::int FROM durable.idempotency_keys ORDER BY key"
    ).fetchall()
    assert rows == [(604_800,), (60,)]


def test_a_key_goes_with_its_run(fulfil: Any, store: Store) -> None:
    first = keyed(fulfil, 1)
    store.conn.execute("DELETE FROM durable.workflow_runs")
    row = store.conn.execute("SELECT count(*) FROM durable.idempotency_keys").fetchone()
    assert row == (0,)
    assert keyed(fulfil, 2).id != first.id


def test_a_key_of_a_run_that_is_gone_otherwise_is_free(fulfil: Any, store: Store) -> None:
    first = keyed(fulfil, 1)
    with store.conn.transaction():  # as after a truncate, which fires no row's trigger
        store.conn.execute("ALTER TABLE durable.workflow_runs DISABLE TRIGGER USER")
        store.conn.execute("DELETE FROM durable.workflow_runs")
        store.conn.execute("ALTER TABLE durable.workflow_runs ENABLE TRIGGER USER")
    assert keyed(fulfil, 2).id != first.id


def test_in_a_serializable_transaction_a_race_is_the_callers_to_repeat(
    fulfil: Any, store: Store, store_url: str
) -> None:
    with psycopg.connect(store_url) as conn:
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        conn.execute("SELECT 1 FROM durable.workflow_runs")  # its snapshot
        first = keyed(fulfil, 1)
        with pytest.raises(psycopg.errors.SerializationFailure):
            keyed(fulfil, 1, transaction=conn)
        conn.rollback()
        assert keyed(fulfil, 1, transaction=conn).id == first.id


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"idempotency_key": ""}, "give text of 1 to 255 printable characters"),
        ({"idempotency_key": 42}, "give text of 1 to 255"),
        ({"idempotency_key": "x" * 256}, "give text of 1 to 255"),
        ({"idempotency_key": "a\0b"}, "give text of 1 to 255"),
        ({"idempotency_reuse": "always"}, "give 'after_ttl'"),
        ({"idempotency_ttl": -1}, "idempotency_ttl=-1 is negative"),
        ({"idempotency_ttl": "1y"}, "idempotency_ttl='1y' is not a duration"),
        ({"idempotency_key": None, "idempotency_ttl": 1}, "goes together with idempotency_key="),
        ({"task_id": FIRST}, "cannot go together"),
        ({"idempotency_kye": "o-42"}, "Did you mean 'idempotency_key'"),
    ],
)
def test_bad_options_are_refused(
    fulfil: Any, store: Store, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(OptionError, match=problem):
        keyed(fulfil, 1, **options)
    assert store.conn.execute("SELECT count(*) FROM durable.workflow_runs").fetchone() == (0,)
