"""Fan-outs over real workers: results, limits, failures, and processes that are killed."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
from celery.exceptions import TaskRevokedError

from tests.acceptance.conftest import Query, Trace
from tests.acceptance.rough import short_settings
from tests.acceptance.shared import Shared, running
from tests.conftest import StartWorker
from tests.harness import every_broker, wait_for
from tests.harness.postgres import PostgresServer

APP = "tests.apps.fan_out"

CHILD = "SELECT child_pid FROM durable.workflow_runs WHERE id = %s AND status = 'running'"
ITEMS = "SELECT count(*) FROM durable.workflow_runs WHERE parent_run_id = %s"
ENDED = ITEMS + " AND completed_at IS NOT NULL"
CLAIMS = "SELECT max(attempt) FROM durable.workflow_runs WHERE parent_run_id = %s"
BY_STATUS = """
SELECT json_object_agg(status, n) FROM (
    SELECT status, count(*) AS n FROM durable.workflow_runs WHERE parent_run_id = %s GROUP BY 1) s
"""
BEGUN = ITEMS + " AND NOT held AND completed_at IS NULL"
DONE = """
SELECT json_agg(input -> 'args' -> 1) FROM durable.workflow_runs
 WHERE parent_run_id = %s AND status = 'succeeded'
"""


# --- one worker for what needs no worker of its own


@pytest.fixture(scope="module")
def shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("fan_out")
    with running(APP, postgres_server, directory) as shared:
        yield shared


def lines(shared: Shared, word: str) -> list[list[str]]:
    """The trace of one sort of item."""
    text = shared.trace.read_text() if shared.trace.exists() else ""
    return [line.split()[1:] for line in text.splitlines() if line.startswith(f"{word} ")]


def test_results_are_in_order_and_the_history_has_one_row(shared: Shared) -> None:
    run = shared.module.fan_out_all.delay("double", list(range(40)))
    assert run.get(timeout=20) == [2 * number for number in range(40)]
    assert [(step.name, step.kind, step.status) for step in run.steps()] == [
        ("tests.apps.fan_out.double", "fan_out", "succeeded")
    ]


def test_an_item_is_shown_with_its_step_and_costs_no_second_row(shared: Shared) -> None:
    run = shared.module.fan_out_all.delay("double", [1234])
    assert run.get(timeout=10) == [2468]
    item = "SELECT {} FROM durable.workflow_runs WHERE parent_run_id = %s"
    assert shared.query(item.format("workflow_name"), run.id) == "durable.step"
    shown = shared.query(item.format("message ->> 'argsrepr'"), run.id)
    assert shown == "('tests.apps.fan_out.double', 1234)"
    item_id = shared.query(item.format("id"), run.id)
    steps = "SELECT count(*) FROM durable.step_attempts WHERE workflow_run_id = %s"
    assert shared.query(steps, item_id) == 0


def test_no_more_than_max_concurrency_are_begun_at_a_time(shared: Shared) -> None:
    run = shared.module.fan_out_all.delay("brief", list(range(30)), max_concurrency=2)
    most = 0

    def ended() -> bool:
        nonlocal most
        most = max(most, shared.query(BEGUN, run.id))
        return bool(run.ready())

    wait_for(ended, timeout=30, what="the run to end")
    assert run.get(timeout=1) == list(range(30))
    assert most == 2
    open_items = highest = 0
    for line in shared.trace.read_text().splitlines():
        open_items += {"begin": 1, "end": -1}.get(line.split()[0], 0)
        highest = max(highest, open_items)
    assert highest == 2


def test_the_first_failure_ends_it_and_says_which_item(shared: Shared, tmp_path: Path) -> None:
    go = tmp_path / "go"
    items = [[number, str(go)] for number in range(6)]
    run = shared.module.caught.delay(items)
    two, text, notes = run.get(timeout=10)  # item 0 still waits for its gate
    assert (two, text) == (2, "number 1 is not there")
    assert "item 1 of 6, tests.apps.fan_out.gated([1, " in notes[0]
    assert shared.query(BY_STATUS, run.id) == {"running": 1, "failed": 1, "canceled": 4}
    go.touch()
    wait_for(lambda: shared.query(ENDED, run.id) == 6, what="item 0 to end")
    assert {line[0] for line in lines(shared, "gated")} == {"0", "1"}


def test_an_uncaught_failure_is_the_original_exception(shared: Shared) -> None:
    run = shared.module.fan_out_all.delay("gated", [[1, ""]])
    with pytest.raises(LookupError, match="number 1 is not there"):
        run.get(timeout=10)


def test_an_item_that_somebody_cancels_is_a_failure(shared: Shared, tmp_path: Path) -> None:
    go = tmp_path / "go"
    items = [[number, str(go)] for number in (20, 21, 22)]
    run = shared.module.fan_out_all.delay("gated", items, max_concurrency=2)
    held = "SELECT id::text FROM durable.workflow_runs WHERE parent_run_id = %s AND held"
    item_id = wait_for(lambda: shared.query(held, run.id), what="the held item")
    assert shared.app.AsyncResult(item_id).cancel("sold out")
    go.touch()
    with pytest.raises(TaskRevokedError, match="sold out"):
        run.get(timeout=10)
    assert ["22"] not in lines(shared, "gated")


def test_failures_are_returned_and_steps_retried_within_their_item(shared: Shared) -> None:
    run = shared.module.fan_out_all.delay("flaky", [1, 2, 3], return_exceptions=True)
    assert run.get(timeout=20) == [2, "RecoverableError('attempt 3 of 2 fails')", 2]
    assert sorted(lines(shared, "flaky")) == sorted(
        [number, str(attempt)]
        for number, attempts in (("1", 2), ("2", 3), ("3", 2))
        for attempt in range(1, attempts + 1)
    )


def test_steps_workflows_tasks_and_canvas_are_gathered(shared: Shared) -> None:
    run = shared.module.mixed.delay()
    assert run.get(timeout=20) == [3, 6, 104, 1205, [106, 14]]
    assert [(step.name, step.kind) for step in run.steps()] == [("gather", "fan_out")]


def test_fan_outs_nest_and_follow_each_other(shared: Shared) -> None:
    run = shared.module.twice.delay()
    assert run.get(timeout=20) == [[2, 6], [4, 12], []]


def test_plain_tasks_and_signatures_take_the_item_first(shared: Shared) -> None:
    run = shared.module.fan_out_all.delay("plain", [1, 2])
    assert run.get(timeout=20) == [101, 102]


def test_what_an_item_writes_through_the_session_is_committed_once(shared: Shared) -> None:
    shared.conn.execute("CREATE TABLE done (n int PRIMARY KEY)")
    run = shared.module.fan_out_all.delay("reserve", list(range(10)))
    assert run.get(timeout=20) == list(range(10))
    assert shared.query("SELECT count(*) FROM done") == 10


def test_an_item_whose_step_this_worker_lacks_waits_for_another(shared: Shared) -> None:
    run = shared.app.tasks["durable.step"].delay("shop.unknown", 1)
    shared.wait_for_status(run.id, "sleeping")
    assert "step 'shop.unknown' () is not known to the worker" in run.run().reason
    assert run.cancel()


def test_other_items_on_a_replay_pause_the_run(shared: Shared, tmp_path: Path) -> None:
    fewer, go = tmp_path / "fewer", tmp_path / "go"
    run = shared.module.shrinks.delay(str(fewer), str(go))
    shared.wait_for_status(run.id, "waiting")
    fewer.touch()
    go.touch()
    shared.wait_for_status(run.id, "paused")
    assert "has a fan-out of 2 items at position 0, the code now asks" in run.run().reason
    assert [step.status for step in run.steps()] == ["running"]


# --- workers that are killed


@pytest.fixture
def app_name() -> str:
    return APP


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, Any]:
    return short_settings(database_url, trace.path)


def runs_of(trace: Trace, word: str) -> Counter[str]:
    """How often each item of a sort was executed."""
    return Counter(line.split()[1] for line in trace.lines() if line.startswith(f"{word} "))


@contextmanager
def in_the_way(database_url: str, run_id: str, item: int) -> Iterator[None]:
    """Hold up the lot in which an item of the run's first fan-out is inserted."""
    fan_out = uuid.uuid5(uuid.UUID(run_id), "fan_out/0//0/tests.apps.fan_out.double")
    item_id = uuid.uuid5(fan_out, str(item))
    with psycopg.connect(database_url) as conn:
        conn.execute(
            "INSERT INTO durable.workflow_runs (id, workflow_name, status) VALUES (%s, '', 'paused')",
            [item_id],
        )
        yield
        conn.rollback()


@every_broker
def test_a_killed_worker_costs_no_item_that_was_committed(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    count = 300
    first, _ = start_worker(), start_worker()
    run = app_module.fan_out_all.delay("double", list(range(count)))
    wait_for(lambda: len(trace.lines()) >= count / 3, timeout=30, what="a third of the items")

    first.kill()
    done, executed = query(DONE, run.id), runs_of(trace, "double")
    assert 0 < len(done) < count
    start_worker()

    assert run.get(timeout=60) == [2 * number for number in range(count)]
    again = runs_of(trace, "double")
    assert {number: again[str(number)] for number in done} == {
        number: executed[str(number)] for number in done
    }
    assert again.total() - count <= 4  # the steps in flight of at most four processes
    assert query(ITEMS, run.id) == count


@every_broker
def test_a_parent_that_is_killed_while_it_inserts_goes_on_where_it_was(
    app_module: ModuleType,
    start_worker: StartWorker,
    query: Query,
    trace: Trace,
    database_url: str,
) -> None:
    count = 700
    worker = start_worker()
    run_id = str(uuid.uuid4())
    with in_the_way(database_url, run_id, item=600):
        run = app_module.fan_out_count.apply_async((count,), task_id=run_id)
        wait_for(lambda: query(ITEMS, run_id) == 500, what="the first lot of items")
        worker.kill_child(query(CHILD, run_id))

    assert run.get(timeout=60) == count * (count - 1)
    assert runs_of(trace, "double") == {str(number): 1 for number in range(count)}
    assert query(ITEMS, run_id) == count


def test_no_item_begins_before_all_held_ones_are_there(
    app_module: ModuleType,
    start_worker: StartWorker,
    query: Query,
    trace: Trace,
    database_url: str,
) -> None:
    count, limit = 700, 5
    worker = start_worker()
    run_id = str(uuid.uuid4())
    with in_the_way(database_url, run_id, item=600):
        options = {"max_concurrency": limit}
        run = app_module.fan_out_all.apply_async(
            ("double", list(range(count))), options, task_id=run_id
        )
        wait_for(lambda: query(ITEMS, run_id) == 500, what="the first lot of items")
        assert query(BEGUN, run_id) == 0  # an end would find nobody behind it, and stay the last
        worker.kill_child(query(CHILD, run_id))

    most = 0

    def ended() -> bool:
        nonlocal most
        most = max(most, query(BEGUN, run_id))
        return bool(run.ready())

    wait_for(ended, timeout=60, what="the run to end")
    assert run.get(timeout=1) == [2 * number for number in range(count)]
    assert 0 < most <= limit
    assert runs_of(trace, "double") == {str(number): 1 for number in range(count)}


@pytest.mark.storm
def test_ten_thousand_items_outlive_a_worker(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    count = 10_000
    first, _ = start_worker(), start_worker()
    run = app_module.fan_out_count.delay(count)
    wait_for(lambda: len(trace.lines()) >= count / 2, timeout=120, what="half of the items")

    first.kill()
    done, executed = query(DONE, run.id), runs_of(trace, "double")
    assert 0 < len(done) < count
    start_worker()

    assert run.get(timeout=240) == count * (count - 1)
    again = runs_of(trace, "double")
    assert all(again[str(number)] == executed[str(number)] for number in done)
    assert again.total() - count <= 4
    assert len(run.steps()) == 1
