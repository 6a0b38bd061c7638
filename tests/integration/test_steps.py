"""One fenced statement a step; what zero rows mean is looked into."""

from __future__ import annotations

import pytest

from durable.store import steps
from durable.store.steps import Written
from tests.harness.store import Background, Store, step_of


def test_a_step_is_recorded_and_loaded_as_it_was(store: Store) -> None:
    claim = store.running()
    output = '{"sku": 1, "b": -0.0, "a": 1e16}'
    assert steps.record(store.conn, step_of(claim, output=output)) is Written.RECORDED

    [row] = steps.of_run(store.conn, claim.id, store.namespace)
    assert (row.name, row.attempt, row.status, row.output) == ("charge", 1, "succeeded", output)
    assert row.completed_at is not None
    assert (row.completed_at - row.started_at).total_seconds() == pytest.approx(0.01)


def test_a_repeat_after_a_lost_answer_finds_the_step_in_place(store: Store) -> None:
    claim = store.running()
    step = step_of(claim)
    assert [steps.record(store.conn, step) for _ in range(3)] == [Written.RECORDED] * 3
    assert len(store.steps(claim.id)) == 1


def test_a_worker_that_lost_its_run_is_told_and_writes_nothing(store: Store) -> None:
    claim = store.running()
    store.release_child()
    assert steps.record(store.conn, step_of(claim)) is Written.FENCED
    store.hold(claim.id, worker="w2")
    assert steps.record(store.conn, step_of(claim)) is Written.FENCED
    assert store.steps(claim.id) == []


def test_a_step_that_was_recorded_before_the_loss_is_still_no_licence_to_go_on(
    store: Store,
) -> None:
    claim = store.running()
    steps.record(store.conn, step_of(claim))
    store.release_child()
    assert steps.record(store.conn, step_of(claim)) is Written.FENCED
    assert steps.was_recorded(store.conn, step_of(claim))


@pytest.mark.parametrize("end", ["finished", "unknown"])
def test_a_run_that_is_over_or_gone_takes_no_step(store: Store, end: str) -> None:
    claim = store.running()
    if end == "finished":
        store.finish(claim)
    else:
        store.conn.execute("DELETE FROM durable.workflow_runs")
    assert steps.record(store.conn, step_of(claim)) is Written.FENCED
    assert not steps.was_recorded(store.conn, step_of(claim))


def test_a_run_that_was_asked_to_stop_keeps_its_step_and_says_so(store: Store) -> None:
    claim = store.running()
    store.cancel(claim.id)
    step = step_of(claim)
    assert [steps.record(store.conn, step) for _ in range(2)] == [Written.CANCEL] * 2
    assert len(store.steps(claim.id)) == 1


def test_a_stop_that_comes_after_the_step_is_told_at_its_repeat(store: Store) -> None:
    claim = store.running()
    steps.record(store.conn, step_of(claim))
    store.cancel(claim.id)
    assert steps.record(store.conn, step_of(claim)) is Written.CANCEL


def test_fenced_goes_before_stopped(store: Store) -> None:
    claim = store.running()
    store.cancel(claim.id)
    store.release_child()  # which ends it
    assert steps.record(store.conn, step_of(claim)) is Written.FENCED
    assert store.steps(claim.id) == []


def test_a_take_over_waits_for_a_step_that_is_being_committed_and_its_claim_loads_it(
    store: Store, other: Store, background: Background
) -> None:
    # Without FOR SHARE the claim fits between insert and commit, and the step runs twice.
    claim = store.running()

    def take_over() -> list[object]:
        other.release_child()
        found = other.claim(claim.id, "w2")
        assert found is not None
        return list(found[1])

    with store.conn.transaction():
        assert steps.record(store.conn, step_of(claim)) is Written.RECORDED
        history = background.blocked(other, take_over)
    assert len(history.result()) == 1


def test_a_step_waits_for_a_take_over_that_is_being_committed_and_is_fenced(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    with store.conn.transaction():
        store.release_child()
        written = background.blocked(other, steps.record, other.conn, step_of(claim))
    assert written.result() is Written.FENCED
    assert store.steps(claim.id) == []


def test_steps_of_one_run_do_not_wait_for_each_other(store: Store, other: Store) -> None:
    claim = store.running()
    with store.conn.transaction():
        steps.record(store.conn, step_of(claim, 0))
        assert steps.record(other.conn, step_of(claim, 1)) is Written.RECORDED


def test_steps_are_listed_for_their_own_namespace_only(store: Store) -> None:
    claim = store.running()
    steps.record(store.conn, step_of(claim))
    assert steps.of_run(store.conn, claim.id, "other") == []
