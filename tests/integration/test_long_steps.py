"""Rows of steps that are still running: fenced, and never taken for a result."""

from __future__ import annotations

from typing import Any

import pytest

from durable.store import control, long_steps, runs, steps
from durable.store.control import From, Order
from durable.store.runs import Claim, Park
from durable.store.steps import StepAttempt, Written
from tests.harness.store import Background, Store, step_of


def open_of(claim: Claim, details: str | None = None, **rest: Any) -> StepAttempt:
    return step_of(claim, status="running", output=details, **rest)


def end_of(claim: Claim, **rest: Any) -> StepAttempt:
    return step_of(claim, opened=True, **rest)


def beat(store: Store, claim: Claim, details: str | None = None, **rest: Any) -> Written:
    return long_steps.open_step(store.conn, open_of(claim, details, **rest), once=False)


def begin_once(store: Store, claim: Claim, **rest: Any) -> Written:
    return long_steps.open_step(store.conn, open_of(claim, **rest), once=True)


def found(store: Store, claim: Claim) -> list[tuple[int, str, str | None]]:
    rows = steps.of_run(store.conn, claim.id, store.namespace)
    return [(row.attempt, row.status, row.output) for row in rows]


def order(store: Store, run_id: str) -> Order:
    return Order("00000000-0000-0000-0000-00000000000a", [run_id], store.namespace, "ada")


def test_heartbeats_open_a_row_that_the_end_of_the_attempt_updates(store: Store) -> None:
    claim = store.running()
    assert [beat(store, claim, text) for text in ("1", "2")] == [Written.RECORDED] * 2
    assert beat(store, claim) is Written.RECORDED
    assert found(store, claim) == [(1, "running", "2")]
    assert not steps.was_recorded(store.conn, end_of(claim))
    assert steps.record(store.conn, end_of(claim, output="7")) is Written.RECORDED
    assert found(store, claim) == [(1, "succeeded", "7")]
    assert steps.was_recorded(store.conn, end_of(claim))
    [row] = steps.of_run(store.conn, claim.id, store.namespace)
    assert row.completed_at is not None
    assert row.completed_at > row.started_at


def test_a_repeated_end_finds_the_row_ended_and_a_late_heartbeat_leaves_it(store: Store) -> None:
    claim = store.running()
    beat(store, claim, "1")
    written = [steps.record(store.conn, end_of(claim, output=text)) for text in ("7", "8")]
    assert written == [Written.RECORDED] * 2
    assert beat(store, claim, "3") is Written.RECORDED
    assert found(store, claim) == [(1, "succeeded", "7")]


def test_an_end_without_the_row_is_recorded_too(store: Store) -> None:
    claim = store.running()  # the answer to a heartbeat may have been lost before it was stored
    assert steps.record(store.conn, end_of(claim)) is Written.RECORDED
    assert found(store, claim) == [(1, "succeeded", "1")]


def test_a_failed_attempt_keeps_what_it_has_reported(store: Store) -> None:
    claim = store.running()
    beat(store, claim, "1")
    failed = end_of(claim, status="failed", error='{"type": "x"}', context='{"class": "transient"}')
    assert steps.record(store.conn, failed) is Written.RECORDED
    assert found(store, claim) == [(1, "failed", "1")]


def test_so_does_one_that_parks_the_run(store: Store) -> None:
    claim = store.running()
    beat(store, claim, "1")
    failed = end_of(claim, status="failed", error='{"type": "x"}')
    assert store.park(claim, Park("sleeping", "retry", delay=1.0), failed)
    assert found(store, claim) == [(1, "failed", "1")]


def test_a_step_is_ended_in_the_transaction_of_its_session(store: Store, other: Store) -> None:
    claim = store.running()
    beat(store, claim, "1")
    with store.conn.transaction(), store.conn.cursor() as cursor:
        assert steps.record_in(cursor, end_of(claim, output="7")) is Written.RECORDED
        assert found(other, claim) == [(1, "running", "1")]
    assert found(store, claim) == [(1, "succeeded", "7")]


@pytest.mark.parametrize("once", [False, True])
def test_a_worker_that_lost_its_run_is_told_and_opens_nothing(store: Store, once: bool) -> None:
    claim = store.running()
    store.release_child()
    assert long_steps.open_step(store.conn, open_of(claim), once=once) is Written.FENCED
    store.hold(claim.id, worker="w2")
    assert long_steps.open_step(store.conn, open_of(claim), once=once) is Written.FENCED
    assert found(store, claim) == []


@pytest.mark.parametrize("once", [False, True])
def test_a_claim_waits_for_a_row_that_is_being_opened_and_loads_it(
    store: Store, other: Store, background: Background, once: bool
) -> None:
    # Without FOR SHARE the claim fits in between, and what may run once runs twice.
    claim = store.running()

    def take_over() -> Any:
        other.release_child()
        claimed = other.claim(claim.id, "w2")
        return claimed and [row[5] for row in claimed[1]]

    with store.conn.transaction():
        long_steps.open_step(store.conn, open_of(claim), once=once)
        history = background.blocked(other, take_over)
    assert history.result() == ["running"]


def test_heartbeats_tell_that_the_run_is_to_stop_and_store_what_they_bring(store: Store) -> None:
    claim = store.running()
    store.cancel(claim.id)
    assert beat(store, claim, "1") is Written.CANCEL
    assert found(store, claim) == [(1, "running", "1")]
    assert steps.record(store.conn, end_of(claim)) is Written.CANCEL
    assert found(store, claim) == [(1, "succeeded", "1")]


def test_what_may_run_once_is_not_begun_by_a_run_that_is_to_stop(store: Store) -> None:
    claim = store.running()
    control.pause(store.conn, order(store, claim.id))
    assert begin_once(store, claim) is Written.PAUSE
    assert found(store, claim) == []


def test_a_heartbeat_sees_a_cancel_that_was_committed_while_it_waited_for_the_run(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        store.cancel(claim.id)
        written = background.blocked(other, begin_once, other, claim)
    assert written.result() is Written.CANCEL
    assert found(store, claim) == []


def paused_once(store: Store) -> Claim:
    claim = store.running()
    begin_once(store, claim)
    assert store.park(claim, Park("paused", "cut off"))
    return claim


def test_what_was_cut_off_is_settled_in_its_place(store: Store) -> None:
    claim = paused_once(store)
    assert store.status(claim.id) == "paused"
    settled = {"branch": "", "ordinal": 0, "name": "charge", "output": "9"}
    [change] = control.settle(store.conn, order(store, claim.id), **settled)
    assert change.changed
    assert found(store, claim) == [(2, "succeeded", "9")]


@pytest.mark.parametrize(
    ("begin", "left"),
    [
        (From("failed"), [(1, "running", None)]),
        (From("step", "charge"), []),
        (From("beginning"), []),
    ],
)
def test_only_a_restart_that_names_it_runs_it_again(
    store: Store, begin: From, left: list[object]
) -> None:
    claim = paused_once(store)
    [change] = control.restart(store.conn, order(store, claim.id), begin)
    assert (change.changed, change.after) == (True, "pending")
    assert found(store, claim) == left


def test_a_retry_of_the_body_leaves_it_alone(store: Store) -> None:
    claim = store.running()
    begin_once(store, claim)
    steps.record(store.conn, end_of(claim, status="failed", error='{"type": "x"}'))
    how = Park("sleeping", "retry", delay=1.0, retry=True)
    assert runs.park(store.conn, claim.id, claim.attempt, claim.wake, how)
    assert found(store, claim) == [(1, "failed", None)]
