"""Crowds: a long backlog, busy processors, work that nobody here can do."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.acceptance.conftest import Query, Trace
from tests.acceptance.rough import (
    APP,
    BEATS,
    LEASE,
    UNFINISHED,
    assert_nobody_was_buried,
    moved,
    short_settings,
)
from tests.conftest import StartWorker
from tests.harness import WorkerNode, wait_for

RUNG = "SELECT rung FROM durable.workflow_runs WHERE id = %s"


@pytest.fixture
def app_name() -> str:
    return APP


@pytest.fixture
def app_settings(
    request: pytest.FixtureRequest, database_url: str, trace: Trace, tmp_path: Path
) -> dict[str, Any]:
    settings = short_settings(database_url, trace.path)
    if getattr(request, "param", ""):
        (tmp_path / "results").mkdir()
        settings["result_backend"] = (tmp_path / "results").as_uri()
    return settings


def messages(worker: WorkerNode) -> Counter[str]:
    """How often a message of each run reached the worker."""
    return Counter(re.findall(r"Task rough\.walk\[(.+?)\] received", worker.logs()))


@pytest.mark.parametrize("backlog", [200, pytest.param(5000, marks=pytest.mark.storm)])
def test_a_backlog_behind_one_slow_worker_costs_at_most_one_message_more_a_run(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, backlog: int
) -> None:
    worker = start_worker(concurrency=1)
    runs = [app_module.walk.delay(f"r{number}", 1, 0.015) for number in range(backlog)]
    wait_for(lambda: query(UNFINISHED) == 0, timeout=backlog / 10, what="the backlog to be done")

    assert set(trace.count().values()) == {1}
    received = messages(worker)
    assert received.keys() == {run.id for run in runs}
    assert max(received.values()) <= 2
    assert received.total() <= backlog * 1.05  # as a rule there is none


@pytest.mark.parametrize("pool", ["prefork", pytest.param("threads", marks=pytest.mark.storm)])
def test_no_worker_is_buried_while_every_processor_is_busy(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, pool: str
) -> None:
    workers = start_worker(pool=pool), start_worker(pool=pool)
    wait_for(lambda: len(query(BEATS) or ()) == 2, what="both workers to beat")
    beats = query(BEATS)
    runs = [app_module.burns.delay(f"r{number}", 2, LEASE / 2) for number in range(6)]

    assert [run.get(timeout=60) for run in runs] == [2] * 6
    assert set(trace.count().values()) == {1}
    assert moved(query, beats)
    assert_nobody_was_buried(*workers)


@pytest.mark.parametrize("app_settings", ["with a result backend"], indirect=True)
def test_a_workflow_that_no_worker_has_waits_until_one_does(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    without = start_worker(env={"WITHOUT_RARE": "1"})
    run = app_module.rare.delay("rare")
    wait_for(lambda: "does not have the task" in without.logs(), what="the worker to refuse it")
    for number in range(3):
        app_module.walk.delay(f"other{number}", 1).get(timeout=10)
    assert run.state == "PENDING"
    assert run.run().status == "pending"
    assert app_module.app.backend.get_state(run.id) == "PENDING"  # nor has Celery failed it
    assert without.logs().count("does not have the task") == 1  # the dispatcher knows better

    # Both consume the queue; the run is rung by the one that has the task, for itself.
    start_worker()
    assert run.get(timeout=10) == "rare"
    assert trace.count()["rare"] == 1
    assert without.logs().count("does not have the task") == 1
