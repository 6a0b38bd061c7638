"""A run gives its slot back, and no wake-up is lost on the way."""

from __future__ import annotations

import pytest

from durable.store import steps
from durable.store.runs import Park
from tests.harness.store import Background, Store, step_of

RETRY = Park("sleeping", "retry", delay=60.0)


def failed(claim: object, **rest: object) -> object:
    return step_of(claim, status="failed", error='{"message": "no"}', context="{}", **rest)


def test_a_parked_run_has_its_due_time_its_reason_and_the_failed_step(store: Store) -> None:
    claim = store.running()
    assert store.park(claim, RETRY, failed(claim))

    row = store.row(claim.id)
    assert (row["status"], row["reason"], row["rung"]) == ("sleeping", "retry", False)
    assert row["due_in"] == pytest.approx(60, abs=5)
    assert row["child_pid"] is None
    assert row["worker_id"] == "w1"
    assert store.steps(claim.id) == [(0, "charge", 1, "failed", 0)]


def test_a_run_without_a_due_time_waits_for_its_deadline_at_most(store: Store) -> None:
    endless, limited = store.running(), store.running(deadline=100.0)
    for claim in (endless, limited):
        store.park(claim, Park("waiting", "event"))
    assert store.row(endless.id)["due_in"] is None
    assert store.row(limited.id)["due_in"] == pytest.approx(100, abs=5)


def test_a_deadline_before_the_due_time_counts(store: Store) -> None:
    claim = store.running(deadline=10.0)
    store.park(claim, RETRY)
    assert store.row(claim.id)["due_in"] == pytest.approx(10, abs=5)


def test_a_wake_up_before_the_park_sends_the_run_back_at_once(store: Store) -> None:
    claim = store.running()
    store.set(claim.id, wake="wake + 1")  # an event, a child's end
    assert store.park(claim, Park("waiting", "event"))
    row = store.row(claim.id)
    assert (row["status"], row["due_in"]) == ("pending", pytest.approx(0, abs=2))


def test_a_wake_up_that_is_being_committed_is_waited_for(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        store.set(claim.id, wake="wake + 1")
        parked = background.blocked(other, other.park, claim, Park("waiting", "event"))
    assert parked.result()
    assert store.status(claim.id) == "pending"


def test_a_stop_that_is_being_committed_is_waited_for(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        store.cancel(claim.id)
        parked = background.blocked(other, other.park, claim, Park("waiting", "event"))
    assert parked.result()
    assert store.status(claim.id) == "pending"  # rung, claimed, and ended by that
    assert store.hold(claim.id).control == "cancel"


def test_a_stop_waits_for_a_park_that_is_being_committed(
    store: Store, other: Store, background: Background
) -> None:
    # Asking for status = 'waiting' it matched nothing, did not wait, and was lost.
    claim = store.running()
    with store.conn.transaction():
        store.park(claim, Park("waiting", "event"))
        canceled = background.blocked(other, other.cancel, claim.id)
    assert canceled.result() == {claim.id: "canceled"}


def test_a_park_keeps_the_reason_of_the_stop_that_came_first(store: Store) -> None:
    claim = store.running()
    store.cancel(claim.id, reason="out of stock")
    store.park(claim, RETRY)
    assert store.hold(claim.id).reason == "out of stock"


def test_a_fenced_worker_parks_nothing_and_records_nothing(store: Store) -> None:
    claim = store.running()
    store.release_child()
    again = store.hold(claim.id, worker="w2")
    assert not store.park(claim, RETRY, failed(claim))
    assert store.steps(claim.id) == []
    assert store.row(claim.id)["attempt"] == again.attempt
    assert store.status(claim.id) == "running"


def test_a_repeat_after_a_lost_answer_finds_the_run_parked(store: Store) -> None:
    claim = store.running()
    assert store.park(claim, RETRY, failed(claim))
    assert store.park(claim, RETRY, failed(claim))
    assert len(store.steps(claim.id)) == 1
    store.set(claim.id, status="'pending'")
    store.hold(claim.id, worker="w2")
    assert not store.park(claim, RETRY, failed(claim))  # by now it is somebody else's


def test_a_retry_of_the_body_sets_failed_steps_aside_and_keeps_the_others(store: Store) -> None:
    claim = store.running()
    steps.record(store.conn, step_of(claim, 0, "load"))
    steps.record(store.conn, failed(claim, ordinal=1))
    assert store.park(claim, Park("sleeping", "retry", delay=0.0, retry=True))

    row = store.row(claim.id)
    assert (row["retries"], row["generation"]) == (1, 1)
    store.set(claim.id, status="'pending'")
    found = store.claim(claim.id)
    assert found is not None
    again, history = found
    assert [step[2] for step in history] == ["load"]
    steps.record(store.conn, step_of(again, 1))
    assert store.steps(claim.id) == [
        (0, "load", 1, "succeeded", 0),
        (1, "charge", 1, "succeeded", 0),
        (1, "charge", 1, "failed", 1),
    ]


def test_waiting_for_a_step_uses_up_no_retry_of_the_run(store: Store) -> None:
    claim = store.running()
    store.park(claim, RETRY, failed(claim))
    row = store.row(claim.id)
    assert (row["retries"], row["generation"]) == (0, 0)


@pytest.mark.parametrize(("delay", "told"), [(0.05, ["default"]), (60.0, [])])
def test_a_due_time_close_by_is_announced(
    store: Store, other: Store, delay: float, told: list[str]
) -> None:
    other.conn.execute("LISTEN durable")
    store.park(store.running(), Park("sleeping", "sleep", delay=delay))
    notes = [
        note.payload for note in other.conn.notifies(timeout=0.1 if not told else 5, stop_after=1)
    ]
    assert notes == told
