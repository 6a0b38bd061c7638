"""Items end at the same time, twice, or not at all; the parent is woken once."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from durable.store import fan_outs
from durable.store.fan_outs import NewFanOut, State
from durable.store.runs import Claim, NewRun, Park
from durable.store.waits import Place
from tests.harness.store import Background, Store

WAITING = Park("waiting", "items")
SHARDS = "SELECT count(*) FROM durable.fan_outs WHERE id = %s"


@dataclass(frozen=True)
class FanOut:
    """A fan-out whose items are in Postgres, and its parent, which runs."""

    store: Store
    parent: Claim
    place: Place
    new: NewFanOut

    def id_of(self, index: int) -> str:
        return str(uuid.uuid5(uuid.UUID(self.new.id), str(index)))

    def rows(self, limit: int | None = None) -> list[NewRun]:
        limit = self.new.items if limit is None else limit
        row = NewRun("", "", "shop.ship", '{"args":[],"kwargs":{}}', "{}", rung=False)
        return [
            replace(row, id=self.id_of(index), fan_index=index, held=index >= limit)
            for index in range(self.new.items)
        ]

    def open(self) -> State | None:
        return fan_outs.open(self.store.conn, self.place, self.new)

    def insert(self, limit: int | None = None) -> bool:
        return fan_outs.insert(self.store.conn, self.place, self.new.id, self.rows(limit))

    def hold(self, index: int) -> Claim:
        return self.store.hold(self.id_of(index))

    def end(self, index: int, status: str = "succeeded", **outcome: Any) -> None:
        assert self.store.finish(self.hold(index), status, **outcome)

    def status(self, index: int) -> str:
        return self.store.status(self.id_of(index))

    def statuses(self) -> list[str]:
        return [self.status(index) for index in range(self.new.items)]

    def park(self) -> None:
        assert self.store.park(self.parent, WAITING)

    def settle(self) -> State:
        fan_outs.settle(self.store.conn, self.place, self.new.id)
        state = self.open()
        assert state is not None
        return state

    def parent_woken(self) -> tuple[str, int]:
        """The parent's status, and how often it was woken."""
        row = self.store.row(self.parent.id)
        return row["status"], row["wake"]


def begin(
    store: Store, items: int, *, limit: int | None = None, stop_at_first: bool = True
) -> FanOut:
    parent = store.running()
    place = Place(parent.id, parent.attempt, "", 0, "ship")
    new = NewFanOut(str(uuid.uuid4()), items, stop_at_first, limited=limit is not None)
    fan_out = FanOut(store, parent, place, new)
    assert fan_out.open() is not None
    assert fan_out.insert(limit)
    assert fan_outs.started(store.conn, place)
    return fan_out


@contextmanager
def locked(store: Store, run_id: str) -> Iterator[None]:
    """Hold the lock of a run's row."""
    with store.conn.transaction():
        store.conn.execute("SELECT FROM durable.workflow_runs WHERE id = %s FOR UPDATE", [run_id])
        yield


# --- begun once


def test_a_repeated_beginning_finds_the_first_one_and_changes_nothing(store: Store) -> None:
    fan_out = begin(store, 20)
    fan_out.end(0)
    again = replace(fan_out, new=replace(fan_out.new, id=str(uuid.uuid4()), items=3))
    state = again.open()
    assert state is not None
    assert (state.id, state.items, state.started) == (fan_out.new.id, 20, True)
    assert not state.wait.over
    assert store.conn.execute(SHARDS, [fan_out.new.id]).fetchone() == (17,)
    assert store.conn.execute(SHARDS, [again.new.id]).fetchone() == (0,)


def test_a_repeated_insert_leaves_what_became_of_the_items(store: Store) -> None:
    fan_out = begin(store, 4, limit=3)
    fan_out.end(0)
    held = fan_out.hold(1)
    assert fan_out.insert(3)
    assert fan_out.statuses() == ["succeeded", "running", "pending", "pending"]
    assert store.row(held.id)["attempt"] == held.attempt


def test_items_are_due_now_unrung_and_tied_to_their_parent(store: Store) -> None:
    fan_out = begin(store, 2, limit=1)
    due, held = (store.row(fan_out.id_of(index)) for index in range(2))
    assert (due["status"], due["rung"], due["due_in"]) == (
        "pending",
        False,
        pytest.approx(0, abs=2),
    )
    assert (held["status"], held["held"], held["due_in"]) == ("waiting", True, None)
    assert {due["on_parent_cancel"], held["on_parent_cancel"]} == {"cancel"}
    assert due["namespace_id"] == "default"


def test_a_claim_that_has_lost_the_parent_writes_nothing(store: Store) -> None:
    fan_out = begin(store, 1)
    fan_out.end(0)
    store.release_child()
    assert fan_out.open() is None
    assert not fan_out.insert()
    assert not fan_outs.started(store.conn, fan_out.place)
    fan_outs.settle(store.conn, fan_out.place, fan_out.new.id)
    assert store.steps(fan_out.parent.id) == [(0, "ship", 1, "running", 0)]


def test_a_fan_out_of_nothing_is_over_at_once(store: Store) -> None:
    parent = store.running()
    place = Place(parent.id, parent.attempt, "", 0, "ship")
    for _ in range(2):
        state = fan_outs.open(store.conn, place, NewFanOut(str(uuid.uuid4()), 0, True, False))
        assert state is not None
        assert (state.wait.status, state.wait.output) == ("succeeded", "[]")


# --- the last end


@pytest.mark.parametrize("last", [(0, 1), (0, 16)], ids=["two shards", "one shard"])
def test_two_last_ends_at_once_wake_the_parent_once(
    store: Store, other: Store, background: Background, last: tuple[int, int]
) -> None:
    fan_out = begin(store, 33)
    for index in set(range(33)) - set(last):
        fan_out.end(index)
    fan_out.park()
    first, second = map(fan_out.hold, last)
    with store.conn.transaction():
        store.finish(first)
        ended = background.blocked(other, other.finish, second)
        assert fan_out.parent_woken() == ("waiting", 0)
    assert ended.result()
    assert fan_out.parent_woken() == ("pending", 1)


def test_ends_of_other_shards_do_not_wait_for_each_other(store: Store, other: Store) -> None:
    fan_out = begin(store, 34)
    first, second = fan_out.hold(0), fan_out.hold(1)
    other.conn.execute("SET lock_timeout = '1s'")
    with store.conn.transaction():
        store.finish(first)
        assert other.finish(second)


def test_the_last_end_that_is_being_committed_is_waited_for_by_the_park(
    store: Store, other: Store, background: Background
) -> None:
    fan_out = begin(store, 1)
    item = fan_out.hold(0)
    with store.conn.transaction():
        store.finish(item)
        parked = background.blocked(other, other.park, fan_out.parent, WAITING)
    assert parked.result()
    assert fan_out.parent_woken() == ("pending", 1)


def test_the_last_end_waits_for_a_park_that_is_being_committed(
    store: Store, other: Store, background: Background
) -> None:
    fan_out = begin(store, 1)
    item = fan_out.hold(0)
    with store.conn.transaction():
        fan_out.park()
        ended = background.blocked(other, other.finish, item)
    assert ended.result()
    assert fan_out.parent_woken() == ("pending", 1)


def test_the_last_end_and_a_parent_that_looks_do_not_wait_in_a_circle(
    store: Store, other: Store, background: Background
) -> None:
    fan_out = begin(store, 1)
    item = fan_out.hold(0)
    with store.conn.transaction():
        assert fan_out.open() is not None  # has locked the parent
        ended = background.blocked(other, other.finish, item)  # has locked its item and counters
        fan_outs.settle(store.conn, fan_out.place, fan_out.new.id)
    assert ended.result()
    assert fan_out.settle().wait.status == "succeeded"


def test_an_item_that_is_restarted_is_awaited_again(store: Store) -> None:
    fan_out = begin(store, 2, stop_at_first=False)
    fan_out.park()
    fan_out.end(0, "failed", error='{"message":"no"}')
    store.set(fan_out.id_of(0), status="'pending'", completed_at="NULL", error="NULL")
    fan_out.end(1, output="1")
    assert fan_out.parent_woken() == ("waiting", 0)
    fan_out.end(0, output="0")
    assert fan_out.parent_woken() == ("pending", 1)
    store.set(fan_out.id_of(1), status="'pending'", completed_at="NULL", output="NULL")
    parent = store.hold(fan_out.parent.id)
    again = replace(fan_out, place=fan_out.place._replace(fence=parent.attempt))
    assert not again.settle().wait.over
    fan_out.end(1, output="10")
    assert json.loads(again.settle().wait.output or "") == [0, 10]


# --- held items


def test_two_ends_at_once_let_in_two_items(store: Store, other: Store) -> None:
    fan_out = begin(store, 40, limit=2)  # so many that no shard is done
    first, second = fan_out.hold(0), fan_out.hold(1)
    other.conn.execute("SET lock_timeout = '1s'")
    with store.conn.transaction():
        store.finish(first)
        assert other.finish(second)  # does not wait for item 2
        assert [other.status(fan_out.id_of(index)) for index in (2, 3)] == ["waiting", "pending"]
    assert fan_out.statuses()[:5] == ["succeeded", "succeeded", "pending", "pending", "waiting"]


@pytest.mark.parametrize("commits", [True, False])
def test_an_end_looks_again_at_an_item_that_another_end_is_letting_in(
    store: Store, other: Store, background: Background, commits: bool
) -> None:
    fan_out = begin(store, 3, limit=2)
    first, second = fan_out.hold(0), fan_out.hold(1)
    with store.conn.transaction(force_rollback=not commits):
        store.finish(first)
        ended = background.blocked(other, other.finish, second)
    assert ended.result()
    expected = ["succeeded" if commits else "running", "succeeded", "pending"]
    assert fan_out.statuses() == expected


def test_an_item_that_ends_while_it_is_held_makes_no_room(store: Store) -> None:
    fan_out = begin(store, 4, limit=1, stop_at_first=False)
    store.cancel(fan_out.id_of(1))
    assert fan_out.statuses() == ["pending", "canceled", "waiting", "waiting"]
    fan_out.end(0)
    assert fan_out.statuses() == ["succeeded", "canceled", "pending", "waiting"]


def test_what_was_parked_in_between_makes_room_when_it_ends(store: Store) -> None:
    fan_out = begin(store, 2, limit=1)
    item = fan_out.hold(0)
    store.park(item, Park("sleeping", "sleep", delay=0.0))
    assert fan_out.status(1) == "waiting"
    store.set(item.id, status="'pending'")
    fan_out.end(0)
    assert fan_out.status(1) == "pending"


# --- the first failure


def test_a_failure_wakes_the_parent_and_lets_nobody_in(store: Store) -> None:
    fan_out = begin(store, 4, limit=2)
    running = fan_out.hold(1)
    fan_out.park()
    fan_out.end(0, "failed", error='{"message":"no"}')
    store.finish(running)
    assert fan_out.parent_woken() == ("pending", 1)
    assert fan_out.statuses() == ["failed", "succeeded", "waiting", "waiting"]


def test_of_two_failures_at_once_the_first_counts(
    store: Store, other: Store, background: Background
) -> None:
    fan_out = begin(store, 3)
    first, second = fan_out.hold(2), fan_out.hold(0)
    fan_out.park()
    with store.conn.transaction():
        store.finish(first, "failed", error='{"message":"first"}')
        ended = background.blocked(
            other, other.finish, second, "failed", error='{"message":"second"}'
        )
    assert ended.result()
    assert fan_out.parent_woken() == ("pending", 1)
    parent = store.hold(fan_out.parent.id)
    again = replace(fan_out, place=fan_out.place._replace(fence=parent.attempt))
    wait = again.settle().wait
    assert (wait.status, wait.error) == ("failed", '{"message":"first"}')
    assert json.loads(wait.context or "")["item"] == 2


def test_a_failure_and_the_end_of_a_shard_do_not_wait_in_a_circle(
    store: Store, other: Store, background: Background
) -> None:
    fan_out = begin(store, 2)
    fails, ends = fan_out.hold(0), fan_out.hold(1)
    with store.conn.transaction():
        store.finish(fails, "failed")
        ended = background.blocked(other, other.finish, ends)
    assert ended.result()
    state = fan_out.open()
    assert state is not None
    assert (state.stopped, state.done) == (True, False)


def test_a_canceled_item_counts_as_a_failure(store: Store) -> None:
    fan_out = begin(store, 2)
    store.cancel(fan_out.id_of(1), reason="out of stock")
    wait = fan_out.settle().wait
    assert (wait.status, wait.error) == ("failed", None)
    about = json.loads(wait.context or "")
    assert (about["outcome"], about["reason"], about["run"]) == (
        "canceled",
        "out of stock",
        fan_out.id_of(1),
    )


def test_what_has_not_ended_is_canceled_and_again_harmlessly(store: Store) -> None:
    fan_out = begin(store, 5, limit=3)
    fan_out.hold(1)
    fan_out.end(0, "failed")
    assert fan_outs.cancel_unfinished(store.conn, fan_out.parent.id, fan_out.new.id) == 4
    fan_outs.cancel_unfinished(store.conn, fan_out.parent.id, fan_out.new.id)
    assert fan_out.statuses() == ["failed", "running", "canceled", "canceled", "canceled"]
    assert store.row(fan_out.id_of(1))["control"] == "cancel"
    assert fan_out.parent_woken() == ("running", 1)  # the failure, and nothing after it
    assert fan_out.settle().wait.status == "failed"


def test_cancelling_and_an_end_that_lets_an_item_in_do_not_wait_in_a_circle(
    store: Store, other: Store, background: Background
) -> None:
    fan_out = begin(store, 2, limit=1, stop_at_first=False)
    item = fan_out.hold(0)
    with locked(store, item.id):  # as its end has it, before that looks for a held item
        canceled = background.blocked(
            other, fan_outs.cancel_unfinished, other.conn, fan_out.parent.id, fan_out.new.id
        )
        store.finish(item)
    assert canceled.result() == 1
    assert fan_out.statuses() == ["succeeded", "canceled"]


def test_settling_does_not_wait_for_an_item_that_is_counting(
    store: Store, other: Store, third: Store, background: Background
) -> None:
    fan_out = begin(store, 2)
    fan_out.end(0, "failed")
    shard = "SELECT FROM durable.fan_outs WHERE id = %s AND shard = 1 FOR UPDATE"
    other.conn.execute("SET lock_timeout = '1s'")
    with third.conn.transaction():
        third.conn.execute(shard, [fan_out.new.id])
        assert replace(fan_out, store=other).settle().wait.status == "failed"
    fan_out.end(1)  # which finds its fan-out gone


# --- results


def test_results_are_in_order_and_keep_their_text(store: Store) -> None:
    fan_out = begin(store, 4)
    texts = ['{"b": 1, "a": -0.0}', "1e16", "null", '"x"']
    for index in (3, 1, 0, 2):
        fan_out.end(index, output=texts[index])
    wait = fan_out.settle().wait
    assert wait.status == "succeeded"
    output = wait.output or ""
    positions = [output.index(text) for text in texts]
    assert positions == sorted(positions)
    assert json.loads(output) == [json.loads(text) for text in texts]
    assert store.conn.execute(SHARDS, [fan_out.new.id]).fetchone() == (0,)


def test_failures_that_are_to_be_returned_stand_beside_the_results(store: Store) -> None:
    fan_out = begin(store, 3, stop_at_first=False)
    fan_out.park()
    fan_out.end(0, output="10")
    fan_out.end(1, "failed", error='{"message":"no"}')
    assert fan_out.parent_woken() == ("waiting", 0)
    store.cancel(fan_out.id_of(2), reason="stop")
    assert fan_out.parent_woken() == ("pending", 1)
    parent = store.hold(fan_out.parent.id)
    wait = replace(fan_out, place=fan_out.place._replace(fence=parent.attempt)).settle().wait
    assert (wait.status, json.loads(wait.output or "")) == ("succeeded", [10, None, None])
    failures = json.loads(wait.error or "")
    assert [(each["about"]["item"], each["about"]["outcome"]) for each in failures] == [
        (1, "failed"),
        (2, "canceled"),
    ]
    assert failures[0]["error"] == {"message": "no"}


def test_a_fan_out_is_not_settled_before_its_last_end(store: Store) -> None:
    fan_out = begin(store, 2)
    fan_out.end(0)
    assert not fan_out.settle().wait.over


def test_a_repeated_settlement_finds_the_first(store: Store) -> None:
    fan_out = begin(store, 1)
    fan_out.end(0, output="1")
    assert fan_out.settle().wait == fan_out.settle().wait
