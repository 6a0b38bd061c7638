"""A sleep has one due time, by one clock, and costs nobody anything meanwhile."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from durable.store import dispatch, queries, waits
from durable.store.runs import Claim, Park
from durable.store.waits import Place, Wait
from tests.harness.store import Store

CROWD = 20_000
#: Pages that the dispatcher's statement may touch: a handful for each index and row.
FEW_PAGES = 200


def sleep(
    store: Store, claim: Claim, seconds: float | None, until: datetime | None = None
) -> Wait | None:
    place = Place(claim.id, claim.attempt, "", 0, "sleep")
    return waits.sleep(store.conn, place, seconds, until)


def due_at(store: Store, run_id: str) -> Any:
    row = store.conn.execute(
        "SELECT due_at FROM durable.step_attempts WHERE workflow_run_id = %s", (run_id,)
    ).fetchone()
    assert row is not None
    return row[0]


def test_the_due_time_is_the_databases_clock_and_is_fixed_once(store: Store) -> None:
    claim = store.running()
    before = queries.now(store.conn)
    first = sleep(store, claim, 3600.0)
    assert first is not None
    assert (first.status, first.due_in) == ("running", pytest.approx(3600, abs=1))
    due = due_at(store, claim.id)
    assert due - before == pytest.approx(timedelta(hours=1), abs=timedelta(seconds=5))

    # Woken early, by anything: claimed, replayed, and it asks again.
    store.set(claim.id, wake="wake + 1")
    assert store.park(claim, Park("sleeping", "sleep", delay=first.due_in))
    assert store.status(claim.id) == "pending"
    again = store.hold(claim.id)
    second = sleep(store, again, 3600.0)
    assert second is not None
    assert second.status == "running"
    assert second.due_in is not None
    assert second.due_in < first.due_in
    assert due_at(store, claim.id) == due


def test_a_worker_that_dies_before_the_park_does_not_move_the_due_time(store: Store) -> None:
    claim = store.running()
    sleep(store, claim, 3600.0)
    due = due_at(store, claim.id)
    store.release_child()
    again = store.hold(claim.id, worker="w2")
    assert sleep(store, again, 3600.0) is not None
    assert due_at(store, claim.id) == due


def test_changed_code_does_not_move_the_due_time_either(store: Store) -> None:
    claim = store.running()
    sleep(store, claim, 3600.0)
    due = due_at(store, claim.id)
    sleep(store, claim, 1.0)
    assert due_at(store, claim.id) == due


def test_a_sleep_is_over_when_its_time_has_come_and_stays_so(store: Store) -> None:
    claim = store.running()
    sleep(store, claim, 3600.0)
    store.conn.execute("UPDATE durable.step_attempts SET due_at = now()")
    for _ in range(2):
        found = sleep(store, claim, 3600.0)
        assert found is not None
        assert found.over
    assert store.steps(claim.id) == [(0, "sleep", 1, "succeeded", 0)]


@pytest.mark.parametrize(
    ("seconds", "until"),
    [(0.0, None), (None, datetime(2020, 1, 1, tzinfo=timezone.utc))],
)
def test_no_time_at_all_is_over_at_once(
    store: Store, seconds: float | None, until: datetime | None
) -> None:
    found = sleep(store, store.running(), seconds, until)
    assert found is not None
    assert found.over


def test_a_zombie_begins_no_sleep(store: Store) -> None:
    zombie = store.running()
    store.release_child()
    store.hold(zombie.id, worker="w2")
    assert sleep(store, zombie, 3600.0) is None
    assert store.steps(zombie.id) == []


def test_a_sleeping_run_is_rung_for_its_deadline_not_for_its_sleep(store: Store) -> None:
    claim = store.running(deadline=30.0)
    found = sleep(store, claim, 3600.0)
    assert found is not None
    store.park(claim, Park("sleeping", "sleep", delay=found.due_in))
    assert store.row(claim.id)["due_in"] == pytest.approx(30, abs=5)


def test_an_event_to_a_sleeping_run_does_not_wake_it(store: Store) -> None:
    claim = store.running()
    store.park(claim, Park("sleeping", "sleep", delay=60.0))
    store.conn.execute("SELECT durable.wake(%s)", (claim.id,))
    assert store.status(claim.id) == "sleeping"
    assert store.row(claim.id)["due_in"] == pytest.approx(60, abs=5)


def test_among_thousands_of_sleepers_the_dispatcher_finds_what_is_due_by_its_index(
    store: Store,
) -> None:
    # Its time, and that of an idle worker, must not grow with who sleeps.
    insert_sleepers(store, CROWD)
    due = [store.start(rung=False, delay=60.0) for _ in range(3)]
    for run_id in due:
        store.set(run_id, available_at="now()")
    store.conn.execute("ANALYZE durable.workflow_runs")
    params = {
        "namespace": "default",
        "names": ["shop.order"],
        "idle_queues": ["celery"],
        "idle": True,
        "versions": [],
        "own_names": ["shop.order"],
        "own_versions": [],
        "own_idle": True,
        "direct": False,
        "batch": 100,
        "ring_again": 20.0,
        "late": "{}",
    }
    explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + dispatch._DUE
    with store.conn.transaction(force_rollback=True):
        row = store.conn.execute(explain, params).fetchone()
    assert row is not None
    plan = json.loads(row[0])[0]["Plan"] if isinstance(row[0], str) else row[0][0]["Plan"]
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < FEW_PAGES
    found = dispatch.due(
        store.conn,
        "default",
        names=["shop.order"],
        idle_queues=["celery"],
        batch=100,
        ring_again=20.0,
        late_error="{}",
    )
    assert {doorbell.id for doorbell in found.doorbells} == set(due)
    assert found.next_in == pytest.approx(3600, abs=60)


def insert_sleepers(store: Store, count: int) -> None:
    store.conn.execute(
        "INSERT INTO durable.workflow_runs (workflow_name, status, input, message, available_at)"
        " SELECT 'shop.order', 'sleeping', '{}', '{}',"
        " now() + make_interval(secs => 3600 + n) FROM generate_series(1, %s) n",
        (count,),
    )
