"""What is due is rung once, by one dispatcher, and only where somebody can run it."""

from __future__ import annotations

from typing import Any

import pytest

from durable.store import dispatch, queries, runs
from durable.store.dispatch import Due
from durable.store.runs import Park
from tests.harness.store import Background, Store

PAST = "now() - interval '1 second'"


def ring(store: Store, **options: Any) -> Due:
    given = {"names": ["shop.order"], "idle_queues": [], "batch": 10, "ring_again": 20.0}
    return dispatch.due(
        store.conn,
        store.namespace,
        **{**given, "late_error": '{"message": "late"}', **options},
    )


def rung(store: Store, **options: Any) -> list[str]:
    return [doorbell.id for doorbell in ring(store, **options).doorbells]


def due_run(store: Store, **options: Any) -> str:
    return store.start(rung=False, **options)


def test_a_run_whose_message_was_never_sent_is_rung_once(store: Store) -> None:
    run_id = due_run(store, message='{"queue": "orders"}')
    [doorbell] = ring(store).doorbells
    assert (doorbell.id, doorbell.name) == (run_id, "shop.order")
    assert doorbell.message == '{"queue": "orders"}'
    assert ring(store).doorbells == []
    row = store.row(run_id)
    assert (row["rung"], row["due_in"]) == (True, pytest.approx(20, abs=5))


def test_a_run_started_by_sql_alone_is_rung(store: Store) -> None:
    store.conn.execute(
        "INSERT INTO durable.workflow_runs (workflow_name, status, input, message)"
        " VALUES ('shop.order', 'pending', '{\"args\": [], \"kwargs\": {}}', '{}')"
    )
    assert len(rung(store)) == 1


def test_a_sleeping_run_is_rung_when_its_time_has_come(store: Store) -> None:
    run_id = due_run(store, delay=60.0)
    assert rung(store) == []
    store.set(run_id, available_at=PAST)
    assert rung(store) == [run_id]
    assert store.status(run_id) == "pending"
    assert store.claim(run_id) is not None


def test_two_dispatchers_take_different_runs(store: Store, other: Store) -> None:
    ids = {due_run(store) for _ in range(4)}
    with store.conn.transaction():
        first = rung(store, batch=2)
        second = rung(other, batch=10)
    assert len(first) == len(second) == 2
    assert {*first, *second} == ids


def test_a_run_that_somebody_is_writing_is_passed_over_not_waited_for(
    store: Store, other: Store
) -> None:
    run_id = due_run(store)
    with store.conn.transaction():
        store.cancel(run_id)
        assert rung(other) == []


def test_a_cancel_between_the_look_and_the_lock_is_seen(
    store: Store, other: Store, third: Store, background: Background
) -> None:
    # The row that was locked counts, not the one that was seen: it came back to life.
    run_id = due_run(store, tail=True)
    third.conn.execute("CREATE SCHEMA pausing")
    third.conn.execute("""
        CREATE FUNCTION pausing.now() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_advisory_xact_lock_shared(1);
            RETURN pg_catalog.now();
        END $$
    """)
    other.conn.execute("SET search_path = pausing, pg_catalog")
    with store.conn.transaction():
        store.conn.execute("SELECT 1")  # now() of the cancel is before that of the dispatcher
        third.conn.execute("SELECT pg_advisory_lock(1)")
        ringing = background.blocked(other, ring, other)
        store.cancel(run_id, reason="out of stock")
    third.conn.execute("SELECT pg_advisory_unlock(1)")
    ringing.result()
    row = store.row(run_id)
    assert (row["status"], row["reason"]) == ("canceled", "out of stock")
    assert row["completed_at"] is not None
    third.conn.execute("DROP SCHEMA pausing CASCADE")


def test_a_message_is_sent_again_only_while_a_worker_of_its_queue_is_idle(store: Store) -> None:
    run_id = due_run(store, queue="orders")
    rung(store)
    store.set(run_id, available_at=PAST)
    assert rung(store, idle_queues=[]) == []
    assert rung(store, idle_queues=["mail"]) == []
    assert rung(store, idle_queues=["mail", "orders"]) == [run_id]


def test_a_run_of_no_known_queue_is_sent_again_while_anybody_is_idle(store: Store) -> None:
    run_id = due_run(store)
    rung(store)
    store.set(run_id, available_at=PAST)
    assert rung(store) == []
    assert rung(store, idle_queues=["mail"]) == [run_id]


def test_messages_for_a_run_become_rarer_the_longer_nobody_claims_it(store: Store) -> None:
    run_id = due_run(store)
    rung(store)
    store.set(run_id, available_at=PAST, rung_at="now() - interval '100 seconds'")
    rung(store, idle_queues=["orders"])
    assert store.row(run_id)["due_in"] == pytest.approx(100, abs=5)


@pytest.mark.parametrize("idle", [[], ["orders"]])
def test_a_run_of_a_workflow_that_nobody_has_waits_and_is_visible(
    store: Store, idle: list[str]
) -> None:
    run_id = due_run(store, name="shop.gone", queue="orders")
    assert rung(store, idle_queues=idle) == []
    row = queries.get(store.conn, run_id, store.namespace)
    assert row is not None
    assert (row.status, row.name) == ("pending", "shop.gone")
    assert rung(store, names=["shop.order", "shop.gone"]) == [run_id]


def test_another_namespace_is_not_looked_at(store: Store) -> None:
    due_run(store, namespace="other")
    assert rung(store) == []


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("state", ["pending", "sleeping", "waiting", "paused", "running"])
def test_a_deadline_ends_a_run_wherever_it_is(store: Store, state: str, known: bool) -> None:
    run_id = store.start(deadline=60.0, rung=False, delay=60.0 if state == "sleeping" else None)
    claim = None
    if state in {"waiting", "paused", "running"}:
        claim = store.hold(run_id)
    if state in {"waiting", "paused"} and claim is not None:
        store.park(claim, Park(state, "for something"))
    store.set(run_id, deadline_at=PAST, available_at=f"least(available_at, {PAST})")

    told = rung(store, names=["shop.order"] if known else [])

    assert told == ([run_id] if known else [])  # for Celery's hooks
    row = store.row(run_id)
    assert (row["status"], row["reason"]) == ("failed", "deadline")
    assert row["error"] == '{"message": "late"}'
    assert row["completed_at"] is not None
    assert rung(store) == []
    if claim is not None:
        assert not store.finish(claim)


def test_a_run_that_sleeps_past_its_deadline_is_looked_at_in_time(store: Store) -> None:
    claim = store.running(deadline=30.0)
    store.park(claim, Park("sleeping", "sleep", delay=3600.0))
    assert ring(store).next_in == pytest.approx(30, abs=5)


def test_a_deadline_in_the_past_leaves_an_ended_run_alone(store: Store) -> None:
    claim = store.running(deadline=60.0, tail=True)
    store.finish(claim, output='"done"')
    store.set(claim.id, deadline_at=PAST, available_at=PAST)
    assert rung(store) == [claim.id]  # for its continuation
    row = store.row(claim.id)
    assert (row["status"], row["output"], row["attempt"]) == ("succeeded", '"done"', 1)


def test_a_run_that_ended_by_its_deadline_is_claimed_once_more_to_tell_celery(
    store: Store,
) -> None:
    run_id = store.start(deadline=60.0, rung=False)
    store.set(run_id, deadline_at=PAST, available_at=PAST)
    assert rung(store) == [run_id]
    claim = store.hold(run_id)
    assert (claim.status, claim.error) == ("failed", '{"message": "late"}')
    assert store.claim(run_id) is None


@pytest.mark.parametrize("state", ["pending", "rung", "sleeping"])
def test_a_run_that_nobody_claimed_in_time_expires(store: Store, state: str) -> None:
    delay = 60.0 if state == "sleeping" else None
    run_id = store.start(expires=60.0, rung=state == "rung", delay=delay)
    store.set(run_id, expires_at=PAST, available_at=PAST)
    assert rung(store) == []
    row = store.row(run_id)
    assert (row["status"], row["reason"], row["due_in"]) == ("canceled", "expired", None)


def test_celery_is_told_of_an_expired_run_if_something_follows_it(store: Store) -> None:
    run_id = store.start(expires=60.0, rung=False, tail=True)
    store.set(run_id, expires_at=PAST, available_at=PAST)
    assert rung(store) == [run_id]
    assert store.hold(run_id).status == "canceled"


def test_a_run_that_was_claimed_once_never_expires(store: Store) -> None:
    claim = store.running(expires=60.0)
    store.park(claim, Park("sleeping", "sleep", delay=0.0))
    assert rung(store) == [claim.id]
    assert store.status(claim.id) == "pending"


def test_a_full_batch_says_that_there_is_more_and_goes_by_age(store: Store) -> None:
    ids = [due_run(store) for _ in range(3)]
    for age, run_id in enumerate(reversed(ids)):
        store.set(run_id, available_at=f"now() - interval '{age} hours'")
    first = ring(store, batch=2)
    assert {doorbell.id for doorbell in first.doorbells} == {ids[0], ids[1]}
    assert first.more
    rest = ring(store, batch=2)
    assert [doorbell.id for doorbell in rest.doorbells] == [ids[2]]
    assert not rest.more


def test_the_next_timer_is_told(store: Store) -> None:
    assert ring(store).next_in is None
    due_run(store, delay=300.0)
    due_run(store, delay=120.0)
    due_run(store, delay=7.0, namespace="other")
    assert ring(store).next_in == pytest.approx(120, abs=5)


def test_a_lost_message_is_rung_again_unless_a_worker_has_the_run(
    store: Store, other: Store
) -> None:
    other.conn.execute("LISTEN durable")
    lost, held = store.start(), store.running()
    runs.unring(store.conn, [lost, held.id])
    assert rung(store) == [lost]
    assert [note.payload for note in other.conn.notifies(timeout=5, stop_after=1)] == ["default"]


def test_a_broker_that_is_away_is_given_time(store: Store) -> None:
    run_id = store.start()
    runs.unring(store.conn, [run_id], delay=2.0)
    assert ring(store).next_in == pytest.approx(2, abs=1)


def test_a_run_that_was_begun_before_is_told_from_a_new_one(store: Store) -> None:
    new, begun = due_run(store), store.running()
    store.park(begun, Park("pending", "hand-back"))
    assert {each.id: each.woken for each in ring(store).doorbells} == {new: False, begun.id: True}
