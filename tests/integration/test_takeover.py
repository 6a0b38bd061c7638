"""Runs of the dead go on, and nobody who lives loses one."""

from __future__ import annotations

import pytest

from durable.store import steps, workers
from durable.store.runs import Park
from durable.store.steps import Written
from durable.store.workers import Peer
from tests.harness.store import RECOVERY, Background, Store, step_of


def peer_of(store: Store, worker: str) -> Peer:
    """A worker as its peers see it now."""
    pulse = store.beat("judge")
    [peer] = [each for each in pulse.peers if each.id == worker]
    return peer


def bury(store: Store, peer: Peer) -> list[str] | None:
    return workers.bury(store.conn, peer, store.namespace, RECOVERY)


# --- beats


def test_a_beat_reports_and_shows_the_peers_and_the_runs_held(store: Store) -> None:
    store.beat("w1", queues=["orders"], workflows=["shop.order"], idle_beats=3)
    store.beat("elsewhere", namespace="other")
    claim = store.running()
    pulse = store.beat("w1", queues=["orders"], workflows=["shop.order"], idle_beats=4)
    assert pulse.held == {claim.id: claim.attempt}
    # What it sees of itself is as of before this beat.
    assert list(pulse.peers) == [Peer("w1", 1, ["orders"], ["shop.order"], 3)]


def test_a_run_that_ended_is_held_no_more(store: Store) -> None:
    store.finish(store.running())
    assert store.beat("w1").held == {}


def test_a_worker_that_leaves_is_gone(store: Store) -> None:
    store.beat("w1")
    workers.leave(store.conn, "w1")
    assert store.beat("w2").peers == []


# --- burying


def test_the_runs_of_a_dead_worker_go_on_at_once_under_a_new_fence(store: Store) -> None:
    store.beat("w1")
    held = [store.running() for _ in range(3)]
    untouched = store.hold(store.start(), worker="w2")
    store.beat("w2")

    released = bury(store, peer_of(store, "w1"))

    assert sorted(released or ()) == sorted(claim.id for claim in held)
    for claim in held:
        row = store.row(claim.id)
        assert (row["status"], row["reason"], row["rung"]) == ("pending", "worker lost", False)
        assert row["due_in"] == pytest.approx(0, abs=2)
        assert row["attempt"] == claim.attempt + 1
        assert row["recoveries"] == 1
        assert steps.record(store.conn, step_of(claim)) is Written.FENCED
    assert store.status(untouched.id) == "running"


def test_a_worker_that_beat_after_all_is_not_buried(store: Store) -> None:
    store.beat("w1")
    claim = store.running()
    seen = peer_of(store, "w1")
    store.beat("w1")
    assert bury(store, seen) is None
    assert store.status(claim.id) == "running"


def test_a_burial_waits_for_a_beat_that_is_being_committed(
    store: Store, other: Store, background: Background
) -> None:
    store.beat("w1")
    claim = store.running()
    seen = peer_of(store, "w1")
    with store.conn.transaction():
        store.beat("w1")
        buried = background.blocked(other, bury, other, seen)
    assert buried.result() is None
    assert store.status(claim.id) == "running"


def test_of_two_peers_that_see_it_dead_one_takes_over(
    store: Store, other: Store, background: Background
) -> None:
    store.beat("w1")
    claim = store.running()
    seen = peer_of(store, "w1")
    with store.conn.transaction():
        assert bury(store, seen) == [claim.id]
        second = background.blocked(other, bury, other, seen)
    assert second.result() is None
    assert store.row(claim.id)["recoveries"] == 1


def test_a_worker_buried_by_mistake_is_registered_again_and_its_old_runs_stay_lost(
    store: Store,
) -> None:
    store.beat("w1")
    claim = store.running()
    bury(store, peer_of(store, "w1"))
    assert store.beat("w1").held == {}
    assert [peer.id for peer in store.beat("w1").peers if peer.id == "w1"] == ["w1"]
    assert not store.park(claim, Park("sleeping", "retry", delay=1.0))


def test_messages_that_a_dead_worker_may_hide_are_doubted_at_once(store: Store) -> None:
    store.beat("w1", queues=["orders"])
    hidden = store.start(queue="orders")
    elsewhere = store.start(queue="mail")
    sleeping = store.start(queue="orders", rung=False, delay=60.0)
    bury(store, peer_of(store, "w1"))
    assert store.row(hidden)["due_in"] == pytest.approx(0, abs=2)
    assert store.row(elsewhere)["due_in"] == pytest.approx(20, abs=5)
    assert store.row(sleeping)["due_in"] == pytest.approx(60, abs=5)


# --- children


def test_a_dead_child_gives_back_what_it_held_and_no_more(store: Store) -> None:
    lost = store.hold(store.start(), pid=1)
    kept = store.hold(store.start(), pid=2)
    foreign = store.hold(store.start(), worker="w2", pid=1)
    assert store.release_child("w1", pid=1) == [lost.id]
    assert store.row(lost.id)["reason"] == "child lost"
    assert [store.status(claim.id) for claim in (kept, foreign)] == ["running", "running"]


def test_a_released_run_is_announced(store: Store, other: Store) -> None:
    other.conn.execute("LISTEN durable")
    store.running()
    store.release_child()
    assert [note.payload for note in other.conn.notifies(timeout=5, stop_after=1)] == ["default"]


# --- how often


def lose(store: Store, run_id: str, times: int = 1) -> None:
    for _ in range(times):
        store.hold(run_id)
        store.release_child()


def test_a_run_that_takes_its_worker_down_too_often_is_ended(store: Store) -> None:
    run_id = store.start(tail=True)
    lose(store, run_id, RECOVERY.max_recoveries - 1)
    assert store.status(run_id) == "pending"
    lose(store, run_id)
    row = store.row(run_id)
    assert (row["status"], row["reason"], row["error"]) == ("failed", "lost", RECOVERY.error)
    assert row["completed_at"] is not None
    assert row["due_in"] == pytest.approx(0, abs=2)  # Celery is to be told


def test_a_step_committed_in_between_starts_the_count_anew(store: Store) -> None:
    run_id = store.start()
    lose(store, run_id, RECOVERY.max_recoveries - 1)
    claim = store.hold(run_id)
    steps.record(store.conn, step_of(claim))
    store.release_child()
    assert (store.status(run_id), store.row(run_id)["recoveries"]) == ("pending", 1)
    lose(store, run_id, RECOVERY.max_recoveries - 2)
    assert store.status(run_id) == "pending"
    lose(store, run_id)
    assert store.status(run_id) == "failed"


def test_steps_of_earlier_claims_are_no_progress(store: Store) -> None:
    run_id = store.start()
    steps.record(store.conn, step_of(store.hold(run_id)))
    store.release_child()
    lose(store, run_id, RECOVERY.max_recoveries - 1)
    assert store.status(run_id) == "failed"


def test_sleeping_and_waking_is_no_recovery(store: Store) -> None:
    run_id = store.start()
    for _ in range(RECOVERY.max_recoveries + 2):
        store.park(store.hold(run_id), Park("pending", "hand-back"))
    assert store.row(run_id)["recoveries"] == 0


# --- orphans


def test_a_claim_whose_answer_was_lost_is_released(store: Store) -> None:
    store.beat("w1")
    claim = store.running()
    held = store.beat("w1").held
    assert workers.release_orphans(store.conn, "w1", held, RECOVERY) == [claim.id]
    assert store.row(claim.id)["reason"] == "orphaned"


def test_an_orphan_that_was_claimed_anew_since_it_was_seen_is_not_released(store: Store) -> None:
    store.beat("w1")
    claim = store.running()
    held = store.beat("w1").held
    store.release_child()
    store.hold(claim.id)  # by the same worker
    assert workers.release_orphans(store.conn, "w1", held, RECOVERY) == []
    assert store.status(claim.id) == "running"


def test_an_orphan_that_ended_since_it_was_seen_stays_ended(store: Store) -> None:
    store.beat("w1")
    claim = store.running()
    held = store.beat("w1").held
    store.finish(claim)
    assert workers.release_orphans(store.conn, "w1", held, RECOVERY) == []
    assert store.status(claim.id) == "succeeded"


# --- workers that nobody knows


def test_runs_of_an_unknown_worker_go_on_after_a_lease(store: Store) -> None:
    store.beat("w1")
    known, unknown, fresh = store.running(), store.running(), store.running()
    for claim in (unknown, fresh):
        store.set(claim.id, worker_id="'gone'")
    for claim in (known, unknown):
        store.set(claim.id, claimed_at="now() - interval '11 seconds'")
    released = workers.release_unknown(store.conn, store.namespace, 10.0, RECOVERY)
    assert released == [unknown.id]
    assert store.row(unknown.id)["reason"] == "worker unknown"


def test_unknown_workers_of_another_namespace_are_its_own_affair(store: Store) -> None:
    claim = store.running()
    store.set(claim.id, claimed_at="now() - interval '1 hour'")
    assert workers.release_unknown(store.conn, "other", 10.0, RECOVERY) == []
