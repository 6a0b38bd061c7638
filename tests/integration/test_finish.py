"""A run ends once, by whoever holds it."""

from __future__ import annotations

import pytest

from durable.errors import RunNotFound
from durable.store import dispatch, queries, runs
from durable.store.runs import Park
from tests.harness.store import Background, Store


def test_the_outcome_is_stored_and_the_worker_stays_visible(store: Store) -> None:
    claim = store.running()
    assert store.finish(claim, output='{"b": 1, "a": 2}')
    row = queries.get(store.conn, claim.id, store.namespace)
    assert row is not None
    assert (row.status, row.output, row.worker_id) == ("succeeded", '{"b": 1, "a": 2}', "w1")
    assert row.available_at is None
    assert row.completed_at is not None


def test_a_repeat_after_a_lost_answer_counts_as_the_end(store: Store) -> None:
    claim = store.running()
    assert store.finish(claim, output="1")
    assert store.finish(claim, output="1")
    assert not store.finish(claim, "failed", error="{}")
    assert store.status(claim.id) == "succeeded"


@pytest.mark.parametrize("tail", [True, False])
def test_a_run_with_a_continuation_is_looked_after_until_it_is_delivered(
    store: Store, tail: bool
) -> None:
    claim = store.running(tail=tail)
    store.finish(claim, tail_timeout=30.0)
    due_in = store.row(claim.id)["due_in"]
    assert due_in == pytest.approx(30, abs=5) if tail else due_in is None
    runs.tail_done(store.conn, claim.id, claim.attempt)
    assert store.row(claim.id)["due_in"] is None


def test_a_run_that_was_taken_over_is_not_ended_by_its_first_worker(store: Store) -> None:
    claim = store.running()
    store.release_child()
    assert not store.finish(claim)
    store.hold(claim.id, worker="w2")
    assert not store.finish(claim)
    assert store.status(claim.id) == "running"


def test_a_run_that_was_parked_is_not_ended(store: Store) -> None:
    claim = store.running()
    store.park(claim, Park("waiting", "event"))
    assert not store.finish(claim)
    assert store.status(claim.id) == "waiting"


def test_the_end_waits_for_a_take_over_that_is_being_committed(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        store.release_child()
        ended = background.blocked(other, other.finish, claim)
    assert not ended.result()
    assert store.status(claim.id) == "pending"


def test_a_take_over_waits_for_an_end_that_is_being_committed(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        store.finish(claim)
        released = background.blocked(other, other.release_child)
    assert released.result() == []
    assert store.status(claim.id) == "succeeded"


def test_the_end_waits_for_a_deadline_that_is_being_committed(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running(deadline=60.0)
    past = "now() - interval '1 second'"
    store.set(claim.id, deadline_at=past, available_at=past)
    with store.conn.transaction():
        dispatch.due(
            store.conn,
            store.namespace,
            names=[],
            idle_queues=[],
            batch=10,
            ring_again=20.0,
            late_error="{}",
        )
        ended = background.blocked(other, other.finish, claim)
    assert not ended.result()
    assert store.status(claim.id) == "failed"


def test_a_hard_time_limit_ends_what_the_worker_holds(store: Store) -> None:
    claim = store.running(tail=True)
    assert not runs.fail_held(store.conn, claim.id, "w2", "{}", "time limit")
    assert runs.fail_held(store.conn, claim.id, "w1", '{"message": "slow"}', "time limit")
    row = store.row(claim.id)
    assert (row["status"], row["reason"], row["rung"]) == ("failed", "time limit", False)
    assert row["due_in"] == pytest.approx(0, abs=2)  # the dispatcher has Celery told
    assert not store.finish(claim)
    assert not runs.fail_held(store.conn, claim.id, "w1", "{}", "time limit")


def test_progress_is_stored_while_the_run_is_held(store: Store) -> None:
    claim = store.running()
    assert runs.set_progress(store.conn, claim.id, claim.attempt, '{"state": "PROGRESS"}')
    outcome = queries.outcome(store.conn, claim.id, store.namespace)
    assert outcome is not None
    assert outcome.progress == '{"state": "PROGRESS"}'
    store.release_child()
    assert not runs.set_progress(store.conn, claim.id, claim.attempt, "{}")


def test_a_client_sees_only_runs_of_its_namespace(store: Store) -> None:
    run_id = store.start()
    assert queries.get(store.conn, run_id, "other") is None
    with pytest.raises(RunNotFound) as caught:
        queries.outcome(store.conn, run_id, "other")
    assert str(caught.value) == (
        f"run {run_id} belongs to namespace 'default', and this app's durable_namespace is 'other'"
    )
    assert queries.known(store.conn, [run_id], "other") == set()
    assert queries.known(store.conn, [run_id], store.namespace) == {run_id}
