"""An event is accepted once, consumed once, and never lost between a look and a park."""

from __future__ import annotations

import uuid
from concurrent.futures import Future
from typing import Any

import psycopg
import pytest

from durable.errors import RunEnded, RunNotFound
from durable.store import events, waits
from durable.store.connections import Connection
from durable.store.events import NewEvent
from durable.store.pool import Database
from durable.store.runs import Claim, Park
from durable.store.waits import LOOK_AGAIN, Place, Wait
from tests.harness.store import Background, Store

WAITING = Park("waiting", "event approval")


def new(run_id: str, payload: str = '"yes"', **options: Any) -> NewEvent:
    given = {"id": str(uuid.uuid4()), "namespace": "default", "type": "approval", **options}
    return NewEvent(run_id=run_id, payload=payload, **given)


def send(store: Store, run_id: str, payload: str = '"yes"', **options: Any) -> str:
    return events.send(store.conn, new(run_id, payload, **options))


def place(claim: Claim, ordinal: int = 0, name: str = "approval", branch: str = "") -> Place:
    return Place(claim.id, claim.attempt, branch, ordinal, name)


def wait(
    store: Store, claim: Claim, ordinal: int = 0, timeout: float | None = None, **options: Any
) -> Wait | None:
    return waits.event(store.conn, place(claim, ordinal), timeout, **options)


def ask(store: Store, claim: Claim, ordinal: int = 0, timeout: float | None = None) -> Any:
    """What a wait brings: its status, and its payload if it has one."""
    found = wait(store, claim, ordinal, timeout)
    assert found is not None
    return found.output or found.status


def overdue(store: Store, run_id: str) -> None:
    """Let the time of every wait pass."""
    store.conn.execute(
        "UPDATE durable.step_attempts SET due_at = now() - interval '1 s'"
        " WHERE workflow_run_id = %s",
        (run_id,),
    )


def told(store: Store, run_id: str) -> list[tuple[str, str | None]]:
    return [
        (event.payload, event.consumed_by)
        for event in events.of_run(store.conn, run_id, store.namespace)
    ]


# --- before, between, after, again


def test_an_event_that_came_before_the_wait_ends_it_at_once(store: Store) -> None:
    run_id = store.start()
    send(store, run_id)
    assert ask(store, store.hold(run_id)) == '"yes"'


def test_an_event_between_the_look_and_the_park_sends_the_run_back_at_once(store: Store) -> None:
    claim = store.running()
    assert ask(store, claim) == "running"
    send(store, claim.id)
    assert store.park(claim, WAITING)
    assert store.status(claim.id) == "pending"
    assert ask(store, store.hold(claim.id)) == '"yes"'


def test_an_event_that_is_being_committed_while_the_run_parks_wakes_it(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    assert ask(store, claim) == "running"
    with other.conn.transaction():
        send(other, claim.id)
        parked = background.blocked(store, store.park, claim, WAITING)
    assert parked.result()
    assert store.status(claim.id) == "pending"


def test_an_event_that_comes_while_the_park_is_being_committed_waits_for_it(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    assert ask(store, claim) == "running"
    with store.conn.transaction():
        store.park(claim, WAITING)
        sent = background.blocked(other, send, other, claim.id)
    sent.result()
    assert store.status(claim.id) == "pending"
    assert store.row(claim.id)["due_in"] == pytest.approx(0, abs=2)


def test_an_event_after_the_park_wakes_the_run_and_tells_the_dispatchers(
    store: Store, other: Store
) -> None:
    claim = store.running()
    ask(store, claim)
    store.park(claim, WAITING)
    other.conn.execute("LISTEN durable")
    send(store, claim.id)
    assert store.status(claim.id) == "pending"
    assert [note.payload for note in other.conn.notifies(timeout=5, stop_after=1)] == ["default"]


def test_an_event_that_is_being_committed_while_the_run_looks_is_found(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with other.conn.transaction():
        send(other, claim.id)
        asked: Future[Any] = background.blocked(store, ask, store, claim)
    assert asked.result() == '"yes"'


def test_an_event_during_a_replay_is_found_by_the_wait(store: Store) -> None:
    claim = store.running()
    ask(store, claim)
    store.park(claim, WAITING)
    store.set(claim.id, status="'pending'")
    again = store.hold(claim.id)
    send(store, claim.id)
    assert ask(store, again) == '"yes"'


def test_an_event_is_consumed_once_also_when_the_answer_was_lost(store: Store) -> None:
    claim = store.running()
    send(store, claim.id, "1")
    send(store, claim.id, "2")
    assert [ask(store, claim), ask(store, claim)] == ["1", "1"]
    assert ask(store, claim, 1) == "2"
    assert told(store, claim.id) == [
        ("1", "step 0: wait for 'approval'"),
        ("2", "step 1: wait for 'approval'"),
    ]


def test_waits_take_events_of_their_type_in_the_order_in_which_they_were_committed(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        send(store, claim.id, "1")
        second = background.blocked(other, send, other, claim.id, "2")
    second.result()
    send(store, claim.id, '"other"', type="mail")
    send(store, claim.id, "3")
    assert [ask(store, claim, number) for number in range(4)] == ["1", "2", "3", "running"]


def test_two_branches_that_wait_for_one_type_take_different_events(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    send(store, claim.id, "1")
    send(store, claim.id, "2")

    def take(store: Store, branch: str) -> Any:
        found = waits.event(store.conn, place(claim, branch=branch), None)
        assert found is not None
        return found.output

    with store.conn.transaction():
        first = take(store, "0")
        # It waits for the event that the first has locked, finds it taken, and takes the next.
        second = background.blocked(other, take, other, "1")
    assert first == "1"
    assert second.result() == "2"
    assert told(store, claim.id)[0] == ("1", "step 0 of branch 0: wait for 'approval'")


# --- timeouts


def test_a_timeout_is_recorded_and_a_later_event_goes_to_the_next_wait(store: Store) -> None:
    claim = store.running()
    assert ask(store, claim, timeout=60) == "running"
    overdue(store, claim.id)
    assert ask(store, claim, timeout=60) == "failed"
    send(store, claim.id)
    assert ask(store, claim, timeout=60) == "failed"
    assert ask(store, claim, 1) == '"yes"'
    assert store.steps(claim.id) == [
        (0, "approval", 1, "failed", 0),
        (1, "approval", 1, "succeeded", 0),
    ]


def test_the_time_of_a_wait_is_fixed_when_it_begins(store: Store) -> None:
    claim = store.running()
    first = wait(store, claim, timeout=60)
    assert first is not None
    store.conn.execute(
        "UPDATE durable.step_attempts SET due_at = due_at - interval '50 s'"
        " WHERE workflow_run_id = %s",
        (claim.id,),
    )
    again = wait(store, claim, timeout=60)
    assert again is not None
    assert first.due_in == pytest.approx(60, abs=5)
    assert again.due_in == pytest.approx(10, abs=5)


def test_an_event_that_is_there_counts_although_the_time_is_over(store: Store) -> None:
    claim = store.running()
    ask(store, claim, timeout=60)
    send(store, claim.id)
    overdue(store, claim.id)
    assert ask(store, claim, timeout=60) == '"yes"'


def test_no_timeout_is_recorded_beside_an_event_that_is_being_committed(
    store: Store, other: Store, background: Background
) -> None:
    # The wait's snapshot is of before the event, which its sender knows to be accepted.
    claim = store.running()
    ask(store, claim, timeout=60)
    overdue(store, claim.id)
    with other.conn.transaction():
        send(other, claim.id)
        asked: Future[Any] = background.blocked(store, ask, store, claim, 0, 60)
    assert asked.result() == '"yes"'


@pytest.mark.parametrize(("payload", "brings"), [(None, "failed"), ("1", "1")])
def test_a_timeout_of_zero_only_looks(store: Store, payload: str | None, brings: str) -> None:
    claim = store.running()
    if payload:
        send(store, claim.id, payload)
    assert ask(store, claim, timeout=0) == brings
    assert ask(store, claim, timeout=0) == brings


# --- schemas


def test_an_event_after_the_look_is_looked_at_before_the_wait_goes_on_or_ends(
    store: Store,
) -> None:
    claim = store.running()
    ask(store, claim, timeout=60)
    overdue(store, claim.id)
    seen = events.peek(store.conn, claim.id, "approval")
    assert seen.id is None
    send(store, claim.id)
    found = wait(store, claim, timeout=60, checked=True, seen=seen.wake)
    assert found is not None
    assert found.status == LOOK_AGAIN
    assert store.steps(claim.id)[0][3] == "running"
    seen = events.peek(store.conn, claim.id, "approval")
    given = {"given": seen.id, "value": '{"ok": true}', "seen": seen.wake}
    found = wait(store, claim, timeout=60, checked=True, **given)
    assert found is not None
    assert found.output == '{"ok": true}'  # what the schema made of it
    assert told(store, claim.id)[0][0] == '"yes"'  # what was sent


def test_a_refused_event_is_put_aside_with_the_reason_and_the_wait(store: Store) -> None:
    claim = store.running()
    event_id = send(store, claim.id, "1")
    send(store, claim.id, "2")
    assert events.refuse(store.conn, place(claim), event_id, "not text")
    assert events.refuse(store.conn, place(claim), event_id, "again")  # its answer was lost
    assert ask(store, claim) == "2"
    first, second = events.of_run(store.conn, claim.id, "default")
    assert (first.error, first.consumed_by) == ("not text", "step 0: wait for 'approval'")
    assert first.consumed_at is not None
    assert (second.error, second.ordinal) == (None, 0)


# --- who may consume


def test_a_zombie_neither_consumes_nor_refuses_an_event(store: Store) -> None:
    zombie = store.running()
    event_id = send(store, zombie.id)
    store.release_child()
    claim = store.hold(zombie.id, worker="w2")
    assert wait(store, zombie) is None
    assert not events.refuse(store.conn, place(zombie), event_id, "not text")
    assert told(store, zombie.id) == [('"yes"', None)]
    assert ask(store, claim) == '"yes"'


def test_a_worker_that_is_being_fenced_takes_nothing(
    store: Store, other: Store, background: Background
) -> None:
    zombie = store.running()
    send(store, zombie.id)
    with other.conn.transaction():
        other.release_child()
        taken = background.blocked(store, wait, store, zombie)
    assert taken.result() is None
    assert told(store, zombie.id) == [('"yes"', None)]


# --- accepted


@pytest.mark.parametrize("state", ["pending", "running", "sleeping", "paused", "held"])
def test_an_event_to_a_run_that_does_not_wait_is_kept_and_changes_nothing_else(
    store: Store, state: str
) -> None:
    run_id = store.start(
        held=state == "held", rung=False, delay=60.0 if state == "sleeping" else None
    )
    if state in {"running", "paused"}:
        claim = store.hold(run_id)
        if state == "paused":
            store.park(claim, Park("paused", "for a person"))
    before = store.row(run_id)
    send(store, run_id)
    after = store.row(run_id)
    assert told(store, run_id) == [('"yes"', None)]
    assert after["wake"] == before["wake"] + 1
    for column in ("status", "available_at", "rung", "reason"):
        assert after[column] == before[column]


def test_the_first_event_of_a_key_counts_also_after_it_was_consumed_and_after_the_end(
    store: Store,
) -> None:
    claim = store.running()
    first = send(store, claim.id, "1", idempotency_key="form-7")
    assert send(store, claim.id, "2", idempotency_key="form-7") == first
    assert ask(store, claim) == "1"
    assert send(store, claim.id, "3", idempotency_key="form-7") == first
    assert ask(store, claim, 1) == "running"
    store.finish(claim)
    assert send(store, claim.id, "4", idempotency_key="form-7") == first


def test_of_two_senders_with_one_key_at_the_same_time_the_first_to_commit_wins(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        first = send(store, claim.id, "1", idempotency_key="form-7")
        second = background.blocked(other, send, other, claim.id, "2", idempotency_key="form-7")
    assert second.result() == first
    assert told(store, claim.id) == [("1", None)]


def test_a_key_is_of_one_run(store: Store) -> None:
    one, two = store.start(), store.start()
    ids = {send(store, each, idempotency_key="form-7") for each in (one, two)}
    assert len(ids) == 2


def test_an_event_whose_answer_was_lost_is_there_once_and_its_id_is_returned(
    store: Store, database: Database
) -> None:
    claim = store.running()
    event, lost = new(claim.id), [True]

    def send_and_lose(conn: Connection, event: NewEvent) -> str:
        sent = events.send(conn, event)
        if lost:
            lost.clear()
            conn.close()
            raise psycopg.OperationalError("the connection broke")
        return sent

    assert database.call(send_and_lose, event) == event.id
    assert not lost
    assert told(store, claim.id) == [('"yes"', None)]


def test_a_run_that_ends_keeps_what_it_did_not_consume(store: Store) -> None:
    claim = store.running()
    send(store, claim.id)
    store.finish(claim)
    assert told(store, claim.id) == [('"yes"', None)]


def test_an_event_to_a_run_that_has_ended_is_refused(store: Store) -> None:
    claim = store.running()
    store.finish(claim)
    with pytest.raises(RunEnded, match=rf"{claim.id} has ended \(succeeded\).*'approval'"):
        send(store, claim.id)
    assert told(store, claim.id) == []


def test_an_event_to_a_run_that_is_ending_is_refused_or_kept_by_the_order_of_commits(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        store.finish(claim)
        sent = background.blocked(other, send, other, claim.id)
    with pytest.raises(RunEnded):
        sent.result()


@pytest.mark.parametrize("key", [None, "form-7"])
def test_a_run_of_another_namespace_takes_nothing_and_tells_nothing(
    store: Store, other: Store, key: str | None
) -> None:
    elsewhere = Store(other.conn, "elsewhere")
    run_id = elsewhere.start()
    send(elsewhere, run_id, namespace="elsewhere", idempotency_key=key)
    with pytest.raises(RunNotFound, match="belongs to namespace 'elsewhere'"):
        send(store, run_id, idempotency_key=key)
    assert events.of_run(store.conn, run_id, "default") == []


def test_an_unknown_run_is_an_error_that_names_it(store: Store) -> None:
    unknown = str(uuid.uuid4())
    with pytest.raises(RunNotFound, match=f"no run {unknown} in namespace 'default'"):
        send(store, unknown)
