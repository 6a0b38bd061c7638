"""Cancelling ends what is not running, and asks what is."""

from __future__ import annotations

import pytest

from durable.store.runs import Park
from tests.harness.store import Background, Store

PARKED = {
    "sleeping": Park("sleeping", "retry", delay=60.0),
    "waiting": Park("waiting", "event"),
    "paused": Park("paused", "for a person"),
    "pending": Park("pending", "hand-back"),
}


@pytest.mark.parametrize("status", PARKED)
def test_a_run_that_nobody_holds_ends_at_once(store: Store, status: str) -> None:
    claim = store.running()
    store.park(claim, PARKED[status])
    assert store.cancel(claim.id, reason="out of stock") == {claim.id: "canceled"}
    row = store.row(claim.id)
    assert (row["status"], row["reason"]) == ("canceled", "out of stock")
    assert row["completed_at"] is not None
    assert row["due_in"] is None
    assert store.claim(claim.id) is None


def test_a_running_run_is_asked_and_goes_on_to_its_next_step(store: Store) -> None:
    claim = store.running()
    assert store.cancel(claim.id) == {claim.id: "running"}
    row = store.row(claim.id)
    assert (row["status"], row["control"], row["wake"]) == ("running", "cancel", 1)
    assert row["completed_at"] is None


def test_its_worker_ends_it_with_the_reason_that_was_given(store: Store) -> None:
    claim = store.running()
    store.cancel(claim.id, reason="out of stock")
    assert store.finish(claim, "canceled")
    assert store.row(claim.id)["reason"] == "out of stock"


def test_what_is_over_or_unknown_or_elsewhere_is_left_alone(store: Store) -> None:
    claim = store.running()
    store.finish(claim, output="1")
    foreign = store.start(namespace="other")
    unknown = "00000000-0000-4000-8000-000000000000"
    assert store.cancel(claim.id, foreign, unknown) == {}
    assert store.status(claim.id) == "succeeded"
    assert store.status(foreign) == "pending"


def test_many_at_once(store: Store) -> None:
    parked, running = store.start(), store.running()
    assert store.cancel(parked, running.id) == {parked: "canceled", running.id: "running"}


def test_a_continuation_is_delivered_for_a_canceled_run_too(store: Store, other: Store) -> None:
    other.conn.execute("LISTEN durable")
    run_id = store.start(tail=True)
    store.cancel(run_id)
    row = store.row(run_id)
    assert (row["rung"], row["due_in"]) == (False, pytest.approx(0, abs=2))
    assert [note.payload for note in other.conn.notifies(timeout=5, stop_after=1)] == ["default"]


def test_a_claim_waits_for_a_cancel_that_is_being_committed(
    store: Store, other: Store, background: Background
) -> None:
    run_id = store.start()
    with store.conn.transaction():
        store.cancel(run_id)
        claimed = background.blocked(other, other.claim, run_id)
    assert claimed.result() is None


def test_a_cancel_waits_for_a_claim_that_is_being_committed_and_asks_its_worker(
    store: Store, other: Store, background: Background
) -> None:
    run_id = store.start()
    with store.conn.transaction():
        store.hold(run_id)
        canceled = background.blocked(other, other.cancel, run_id)
    assert canceled.result() == {run_id: "running"}
    assert store.row(run_id)["control"] == "cancel"


def test_a_cancel_waits_for_an_end_that_is_being_committed(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        store.finish(claim, output="1")
        canceled = background.blocked(other, other.cancel, claim.id)
    assert canceled.result() == {}
    assert store.status(claim.id) == "succeeded"


@pytest.mark.parametrize("tail", [True, False])
def test_a_run_that_was_asked_to_stop_ends_when_its_worker_dies(store: Store, tail: bool) -> None:
    claim = store.running(tail=tail)
    store.cancel(claim.id, reason="out of stock")
    assert store.release_child() == [claim.id]
    row = store.row(claim.id)
    assert (row["status"], row["reason"]) == ("canceled", "out of stock")
    assert (row["due_in"] is not None) is tail
