"""A canceled run takes its tied children along, whoever ends first and whoever dies."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from durable.store import control, dispatch, waits
from durable.store.cascade import _CASCADE, cascade
from durable.store.control import Order
from durable.store.dispatch import Due
from durable.store.runs import Park
from tests.harness.store import Background, Store

WAITING = Park("waiting", "event")


def child_of(store: Store, parent: str, *, tied: bool = True, **options: Any) -> str:
    policy = "cancel" if tied else None
    return store.start(parent=parent, reports=True, on_parent_cancel=policy, **options)


def waiting(store: Store, run_id: str) -> str:
    """Have a run claimed and park."""
    assert store.park(store.hold(run_id), WAITING)
    return run_id


def look(store: Store) -> Due:
    """What a dispatcher sees."""
    return dispatch.due(
        store.conn,
        store.namespace,
        names=["shop.order"],
        idle_queues=[],
        batch=100,
        ring_again=20.0,
        late_error='{"message": "late"}',
    )


def tell(store: Store, run_id: str) -> tuple[Any, ...]:
    row = store.row(run_id)
    return row["status"], row["control"], row["reason"]


CANCELED = ("canceled", None, "its parent was canceled")
ASKED = ("running", "cancel", "its parent was canceled")


def test_canceling_a_parked_parent_cancels_its_tied_children_and_theirs_without_a_worker(
    store: Store,
) -> None:
    parent = waiting(store, store.start())
    pending, parked = child_of(store, parent), waiting(store, child_of(store, parent))
    sleeping = child_of(store, parent, rung=False, delay=60.0)
    grandchild = waiting(store, child_of(store, parked))
    free, grandchild_of_free = child_of(store, parent, tied=False), ""
    grandchild_of_free = child_of(store, free)

    assert store.cancel(parent) == {parent: "canceled"}

    assert [tell(store, each) for each in (pending, parked, sleeping, grandchild)] == [CANCELED] * 4
    assert store.row(pending)["completed_at"] is not None
    assert store.row(sleeping)["due_in"] is None
    assert store.claim(pending) is None
    assert {store.status(free), store.status(grandchild_of_free)} == {"pending"}
    assert not store.row(parent)["cascades"]


def test_a_child_that_runs_is_asked_and_its_own_children_follow_when_it_has_stopped(
    store: Store,
) -> None:
    parent = waiting(store, store.start())
    claim = store.hold(child_of(store, parent))
    grandchild = waiting(store, child_of(store, claim.id))
    store.cancel(parent)
    assert tell(store, claim.id) == ASKED
    assert not store.row(parent)["cascades"]
    assert store.status(grandchild) == "waiting"

    store.finish(claim, "canceled", reason="canceled")
    assert look(store).cascades == [claim.id]
    assert cascade(store.conn, [claim.id]) == 1
    assert tell(store, grandchild) == CANCELED
    assert look(store).cascades == []


def test_a_child_that_was_asked_to_pause_is_asked_to_stop(store: Store) -> None:
    parent = waiting(store, store.start())
    claim = store.hold(child_of(store, parent))
    store.set(claim.id, control="'pause'")
    store.cancel(parent)
    assert tell(store, claim.id) == ASKED


@pytest.mark.parametrize("how", ["by its worker", "by a take-over", "while it waits to be rung"])
def test_a_parent_that_ran_when_it_was_canceled_leaves_a_mark_for_the_dispatchers(
    store: Store, other: Store, how: str
) -> None:
    other.conn.execute("LISTEN durable")
    claim = store.running()
    before = waiting(store, child_of(store, claim.id))
    assert store.cancel(claim.id) == {claim.id: "running"}
    assert store.status(before) == "waiting"
    since = child_of(store, claim.id)  # between the request and the end
    if how == "by its worker":
        store.finish(claim, "canceled", reason="canceled")
    elif how == "by a take-over":
        store.release_child()
    else:
        store.park(claim, WAITING)
        store.cancel(claim.id)
    if how != "while it waits to be rung":
        assert store.status(claim.id) == "canceled"
        assert list(other.conn.notifies(timeout=5, stop_after=1))
        assert look(store).cascades == [claim.id]
        cascade(store.conn, [claim.id])
    assert [tell(store, each) for each in (before, since)] == [CANCELED] * 2
    assert look(store).cascades == []


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_another_end_of_the_parent_leaves_its_children_alone(store: Store, status: str) -> None:
    claim = store.running()
    child = child_of(store, claim.id)
    store.finish(claim, status, error="{}")
    assert not store.row(claim.id)["cascades"]
    assert store.status(child) == "pending"


def test_children_that_have_ended_stay_as_they_are(store: Store) -> None:
    parent = waiting(store, store.start())
    claim = store.hold(child_of(store, parent))
    store.finish(claim, output="1")
    store.cancel(parent)
    assert store.status(claim.id) == "succeeded"
    assert not store.row(parent)["cascades"]


def test_celery_is_told_of_a_child_that_has_a_continuation(store: Store) -> None:
    parent = waiting(store, store.start())
    child = waiting(store, child_of(store, parent, tail=True))
    store.cancel(parent)
    assert [doorbell.id for doorbell in look(store).doorbells] == [child]
    assert store.hold(child).status == "canceled"


def test_a_client_that_dies_after_the_cancel_leaves_the_rest_to_a_dispatcher(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    parent = waiting(store, store.start())
    child, grandchild = waiting(store, child_of(store, parent)), ""
    grandchild = child_of(store, child)
    monkeypatch.setattr("durable.store.runs.follow", die)
    with pytest.raises(KeyboardInterrupt):
        store.cancel(parent)
    assert (store.status(parent), store.status(child)) == ("canceled", "waiting")
    assert look(store).cascades == [parent]
    cascade(store.conn, look(store).cascades)
    assert [tell(store, each) for each in (child, grandchild)] == [CANCELED] * 2


def test_a_dispatcher_that_dies_between_two_levels_leaves_the_rest_to_another(
    store: Store,
) -> None:
    claim = store.running()
    child = waiting(store, child_of(store, claim.id))
    grandchild = child_of(store, child)
    store.finish(claim, "canceled", reason="canceled")
    store.conn.execute(
        "UPDATE durable.workflow_runs SET status = 'canceled', completed_at = now() WHERE id = %s",
        (child,),
    )
    assert set(look(store).cascades) == {claim.id, child}
    cascade(store.conn, look(store).cascades)
    assert tell(store, grandchild) == CANCELED
    assert look(store).cascades == []


def test_an_operators_cancel_takes_tied_children_along_too(store: Store) -> None:
    parent = waiting(store, store.start())
    child = waiting(store, child_of(store, parent))
    order = Order(str(uuid.uuid4()), [parent], store.namespace, "ada")
    assert [change.after for change in control.cancel(store.conn, order)] == ["canceled"]
    assert tell(store, child) == CANCELED
    assert look(store).cascades == []


def fan_out_of(store: Store, parent: str, count: int, held_from: int) -> list[str]:
    """Items of a fan-out, and its counters: of all of them, and of the first shards."""
    fan_out = str(uuid.uuid4())
    for shard, remaining in ((-1, count), *((number, 1) for number in range(count))):
        store.conn.execute(
            "INSERT INTO durable.fan_outs"
            " (id, shard, workflow_run_id, remaining, stop_at_first, limited)"
            " VALUES (%s, %s, %s, %s, false, true)",
            (fan_out, shard, parent, remaining),
        )
    return [
        store.start(
            parent=parent,
            fan_out=fan_out,
            fan_index=number,
            held=number >= held_from,
            on_parent_cancel="cancel",
        )
        for number in range(count)
    ]


def stopped(store: Store, parent: str) -> bool:
    row = store.conn.execute(
        "SELECT stopped_by IS NOT NULL FROM durable.fan_outs"
        " WHERE workflow_run_id = %s AND shard = -1",
        (parent,),
    ).fetchone()
    assert row is not None
    return bool(row[0])


def test_a_fan_out_stops_with_its_parent(store: Store) -> None:
    # Items that are held too: none is let in by the end of another.
    parent = store.running()
    items = fan_out_of(store, parent.id, 6, held_from=2)
    claim = store.hold(items[0])
    store.park(parent, WAITING)
    store.cancel(parent.id)
    assert [tell(store, item) for item in items] == [ASKED, *[CANCELED] * 5]
    assert stopped(store, parent.id)
    store.finish(claim, "canceled", reason="canceled")
    assert [store.status(item) for item in items] == ["canceled"] * 6
    assert look(store).doorbells == []


def test_an_item_that_ends_beside_the_cascade_does_not_wait_in_a_circle_with_it(
    store: Store, other: Store, third: Store, background: Background
) -> None:
    # The end holds its item and wants the counter; the cascade passes over both.
    parent = store.running()
    items = fan_out_of(store, parent.id, 3, held_from=2)
    claim = store.hold(items[0])
    store.park(parent, WAITING)
    with third.conn.transaction():
        third.conn.execute("SELECT FROM durable.fan_outs WHERE shard = 0 FOR UPDATE")
        ended = background.blocked(other, other.finish, claim)
        store.conn.execute("SET lock_timeout = '1s'")
        store.cancel(parent.id)
        assert tell(store, items[1]) == CANCELED
    assert ended.result()
    cascade(store.conn, look(store).cascades)
    assert [store.status(item) for item in items] == ["succeeded", "canceled", "canceled"]
    assert look(store).cascades == []


def test_another_namespace_does_not_see_the_mark(store: Store, other: Store) -> None:
    claim = store.running()
    child_of(store, claim.id)
    store.finish(claim, "canceled", reason="canceled")
    assert look(Store(other.conn, "elsewhere")).cascades == []


# --- who comes first


def test_a_child_that_is_being_started_when_its_parent_ends_is_seen(
    store: Store, other: Store, background: Background
) -> None:
    # Without the lock on the parent, its end would not see the uncommitted child.
    parent = waiting(store, store.start())
    with store.conn.transaction():
        child = child_of(store, parent)
        canceled = background.blocked(other, other.cancel, parent)
    assert canceled.result() == {parent: "canceled"}
    assert tell(store, child) == CANCELED


def test_a_child_whose_start_waits_for_the_end_of_its_parent_is_canceled_at_birth(
    store: Store, other: Store, background: Background
) -> None:
    parent = waiting(store, store.start())
    with store.conn.transaction():
        store.cancel(parent)
        started = background.blocked(other, child_of, other, parent)
    child = started.result()
    assert tell(store, child) == CANCELED
    assert store.row(child)["completed_at"] is not None
    assert store.claim(child) is None
    assert look(store).doorbells == []


@pytest.mark.parametrize("tail", [True, False])
def test_a_child_started_by_a_zombie_of_a_canceled_parent_never_runs(
    store: Store, tail: bool
) -> None:
    parent = waiting(store, store.start())
    store.cancel(parent)
    child = child_of(store, parent, tail=tail)
    assert tell(store, child) == CANCELED
    assert [doorbell.id for doorbell in look(store).doorbells] == ([child] if tail else [])


def test_starting_a_free_child_waits_for_nobody(store: Store, other: Store) -> None:
    parent = waiting(store, store.start())
    with store.conn.transaction():
        store.cancel(parent)
        other.conn.execute("SET lock_timeout = '1s'")
        assert store.status(child_of(other, parent, tied=False)) == "pending"


def test_a_child_that_ends_and_a_parent_that_is_canceled_do_not_wait_in_a_circle(
    store: Store, other: Store, third: Store, background: Background
) -> None:
    # The child's end locks the child, then, to wake it, the parent. A cancel that
    # locked the parent, then the child, would be half of a deadlock.
    parent = store.running()
    claim = store.hold(child_of(store, parent.id))
    waits.result(store.conn, parent.id, parent.attempt, claim.id)  # its end is to wake the parent
    store.park(parent, WAITING)
    with third.conn.transaction():
        third.set(parent.id, wake="wake")
        ended = background.blocked(other, other.finish, claim)  # has the child, wants the parent
        canceled = background.blocked(store, store.cancel, parent.id)
    assert ended.result()
    assert canceled.result() == {parent.id: "canceled"}
    assert store.status(claim.id) == "succeeded"
    cascade(store.conn, look(store).cascades)
    assert look(store).cascades == []


def test_a_cascade_waits_for_no_child_and_comes_again_for_one_that_was_locked(
    store: Store, other: Store
) -> None:
    parent = waiting(store, store.start())
    locked, free = child_of(store, parent), child_of(store, parent)
    with other.conn.transaction():
        claim = other.hold(locked)
        store.conn.execute("SET lock_timeout = '1s'")
        store.cancel(parent)
        assert tell(store, free) == CANCELED
        assert look(store).cascades == [parent]
    cascade(store.conn, look(store).cascades)
    assert tell(store, claim.id) == ASKED
    assert look(store).cascades == []


def test_a_child_claimed_between_the_look_and_the_lock_is_asked_not_ended(
    store: Store, other: Store, third: Store, background: Background
) -> None:
    parent = waiting(store, store.start())
    child = child_of(store, parent)
    store.conn.execute(
        "UPDATE durable.workflow_runs SET status = 'canceled', completed_at = now() WHERE id = %s",
        (parent,),
    )
    third.conn.execute("SELECT pg_advisory_lock(7)")
    # Holds the statement between its snapshot and the lock of the child.
    other.conn.execute("""
        CREATE TEMP TABLE gate AS SELECT 1;
        CREATE FUNCTION pg_temp.pass() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_advisory_lock_shared(7); RETURN true; END $$
    """)
    held = _CASCADE.replace(
        "WHERE child.parent_run_id =", "WHERE (SELECT pg_temp.pass()) AND child.parent_run_id ="
    )
    assert held != _CASCADE
    asked = background.blocked(other, other.conn.execute, held, {"ids": [parent]})
    claim = store.hold(child)
    third.conn.execute("SELECT pg_advisory_unlock(7)")
    asked.result()
    assert tell(store, claim.id) == ASKED
