"""Runs that have something to undo: whoever cancels them sends them to a worker."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from durable.control import refusal
from durable.store import compensation, control, steps
from durable.store.cascade import cascade
from durable.store.control import From, Order
from durable.store.runs import Claim, Park
from durable.store.steps import Written
from tests.harness.store import Background, Store, step_of

ORDERS = itertools.count(1)


def order(store: Store, run_id: str, reason: str | None = None) -> Order:
    number = f"00000000-0000-0000-0000-{next(ORDERS):012}"
    return Order(number, [run_id], store.namespace, "ada", reason)


def compensating(store: Store, **options: object) -> Claim:
    claim = store.running(**options)
    assert compensation.mark(store.conn, claim.id, claim.attempt)
    return claim


def by_people(store: Store, run_id: str) -> None:
    [change] = control.cancel(store.conn, order(store, run_id, "enough"))
    assert change.changed


def by_the_system(store: Store, run_id: str) -> None:
    store.cancel(run_id, reason="enough")


Cancel = Callable[[Store, str], None]
every_cancel = pytest.mark.parametrize("cancel", [by_people, by_the_system])


@every_cancel
def test_a_cancel_of_a_parked_run_is_a_workers_to_carry_out(store: Store, cancel: Cancel) -> None:
    claim = compensating(store)
    store.park(claim, Park("sleeping", "sleep", delay=3600))
    cancel(store, claim.id)
    row = store.row(claim.id)
    assert (row["status"], row["control"], row["reason"]) == ("pending", "cancel", "enough")
    assert row["completed_at"] is None
    assert row["due_in"] <= 0
    assert not row["rung"]
    found = store.hold(claim.id)
    assert (found.control, found.compensates) == ("cancel", True)


@every_cancel
def test_one_without_anything_to_undo_ends_at_once(store: Store, cancel: Cancel) -> None:
    claim = store.running()
    store.park(claim, Park("sleeping", "sleep", delay=3600))
    cancel(store, claim.id)
    assert store.status(claim.id) == "canceled"


def test_a_cancel_and_the_mark_wait_for_each_other(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        assert compensation.mark(store.conn, claim.id, claim.attempt)
        canceled = background.blocked(other, by_people, other, claim.id)
    canceled.result()
    assert (store.status(claim.id), store.row(claim.id)["control"]) == ("running", "cancel")


def test_the_mark_and_the_decision_are_fenced(store: Store) -> None:
    claim = store.running()
    store.release_child()
    assert not compensation.mark(store.conn, claim.id, claim.attempt)
    assert compensation.decide(store.conn, claim.id, claim.attempt, "failed") is None
    assert (store.steps(claim.id), store.row(claim.id)["compensates"]) == ([], False)


def test_a_canceled_run_whose_worker_is_lost_goes_on_to_undo(store: Store) -> None:
    claim = compensating(store)
    by_people(store, claim.id)
    store.release_child()
    row = store.row(claim.id)
    assert (row["status"], row["control"], row["reason"]) == ("pending", "cancel", "enough")
    assert row["due_in"] <= 0


def stopped_on_the_way(store: Store) -> Claim:
    """A canceled run whose replay came to something that is for a person to see."""
    claim = compensating(store)
    steps.record(store.conn, step_of(claim))
    store.park(claim, Park("sleeping", "sleep", delay=3600))
    by_people(store, claim.id)
    claim = store.hold(claim.id)
    store.park(claim, Park("paused", "something else was recorded"))
    return claim


def test_a_park_of_a_canceled_run_keeps_the_cancel(store: Store) -> None:
    claim = stopped_on_the_way(store)
    assert (store.status(claim.id), store.row(claim.id)["control"]) == ("paused", "cancel")


@pytest.mark.parametrize("way", ["resume", "failed", "step"])
def test_so_do_a_resume_and_a_restart(store: Store, way: str) -> None:
    claim = stopped_on_the_way(store)
    if way == "resume":
        [change] = control.resume(store.conn, order(store, claim.id))
    else:
        begin = From(way, "charge" if way == "step" else None)
        [change] = control.restart(store.conn, order(store, claim.id), begin)
    assert (change.changed, change.after) == (True, "pending")
    assert refusal("resume" if way == "resume" else "restart", change) is None
    assert store.row(claim.id)["control"] == "cancel"


def test_from_the_beginning_it_is_another_run(store: Store) -> None:
    claim = stopped_on_the_way(store)
    control.restart(store.conn, order(store, claim.id), From("beginning"))
    assert store.row(claim.id)["control"] is None


def test_what_is_on_its_way_to_be_undone_is_not_paused_and_canceled_once(store: Store) -> None:
    claim = compensating(store)
    store.park(claim, Park("sleeping", "sleep", delay=3600))
    by_people(store, claim.id)
    [change] = control.pause(store.conn, order(store, claim.id))
    assert not change.changed
    assert "it is being canceled" in str(refusal("pause", change))
    [change] = control.cancel(store.conn, order(store, claim.id))
    assert (change.changed, refusal("cancel", change)) == (False, None)


def test_the_decision_is_made_once_and_takes_the_place_of_the_cancel(store: Store) -> None:
    claim = compensating(store)
    by_people(store, claim.id)
    for _ in range(2):  # the second is a repeat after a lost answer
        found = compensation.decide(store.conn, claim.id, claim.attempt, "canceled")
        assert found == ("enough",)
    assert store.row(claim.id)["control"] is None
    [row] = steps.of_run(store.conn, claim.id, store.namespace)
    assert (row.branch, row.kind, row.status) == ("undo", "undo", "succeeded")
    assert row.output == '{"status" : "canceled", "reason" : "enough"}'


def test_a_pause_outlasts_the_decision(store: Store) -> None:
    claim = compensating(store)
    control.pause(store.conn, order(store, claim.id))
    failed = {"error": '{"type": "x"}', "reason": "rejected"}
    found = compensation.decide(store.conn, claim.id, claim.attempt, "failed", **failed)
    assert found == ("rejected",)
    assert steps.record(store.conn, step_of(claim)) is Written.PAUSE


def test_a_restart_of_a_run_that_cannot_undo_does_only_that_again(store: Store) -> None:
    claim = compensating(store)
    failed = {"status": "failed", "error": '{"type": "x"}'}
    steps.record(store.conn, step_of(claim, 0))
    steps.record(store.conn, step_of(claim, 1, "refuse", **failed))
    compensation.decide(store.conn, claim.id, claim.attempt, "failed")
    for ordinal, rest in ((1, {}), (2, failed)):
        steps.record(store.conn, step_of(claim, ordinal, "release", **rest)._replace(branch="undo"))
    store.park(claim, Park("paused", "undo step has failed"))
    control.restart(store.conn, order(store, claim.id), From("failed"))
    rows = steps.of_run(store.conn, claim.id, store.namespace)
    assert [(row.branch, row.ordinal) for row in rows] == [
        ("", 0),
        ("", 1),
        ("undo", 0),
        ("undo", 1),
    ]


def test_a_tied_child_is_sent_to_a_worker_once(store: Store) -> None:
    parent = store.running()
    child = compensating(store, parent=parent.id, on_parent_cancel="cancel")
    store.park(child, Park("sleeping", "sleep", delay=3600))
    store.finish(parent, "canceled")
    assert store.row(parent.id)["cascades"]
    assert cascade(store.conn, [parent.id]) == 1
    row = store.row(child.id)
    assert (row["status"], row["control"]) == ("pending", "cancel")
    assert not store.row(parent.id)["cascades"]
    assert cascade(store.conn, [parent.id]) == 0
