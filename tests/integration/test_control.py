"""The state machine of what people do to runs, on two real connections."""

from __future__ import annotations

import itertools
import json
import uuid

import pytest

from durable.control import STATES, TRANSITIONS, refusal, state_of
from durable.store import control, events, outcomes, waits
from durable.store.control import Change, From, Order
from durable.store.events import NewEvent
from durable.store.runs import Park
from durable.store.steps import record
from tests.harness.store import Background, Store, step_of

ACTIONS = tuple(TRANSITIONS)


def order(*run_ids: str, actor: str = "ada", reason: str | None = None) -> Order:
    return Order(str(uuid.uuid4()), run_ids, "default", actor, reason)


def act(action: str, store: Store, run_id: str) -> Change:
    if action == "restart":
        [change] = control.restart(store.conn, order(run_id), From("failed"))
    elif action == "settle":
        [change] = control.settle(
            store.conn, order(run_id), branch="", ordinal=0, name="charge", output="1"
        )
    else:
        [change] = getattr(control, action)(store.conn, order(run_id))
    return change


def make(store: Store, state: str) -> str:
    """Bring a run, which has tried a step, into a state."""
    claim = store.running()
    record(store.conn, step_of(claim, status="failed", context='{"final": true}'))
    if state == "pending":
        store.park(claim, Park("pending", "hand-back"))
    elif state in {"sleeping", "waiting", "paused"}:
        store.park(claim, Park(state, "test", delay=3600 if state == "sleeping" else None))
    elif state == "canceled":
        act("cancel", store, claim.id)
        store.finish(claim, "canceled")
    elif state in {"succeeded", "failed"}:
        store.finish(claim, state)
    elif state.startswith("running, asked to "):
        act(state.rpartition(" ")[2], store, claim.id)
    assert state_now(store, claim.id) == state
    return claim.id


def state_now(store: Store, run_id: str) -> str:
    row = store.row(run_id)
    if row["status"] == "running" and row["control"]:
        return f"running, asked to {row['control']}"
    return str(row["status"])


def expected(action: str, state: str) -> str:
    """Read the state after an action out of the table."""
    outcome = TRANSITIONS[action][state]
    if outcome is None or outcome == "same":
        return state
    return f"running, asked to {action}" if outcome == "asked" else outcome


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_does_in_each_state_what_the_table_says(
    store: Store, action: str, state: str
) -> None:
    run_id = make(store, state)
    change = act(action, store, run_id)
    outcome = TRANSITIONS[action][state]
    assert state_of(change) == state
    assert (refusal(action, change) is None) is (outcome is not None)
    assert change.changed is (outcome not in {None, "same"})
    assert state_now(store, run_id) == expected(action, state)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("first", ACTIONS)
def test_two_actions_at_once_come_one_after_the_other(
    store: Store, other: Store, background: Background, first: str, state: str
) -> None:
    for second in ACTIONS:
        run_id = make(store, state)
        with store.conn.transaction():
            act(first, store, run_id)
            waits = background.blocked(other, act, second, other, run_id)
        between = expected(first, state)
        assert state_of(waits.result(10)) == between, second
        assert state_now(store, run_id) == expected(second, between), second


def test_a_repeat_of_an_order_whose_answer_was_lost_is_no_second_one(store: Store) -> None:
    run_id = make(store, "failed")
    again = order(run_id)
    first = control.restart(store.conn, again, From("failed"))
    assert control.restart(store.conn, again, From("failed")) == first
    assert store.row(run_id)["generation"] == 1
    assert [each.action for each in control.actions(store.conn, run_id, "default")] == ["restart"]


def test_bulk_actions_do_not_wait_for_each_other_in_a_circle(
    store: Store, other: Store, background: Background
) -> None:
    ids = sorted(make(store, "pending") for _ in range(4))
    with store.conn.transaction():
        control.pause(store.conn, order(*ids[:1]))
        waits = background.blocked(other, control.cancel, other.conn, order(*reversed(ids)))
        control.pause(store.conn, order(*ids))
    assert all(change.changed for change in waits.result(10))
    assert {store.status(each) for each in ids} == {"canceled"}


def test_who_did_what_and_why_is_kept(store: Store) -> None:
    run_id = make(store, "sleeping")
    control.pause(store.conn, order(run_id, actor="ada", reason="the shop is closed"))
    control.resume(store.conn, order(run_id, actor="bob"))
    done = control.actions(store.conn, run_id, "default")
    assert [(e.action, e.actor, e.reason, e.before, e.after) for e in done] == [
        ("pause", "ada", "the shop is closed", "sleeping", "paused"),
        ("resume", "bob", None, "paused", "pending"),
    ]


def test_every_state_and_action_is_in_the_table() -> None:
    assert set(itertools.product(ACTIONS, STATES)) == {
        (action, state) for action, row in TRANSITIONS.items() for state in row
    }


def test_a_pause_is_not_outrun_by_a_wake_up_that_comes_with_it(store: Store) -> None:
    claim = store.running()
    act("pause", store, claim.id)  # raises `wake`, as everything does that is done to a run
    store.park(claim, Park("sleeping", "sleep", delay=60))
    assert (store.status(claim.id), store.row(claim.id)["due_in"]) == ("paused", None)
    assert store.row(claim.id)["control"] is None


def test_a_run_that_was_asked_to_pause_is_paused_when_its_process_dies(store: Store) -> None:
    claim = store.running()
    act("pause", store, claim.id)
    assert store.release_child() == [claim.id]
    assert (store.status(claim.id), store.row(claim.id)["due_in"]) == ("paused", None)


def test_a_delayed_start_keeps_its_time_over_a_pause(store: Store) -> None:
    run_id = store.start(rung=False, delay=3600.0)
    act("pause", store, run_id)
    assert store.row(run_id)["due_in"] is None
    act("resume", store, run_id)
    assert store.status(run_id) == "sleeping"
    assert 3590 < store.row(run_id)["due_in"] <= 3600


def test_a_paused_run_still_has_its_deadline(store: Store) -> None:
    run_id = store.start(rung=False, deadline=100.0)
    act("pause", store, run_id)
    assert 90 < store.row(run_id)["due_in"] <= 100


def test_a_restart_has_a_deadline_as_long_as_the_first_one(store: Store) -> None:
    claim = store.running(deadline=100.0)
    store.set(
        claim.id,
        created_at="now() - interval '1 day'",
        deadline_at="now() - interval '1 day' + interval '100 s'",
    )
    store.finish(claim, "failed")
    act("restart", store, claim.id)
    deadline = "SELECT extract(epoch FROM deadline_at - now())::int FROM durable.workflow_runs"
    assert store.conn.execute(deadline).fetchone() == (100,)


# --- restart: what counts, what is set aside


def history(store: Store, *statuses: str) -> str:
    """A failed run with steps s0, s1, ... that ended so."""
    claim = store.running()
    for ordinal, status in enumerate(statuses):
        record(store.conn, step_of(claim, ordinal, f"s{ordinal}", status=status))
    store.finish(claim, "failed")
    return claim.id


def restart(store: Store, run_id: str, begin: From) -> list[int]:
    """Restart; the positions that still count."""
    control.restart(store.conn, order(run_id), begin)
    return [
        ordinal
        for ordinal, name, *_, aside in store.steps(run_id)
        if aside == 0 and name != "result"
    ]


@pytest.mark.parametrize(
    ("begin", "left"),
    [
        (From("failed"), [0, 1, 2]),  # s1 had failed too, and the body had lived with it
        (From("beginning"), []),
        (From("step", "s2"), [0, 1]),
        (From("step", "s0"), []),
        (From("step", "s2", 2), [0, 1]),
    ],
)
def test_a_restart_sets_aside_what_follows_its_place(
    store: Store, begin: From, left: list[int]
) -> None:
    run_id = history(store, "succeeded", "failed", "succeeded", "failed")
    assert restart(store, run_id, begin) == left
    assert len(store.steps(run_id)) == 4  # nothing is destroyed


def test_a_step_that_failed_and_then_succeeded_has_not_failed(store: Store) -> None:
    claim = store.running()
    record(store.conn, step_of(claim, 0, "s0", status="failed"))
    record(store.conn, step_of(claim, 1, "s1", status="failed"))
    record(store.conn, step_of(claim, 1, "s1", attempt=2))
    store.finish(claim, "failed")
    assert restart(store, claim.id, From("failed")) == [0, 1, 1]


def test_a_failure_that_the_body_has_lived_with_stays(store: Store) -> None:
    run_id = history(store, "failed", "succeeded")
    assert restart(store, run_id, From("failed")) == [0, 1]


@pytest.mark.parametrize("lived_with", [False, True])
def test_a_started_task_that_failed_is_started_anew_unless_the_body_went_on(
    store: Store, lived_with: bool
) -> None:
    claim = store.running()
    task = str(uuid.uuid4())
    row = step_of(claim, 0, "child", output=json.dumps({"ids": [task]}))
    record(store.conn, row._replace(kind="dispatch"))
    record(store.conn, step_of(claim, 1, "other"))
    failed = outcomes.Outcome(claim.id, task, "child", "failed", error="{}")
    outcomes.deliver(store.conn, failed)
    if lived_with:
        record(store.conn, step_of(claim, 2, "fallback")._replace(seconds=0.0))
    store.finish(claim, "failed")
    assert restart(store, claim.id, From("failed")) == ([0, 1, 2] if lived_with else [1])
    assert outcome_rows(store, claim.id) == [(task, "failed", 0 if lived_with else 1)]


def test_the_outcome_of_a_task_is_kept_for_a_parent_that_is_restarted(store: Store) -> None:
    claim = store.running()
    store.finish(claim, "failed")
    task = str(uuid.uuid4())
    outcomes.deliver(store.conn, outcomes.Outcome(claim.id, task, "child", "succeeded", "1"))
    assert outcome_rows(store, claim.id) == [(task, "succeeded", 0)]


def outcome_rows(store: Store, run_id: str) -> list[tuple[str, str, int]]:
    return store.conn.execute(
        "SELECT branch, status, set_aside FROM durable.step_attempts"
        " WHERE workflow_run_id = %s AND kind = 'result'",
        (run_id,),
    ).fetchall()


def test_a_restart_from_a_step_that_is_not_recorded_does_nothing(store: Store) -> None:
    run_id = history(store, "failed")
    [change] = control.restart(store.conn, order(run_id), From("step", "s7"))
    assert not change.changed
    assert store.status(run_id) == "failed"


def test_a_restart_of_a_run_without_a_failed_step_keeps_all(store: Store) -> None:
    run_id = history(store, "succeeded", "succeeded")
    assert restart(store, run_id, From("failed")) == [0, 1]


def test_events_taken_after_the_place_can_be_taken_again(store: Store) -> None:
    claim = store.running()
    for number in range(2):
        payload = json.dumps(number)
        event = NewEvent(str(uuid.uuid4()), claim.id, "default", "approval", payload)
        events.send(store.conn, event)
        place = waits.Place(claim.id, claim.attempt, "", number, "approval")
        taken = waits.event(store.conn, place, None)
        assert taken is not None
        assert taken.output == payload
    store.finish(claim, "failed")
    control.restart(store.conn, order(claim.id), From("step", "approval", 1))
    found = events.of_run(store.conn, claim.id, "default")
    assert [each.consumed_at is None for each in found] == [False, True]


def test_outcomes_of_tasks_that_start_anew_are_set_aside_with_their_start(store: Store) -> None:
    claim = store.running()
    tasks = [str(uuid.uuid4()) for _ in range(2)]
    for ordinal, task in enumerate(tasks):
        output = json.dumps({"ids": [task]})
        row = step_of(claim, ordinal, "child", output=output)
        record(store.conn, row._replace(kind="dispatch"))
        outcomes.deliver(store.conn, outcomes.Outcome(claim.id, task, "child", "succeeded", "1"))
    store.finish(claim, "failed")
    control.restart(store.conn, order(claim.id), From("step", "child", 1))
    again = store.hold(claim.id)
    known = [waits.result(store.conn, again.id, again.attempt, task) for task in tasks]
    assert [wait and wait.status for wait in known] == ["succeeded", "running"]


def test_a_step_settled_by_hand_counts_as_done_and_its_failures_do_not(store: Store) -> None:
    run_id = history(store, "succeeded", "failed")
    [change] = control.settle(
        store.conn, order(run_id), branch="", ordinal=1, name="s1", output='"paid"'
    )
    assert change.changed
    assert restart(store, run_id, From("failed")) == [0, 1]
    claim = store.claim(run_id)
    assert claim is not None
    last = claim[1][-1]
    assert (last[1], last[2], last[3], last[5], last[6]) == (1, "s1", 2, "succeeded", '"paid"')
