"""Which worker has the code of a run: who may claim it, who rings it, what waits and why."""

from __future__ import annotations

from typing import Any

import pytest

from durable.store import code, dispatch, runs
from durable.store.code import Unfinished
from durable.store.dispatch import Code, Due
from durable.store.runs import Park
from tests.harness.store import Background, Store

PAST = "now() - interval '1 second'"
ORDER = ["shop.order"]


def ring(store: Store, **options: Any) -> Due:
    given = {"names": ORDER, "idle_queues": ["celery"], "batch": 10, "ring_again": 20.0}
    return dispatch.due(
        store.conn, store.namespace, **{**given, "late_error": '{"message": "late"}', **options}
    )


def rung(store: Store, **options: Any) -> list[str]:
    return [doorbell.id for doorbell in ring(store, **options).doorbells]


def claim(store: Store, run_id: str, *versions: str) -> runs.Claim | None:
    found = runs.claim(
        store.conn, run_id, "default", worker="w1", pid=1, tail_timeout=30.0, versions=versions
    )
    return None if found is None else found[0]


def hand_back(store: Store, run_id: str, *versions: str) -> bool:
    return code.hand_back(store.conn, run_id, "default", "w1", versions or None)


# --- claims


def test_a_run_of_a_version_is_claimed_by_code_that_has_it(store: Store) -> None:
    run_id = store.start(version="2")
    assert claim(store, run_id) is None
    assert claim(store, run_id, "1", "2.0") is None
    claimed = claim(store, run_id, "1", "2")
    assert claimed is not None
    assert claimed.version == "2"


def test_a_run_without_a_version_is_claimed_by_any_code(store: Store) -> None:
    assert claim(store, store.start()) is not None
    assert claim(store, store.start(), "7") is not None


def test_what_follows_an_end_can_be_delivered_by_any_code(store: Store) -> None:
    run_id = store.start(version="2", tail=True)
    claimed = claim(store, run_id, "2")
    assert claimed is not None
    store.finish(claimed, output='"done"')
    store.set(run_id, available_at=PAST)
    assert rung(store, versions=[]) == [run_id]
    again = claim(store, run_id)
    assert again is not None
    assert again.output == '"done"'


# --- rings


def test_a_version_is_rung_when_a_live_worker_has_it(store: Store) -> None:
    run_id = store.start(version="2", rung=False)
    assert rung(store, versions=["shop.order@1", "shop.other@2"]) == []
    assert rung(store, versions=["shop.order@2"]) == [run_id]


def test_a_run_that_was_handed_back_is_rung_by_a_worker_that_has_it_for_itself(
    store: Store,
) -> None:
    run_id = store.start(version="2")
    assert hand_back(store, run_id, "1")
    live = {"versions": ["shop.order@2"]}
    assert rung(store, **live, own=Code(ORDER, ["shop.order@1"])) == []
    [doorbell] = ring(store, **live, own=Code(ORDER, ["shop.order@2"])).doorbells
    assert (doorbell.id, doorbell.direct) == (run_id, True)

    # Should that message be lost too, it is rung again while that worker is idle.
    store.set(run_id, available_at=PAST)
    mine = Code(ORDER, ["shop.order@2"])
    assert rung(store, **live, own=mine) == []
    assert rung(store, **live, own=Code(ORDER), own_idle=True) == []
    assert rung(store, **live, own=mine, own_idle=True) == [run_id]
    assert claim(store, run_id, "2") is not None
    assert store.row(run_id)["handed_back"] == 0


def test_where_some_workers_may_not_know_runs_each_rings_for_itself(store: Store) -> None:
    run_id = store.start(rung=False)
    assert rung(store, direct=True) == []
    [doorbell] = ring(store, direct=True, own=Code(ORDER)).doorbells
    assert (doorbell.id, doorbell.direct) == (run_id, True)


def test_a_deadline_ends_a_run_whose_code_is_gone(store: Store) -> None:
    run_id = store.start(version="2", deadline=60.0, rung=False, tail=True)
    store.set(run_id, deadline_at=PAST, available_at=PAST)
    rung(store, direct=True)  # by a worker that lacks the task, and is to send no message
    row = store.row(run_id)
    assert (row["status"], row["rung"]) == ("failed", False)
    store.set(run_id, available_at=PAST)
    assert rung(store, direct=True, own=Code(ORDER)) == [run_id]


# --- messages that went astray


def test_the_first_message_astray_is_made_good_at_once_later_ones_with_pauses(
    store: Store, other: Store
) -> None:
    other.conn.execute("LISTEN durable")
    run_id = store.start(version="2")
    pauses = []
    for _ in range(10):
        store.set(run_id, rung="true")
        assert hand_back(store, run_id, "1")
        pauses.append(store.row(run_id)["due_in"])
    assert pauses == pytest.approx([0, 1, 2, 4, 8, 16, 32, 60, 60, 60], abs=0.5)
    assert len(list(other.conn.notifies(timeout=0.2))) == 1
    row = store.row(run_id)
    assert row["reason"] == (
        "lacking code: w1 got its message and lacks version 2 of shop.order"
        " (10 in a row handed back)"
    )
    assert row["status"] == "pending"


@pytest.mark.parametrize("versions", [(), ("1",)])
def test_a_run_that_a_worker_has_claimed_meanwhile_is_not_put_aside(
    store: Store, other: Store, background: Background, versions: tuple[str, ...]
) -> None:
    # Its message came twice: to a worker that has the code, and to one that has not.
    run_id = store.start(version="2")
    with store.conn.transaction():
        assert claim(store, run_id, "2") is not None
        handing = background.blocked(other, hand_back, other, run_id, *versions)
    assert handing.result() is False
    row = store.row(run_id)
    assert (row["status"], row["handed_back"], row["reason"]) == ("running", 0, None)


def test_a_worker_that_has_the_version_hands_nothing_back(store: Store) -> None:
    assert not hand_back(store, store.start(version="2"), "2")
    assert not hand_back(store, store.start(), "2")
    assert not code.hand_back(store.conn, store.start(), "elsewhere", "w1")


def test_a_deadline_is_not_slept_through(store: Store) -> None:
    run_id = store.start(deadline=5.0)
    store.set(run_id, handed_back="9")
    assert hand_back(store, run_id)
    assert store.row(run_id)["due_in"] == pytest.approx(5, abs=1)


# --- for people


def test_a_due_run_that_nobody_has_says_so_once(store: Store) -> None:
    store.beat("w1", workflows=ORDER, versions=["shop.order@1"])
    store.beat("w2", namespace="other", workflows=["shop.gone"], versions=["shop.order@2"])
    lacking = {
        store.start(version="2", rung=False): "lacking code: no live worker has version 2 of"
        " shop.order",
        store.start(name="shop.gone", rung=False): "lacking code: no live worker has shop.gone",
    }
    doubted = store.start(name="shop.gone")
    store.set(doubted, available_at=PAST)
    lacking[doubted] = "lacking code: no live worker has shop.gone"
    for had in (
        store.start(version="1", rung=False),
        store.start(rung=False),
        store.start(name="shop.gone"),  # its message may yet come to somebody
        store.start(name="shop.gone", delay=60.0, rung=False),
        store.start(name="shop.gone", rung=False, namespace="other"),
    ):
        assert store.row(had)["reason"] is None
    assert code.tell_lacking(store.conn, "default") == lacking
    assert code.tell_lacking(store.conn, "default") == {}
    assert all(store.row(run_id)["reason"] == why for run_id, why in lacking.items())

    store.beat("w3", workflows=["shop.order"], versions=["shop.order@2"])
    run_id = next(iter(lacking))
    assert rung(store, versions=["shop.order@2"], names=["shop.order"])
    assert claim(store, run_id, "2") is not None
    assert store.row(run_id)["reason"] is None


def test_unfinished_runs_are_counted_by_what_they_do(store: Store) -> None:
    store.start()
    store.running()
    store.start(delay=60.0)
    store.park(store.running(), Park("waiting", "event go"))
    store.park(store.running(), Park("paused", "for a person"))
    told, over = store.running(tail=True), store.running()
    store.finish(told)
    store.finish(over)
    store.start(name="shop.other", version="2")
    store.start(namespace="elsewhere")
    gone = store.start()
    hand_back(store, gone)

    def count(*names: str, versions: tuple[str, ...] = ()) -> Unfinished:
        return code.unfinished(store.conn, "default", names, versions)

    assert count() == Unfinished(active=4, parked=2, paused=1, delivering=1, lacking=1)
    assert count().total == 8
    assert count("shop.other") == Unfinished(1, 0, 0, 0, 0)
    assert count(versions=("2",)) == Unfinished(1, 0, 0, 0, 0)
    assert count("shop.none").total == 0
