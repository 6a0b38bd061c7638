"""The next pass takes the place of this one in one commit, or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from durable.store import events, passes, steps, waits
from durable.store.events import NewEvent
from durable.store.runs import Claim
from durable.store.waits import Place
from tests.harness.store import Background, Store, step_of

GIVEN = '{"args":[2],"kwargs":{}}'


def begin(store: Store, claim: Claim, version: str | None = None) -> bool:
    return passes.begin_anew(
        store.conn, claim.id, claim.attempt, claim.generation, given=GIVEN, version=version
    )


def send(store: Store, run_id: str, number: int, key: str | None = None) -> str:
    event_id = f"00000000-0000-4000-8000-{number:012}"
    return events.send(
        store.conn,
        NewEvent(
            id=event_id,
            run_id=run_id,
            namespace="default",
            type="mail",
            payload=str(number),
            idempotency_key=key,
        ),
    )


def take(store: Store, claim: Claim, ordinal: int) -> Any:
    place = Place(claim.id, claim.attempt, "", ordinal, "mail")
    wait = waits.event(store.conn, place, None)
    return wait and wait.output


def test_the_next_pass_is_due_at_once_with_its_arguments_and_no_history(store: Store) -> None:
    claim = store.running(tail=True, deadline=3600.0, version=None)
    steps.record(store.conn, step_of(claim, 0))
    store.set(claim.id, retries="3", recoveries="4")
    before = store.row(claim.id)
    assert begin(store, claim, version="7")
    row = store.row(claim.id)
    assert store.steps(claim.id) == []
    changed = {
        "status": "pending",
        "reason": "continue-as-new",
        "version": "7",
        "generation": 1,
        "passes": 1,
        "retries": 0,
        "recoveries": 0,
        "rung": False,
        "child_pid": None,
    }
    assert {key: row[key] for key in changed} == changed
    assert row["input"] == GIVEN
    assert row["due_in"] == pytest.approx(0, abs=1)
    kept = ("id", "tail", "message", "queue", "created_at", "deadline_at", "started_at", "attempt")
    assert [row[key] for key in kept] == [before[key] for key in kept]

    store.set(claim.id, rung="true", version="NULL")
    found = store.claim(claim.id)
    assert found is not None
    assert (found[0].input, found[0].generation, found[0].passes) == (GIVEN, 1, 1)
    assert found[1] == []


def test_a_repeat_after_a_lost_answer_begins_no_further_pass(store: Store) -> None:
    claim = store.running()
    assert begin(store, claim)
    assert begin(store, claim)
    assert store.row(claim.id)["passes"] == 1


def test_a_zombie_begins_nothing(store: Store) -> None:
    claim = store.running()
    store.release_child()
    now = store.hold(claim.id)
    steps.record(store.conn, step_of(now, 0))
    assert not begin(store, claim)
    assert len(store.steps(claim.id)) == 1
    assert store.row(claim.id)["passes"] == 0


def test_a_zombie_that_comes_after_a_claim_of_the_next_pass_leaves_it_alone(
    store: Store,
) -> None:
    claim = store.running()
    assert begin(store, claim)
    now = store.hold(claim.id)
    steps.record(store.conn, step_of(now, 0))
    assert not begin(store, claim)
    assert len(store.steps(claim.id)) == 1


def test_a_take_over_that_is_being_committed_is_waited_for(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        store.release_child()
        beginning = background.blocked(other, begin, other, claim)
    assert beginning.result() is False
    assert store.row(claim.id)["passes"] == 0


def test_events_that_nobody_took_are_the_next_passes(store: Store) -> None:
    claim = store.running()
    for number in (1, 2, 3, 4):
        send(store, claim.id, number, key="two" if number == 2 else None)
    assert [take(store, claim, ordinal) for ordinal in (0, 1)] == ["1", "2"]
    assert begin(store, claim)

    now = store.hold(claim.id)
    assert [take(store, now, ordinal) for ordinal in (0, 1)] == ["3", "4"]
    # A repeat is still known for one, though its first belongs to no place any more.
    assert send(store, claim.id, 5, key="two") == "00000000-0000-4000-8000-000000000002"
    rows = store.conn.execute(
        "SELECT payload::text, consumed_ordinal FROM durable.workflow_events ORDER BY seq"
    ).fetchall()
    assert rows == [("2", None), ("3", 0), ("4", 1)]


def test_an_event_that_comes_meanwhile_is_the_next_passes(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        assert begin(store, claim)
        sending = background.blocked(other, send, other, claim.id, 1)
    sending.result()
    row = store.row(claim.id)
    assert row["status"] == "pending"
    assert take(store, store.hold(claim.id), 0) == "1"


def test_a_cancel_before_it_is_obeyed_by_the_next_claim(store: Store) -> None:
    claim = store.running()
    store.cancel(claim.id, reason="enough")
    assert begin(store, claim)
    row = store.row(claim.id)
    assert (row["status"], row["reason"]) == ("pending", "enough")
    assert store.hold(claim.id).control == "cancel"


def test_a_cancel_beside_it_ends_the_next_pass(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        assert begin(store, claim)
        canceling = background.blocked(other, other.cancel, claim.id)
    canceling.result()
    assert store.status(claim.id) == "canceled"


def test_a_child_of_the_last_pass_that_ends_now_disturbs_nothing(store: Store) -> None:
    claim = store.running()
    child = store.running(parent=claim.id, reports=True)
    waits.result(store.conn, claim.id, claim.attempt, child.id)
    assert begin(store, claim)
    store.finish(child, output="1")
    now = store.claim(claim.id)
    assert now is not None
    assert store.status(claim.id) == "running"
    assert begin(store, now[0])
    assert store.steps(claim.id) == []


def test_a_fan_out_that_still_counts_is_left_to_count(store: Store) -> None:
    claim = store.running()
    statement = (
        "INSERT INTO durable.fan_outs "
        " (id, shard, workflow_run_id, remaining, stop_at_first, limited)"
        " VALUES (%s, %s, %s, %s, false, false)"
    )
    ended, counting = (f"00000000-0000-4000-8000-{number:012}" for number in (1, 2))
    for fan_out, left in ((ended, 0), (counting, 2)):
        for shard in (-1, 0, 1):
            store.conn.execute(statement, (fan_out, shard, claim.id, left))
    assert begin(store, claim)
    rows = store.conn.execute("SELECT DISTINCT id::text FROM durable.fan_outs").fetchall()
    assert rows == [(counting,)]
