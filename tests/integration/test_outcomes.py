"""How the outcome of a task comes into the history of the run that waits for it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from durable.store import outcomes, waits
from durable.store.outcomes import Outcome
from durable.store.runs import Claim, Park
from durable.store.waits import Wait
from tests.harness.store import Background, Store

PARKED = Park("waiting", "result")


def ask(store: Store, claim: Claim, task: str, *before: str) -> Wait:
    wait = waits.result(store.conn, claim.id, claim.attempt, task, before)
    assert wait is not None
    return wait


def told(claim: Claim, task: str, status: str = "succeeded", **rest: Any) -> Outcome:
    given = {"succeeded": {"output": "3"}, "failed": {"error": '{"message": "no"}'}}
    return Outcome(claim.id, task, "shop.mail", status, **given.get(status, {}), **rest)


@pytest.fixture
def task() -> str:
    return str(uuid.uuid4())


def test_an_outcome_ends_the_wait_and_wakes_the_run(store: Store, task: str) -> None:
    claim = store.running()
    assert not ask(store, claim, task).over
    assert store.park(claim, PARKED)
    outcomes.deliver(store.conn, told(claim, task))
    assert store.status(claim.id) == "pending"
    again = store.hold(claim.id)
    found = ask(store, again, task)
    assert (found.status, found.output) == ("succeeded", "3")


def test_an_outcome_that_nobody_waits_for_yet_wakes_nobody(store: Store, task: str) -> None:
    claim = store.running()
    outcomes.deliver(store.conn, told(claim, task))
    assert store.row(claim.id)["wake"] == claim.wake
    assert ask(store, claim, task).over


def test_the_first_outcome_counts(store: Store, task: str) -> None:
    """A message that was doubled has its task executed twice."""
    claim = store.running()
    outcomes.deliver(store.conn, told(claim, task))
    outcomes.deliver(store.conn, told(claim, task, "failed"))
    assert ask(store, claim, task).status == "succeeded"


def test_an_outcome_for_a_run_that_has_ended_is_kept_and_one_for_nobody_is_not(
    store: Store, task: str
) -> None:
    """The ended one may be restarted, and its child is not started again then."""
    claim = store.running()
    store.finish(claim)
    outcomes.deliver(store.conn, told(claim, task, "failed"))
    assert store.status(claim.id) == "succeeded"
    assert [status for _, _, _, status, _ in store.steps(claim.id)] == ["failed"]
    outcomes.deliver(store.conn, Outcome(str(uuid.uuid4()), task, "shop.mail", "succeeded"))
    count = store.conn.execute("SELECT count(*) FROM durable.step_attempts").fetchone()
    assert count == (1,)


def test_a_worker_that_lost_the_run_is_told_so(store: Store, task: str) -> None:
    claim = store.running()
    store.set(claim.id, attempt="attempt + 1")
    assert waits.result(store.conn, claim.id, claim.attempt, task) is None
    assert waits.result(store.conn, claim.id, claim.attempt, task, ["earlier"]) is None


def test_the_end_of_a_child_is_told_in_its_own_commit(
    store: Store, other: Store, task: str
) -> None:
    parent = store.running()
    child = store.running(id=task, parent=parent.id, reports=True)
    assert not ask(store, parent, task).over
    assert store.park(parent, PARKED)
    with other.conn.transaction():
        assert other.finish(child, output="3")
        assert store.status(parent.id) == "waiting"
    assert store.status(parent.id) == "pending"
    assert ask(store, store.hold(parent.id), task).output == "3"


def test_a_child_that_does_not_report_is_silent(store: Store) -> None:
    """One that a step has started."""
    parent = store.running()
    child = store.running(parent=parent.id)
    store.finish(child)
    assert store.steps(parent.id) == []
    assert not outcomes.tells(store.conn, child.id, parent.id)


def test_a_child_that_is_started_again_under_its_id_tells_its_outcome_again(
    store: Store, task: str
) -> None:
    """Its parent was restarted, and what it had heard is set aside."""
    parent = store.running()
    child = store.running(id=task, parent=parent.id, reports=True)
    assert outcomes.tells(store.conn, child.id, parent.id)
    assert not ask(store, parent, task).over
    store.finish(child, output="3")
    store.conn.execute("UPDATE durable.step_attempts SET set_aside = 1")
    assert outcomes.tells(store.conn, child.id, parent.id)
    assert ask(store, parent, task).output == "3"
    assert outcomes.tells(store.conn, child.id, parent.id)
    assert not outcomes.tells(store.conn, child.id, store.start())


# --- two at once


@pytest.mark.parametrize("first", ["the wait", "the outcome"])
def test_wait_and_outcome_that_meet_both_count(
    store: Store, other: Store, background: Background, task: str, first: str
) -> None:
    """Whoever comes second waits for the first to commit, and sees what it did."""
    claim = store.running()
    wait: Callable[[Store], object] = lambda each: ask(each, claim, task)  # noqa: E731
    end: Callable[[Store], object] = lambda each: outcomes.deliver(each.conn, told(claim, task))  # noqa: E731
    one, two = (wait, end) if first == "the wait" else (end, wait)
    with other.conn.transaction():
        one(other)
        second = background.blocked(store, two, store)
    second.result(5)
    assert ask(store, claim, task).status == "succeeded"
    woken = store.row(claim.id)["wake"] != claim.wake
    assert woken == (first == "the wait"), "a waiter is woken, one that comes later sees it itself"


# --- what comes before it in a chain or a chord


def test_the_failure_of_an_earlier_task_is_the_outcome_of_those_after_it(
    store: Store, task: str
) -> None:
    claim, first, second = store.running(), str(uuid.uuid4()), str(uuid.uuid4())
    assert not ask(store, claim, task, first, second).over
    assert store.park(claim, PARKED)
    outcomes.deliver(store.conn, told(claim, first))
    assert store.status(claim.id) == "waiting", "a success of another task is no reason to wake"
    outcomes.deliver(store.conn, told(claim, second, "failed"))
    assert store.status(claim.id) == "pending", "a failure is one"
    again = store.hold(claim.id)
    found = ask(store, again, task, first, second)
    assert (found.status, json.loads(found.error or "")) == ("failed", {"message": "no"})
    assert json.loads(found.context or "")["by"] == second
    outcomes.deliver(store.conn, told(claim, task))
    assert ask(store, again, task) == found, "recorded: nothing changes it"


def test_an_earlier_failure_that_is_not_committed_at_the_look_undoes_the_park(
    store: Store, other: Store, task: str
) -> None:
    claim, first = store.running(), str(uuid.uuid4())
    with other.conn.transaction():
        outcomes.deliver(other.conn, told(claim, first, "failed"))
        assert not ask(store, claim, task, first).over
    assert store.park(claim, PARKED)
    assert store.status(claim.id) == "pending"
    assert ask(store, store.hold(claim.id), task, first).status == "failed"


@pytest.mark.parametrize("first", ["the failure", "the outcome"])
def test_an_outcome_and_an_earlier_failure_that_meet_are_settled_for_good(
    store: Store, other: Store, background: Background, task: str, first: str
) -> None:
    claim, earlier = store.running(), str(uuid.uuid4())
    ask(store, claim, task, earlier)
    outcomes.deliver(store.conn, told(claim, earlier, "failed"))
    look: Callable[[Store], object] = lambda each: ask(each, claim, task, earlier)  # noqa: E731
    end: Callable[[Store], object] = lambda each: outcomes.deliver(each.conn, told(claim, task))  # noqa: E731
    one, two = (look, end) if first == "the failure" else (end, look)
    with other.conn.transaction():
        one(other)
        second = background.blocked(store, two, store)
    second.result(5)
    found = ask(store, claim, task, earlier)
    assert found.status == ("failed" if first == "the failure" else "succeeded")
    outcomes.deliver(store.conn, told(claim, task))
    assert ask(store, claim, task, earlier) == found
