"""A run is one worker's, and comes with all that was ever recorded of it."""

from __future__ import annotations

import pytest

from durable.store import runs, steps
from durable.store.runs import Park
from tests.harness.store import Background, Store, step_of


def test_a_claim_brings_the_input_and_the_history_and_raises_the_fence(store: Store) -> None:
    run_id = store.start(input='{"args":["o-42"],"kwargs":{}}', message='{"queue": "orders"}')
    first = store.hold(run_id)
    steps.record(store.conn, step_of(first, output='{"b": 1, "a": 1e16}'))
    store.release_child()

    found = store.claim(run_id, worker="w2", pid=7)

    assert found is not None
    claim, history = found
    assert (first.attempt, claim.attempt) == (1, 3)  # the take-over raised it too
    assert (claim.input, claim.message) == (
        '{"args":["o-42"],"kwargs":{}}',
        '{"queue": "orders"}',
    )
    assert history == [("", 0, "charge", 1, "run", "succeeded", '{"b": 1, "a": 1e16}', None, None)]
    row = store.row(run_id)
    assert (row["status"], row["worker_id"], row["child_pid"]) == ("running", "w2", 7)
    assert row["due_in"] is None


def test_a_claimed_run_is_looked_at_again_at_its_deadline(store: Store) -> None:
    claim = store.running(deadline=100.0)
    assert store.row(claim.id)["due_in"] == pytest.approx(100, abs=5)


def test_of_two_messages_one_gets_the_run(
    store: Store, other: Store, background: Background
) -> None:
    run_id = store.start()
    with store.conn.transaction():
        assert store.claim(run_id) is not None
        second = background.blocked(other, other.claim, run_id, "w2")
    assert second.result() is None
    assert store.row(run_id)["worker_id"] == "w1"


def test_a_claim_that_waited_for_the_row_brings_what_was_committed_meanwhile(
    store: Store, other: Store, background: Background
) -> None:
    # As one statement with a CTE it returned the history as of before the wait.
    run_id = store.start()
    first = store.hold(run_id)
    with store.conn.transaction():
        steps.record(store.conn, step_of(first))
        store.release_child()
        claimed = background.call(other.claim, run_id, "w2")  # sees 'running' and ...
        assert claimed.result() is None  # ... does not wait: not pending in its snapshot
    with store.conn.transaction():
        store.conn.execute("SELECT FROM durable.workflow_runs WHERE id = %s FOR UPDATE", (run_id,))
        waiting = background.blocked(other, other.claim, run_id, "w2")
        store.conn.execute(
            "UPDATE durable.step_attempts SET output = '2' WHERE workflow_run_id = %s", (run_id,)
        )
    found = waiting.result()
    assert found is not None
    assert [step[6] for step in found[1]] == ["2"]


@pytest.mark.parametrize(
    "state",
    ["unknown", "another namespace", "running", "sleeping", "paused", "ended", "expired"],
)
def test_what_is_not_there_for_the_taking_is_left_alone(store: Store, state: str) -> None:
    run_id = store.start(
        namespace="other" if state == "another namespace" else store.namespace,
        delay=60.0 if state == "sleeping" else None,
    )
    if state == "unknown":
        run_id = "00000000-0000-4000-8000-000000000000"
    elif state == "running":
        store.hold(run_id)
    elif state == "paused":
        store.park(store.hold(run_id), Park("paused", "for a person"))
    elif state == "ended":
        store.finish(store.hold(run_id))
    elif state == "expired":
        store.set(run_id, expires_at="now() - interval '1 second'")
    before = None if state == "unknown" else store.row(run_id)["attempt"]

    assert store.claim(run_id) is None
    if before is not None:
        assert store.row(run_id)["attempt"] == before


def test_expiry_counts_until_the_first_claim_only(store: Store) -> None:
    claim = store.running(expires=60.0)
    assert store.row(claim.id)["expires_at"] is None


def test_an_ended_run_is_claimed_once_a_ring_for_its_undelivered_continuation(
    store: Store,
) -> None:
    claim = store.running(tail=True)
    store.finish(claim, output='"done"')
    assert store.claim(claim.id) is None
    store.set(claim.id, rung="true")

    again = store.hold(claim.id, worker="w2")

    assert (again.status, again.output, again.tail) == ("succeeded", '"done"', True)
    assert again.attempt == claim.attempt + 1
    assert store.claim(claim.id) is None  # a doubled message
    assert store.row(claim.id)["due_in"] == pytest.approx(30, abs=5)


def test_a_continuation_that_is_never_confirmed_is_repeated_ever_more_seldom(store: Store) -> None:
    claim = store.running(tail=True)
    store.finish(claim)
    store.set(claim.id, rung="true", completed_at="now() - interval '1 hour'")
    store.hold(claim.id)
    assert store.row(claim.id)["due_in"] == pytest.approx(3600, abs=5)


def test_a_late_word_of_the_first_delivery_does_not_count_for_the_second(store: Store) -> None:
    claim = store.running(tail=True)
    store.finish(claim)
    store.set(claim.id, rung="true")
    again = store.hold(claim.id)

    runs.tail_done(store.conn, claim.id, claim.attempt)
    assert store.row(claim.id)["due_in"] is not None
    runs.tail_done(store.conn, claim.id, again.attempt)
    assert store.row(claim.id)["due_in"] is None


def test_a_run_is_accepted_once_under_an_id(store: Store) -> None:
    run_id = store.start()
    run = runs.NewRun(run_id, store.namespace, "shop.other", "{}", "{}")
    assert runs.insert(store.conn, run) is False
    assert store.row(run_id)["workflow_name"] == "shop.order"


def test_a_new_run_is_doubted_only_after_its_message_had_time(store: Store) -> None:
    rung = store.row(store.start(rung=True, ring_again=20.0))
    unrung = store.row(store.start(rung=False))
    delayed = store.row(store.start(rung=False, delay=60.0))
    hurried = store.row(store.start(rung=False, delay=60.0, deadline=5.0))
    assert (rung["status"], rung["due_in"]) == ("pending", pytest.approx(20, abs=5))
    assert (unrung["status"], unrung["due_in"]) == ("pending", pytest.approx(0, abs=5))
    assert (delayed["status"], delayed["due_in"]) == ("sleeping", pytest.approx(60, abs=5))
    assert (hurried["status"], hurried["due_in"]) == ("sleeping", pytest.approx(5, abs=4))
