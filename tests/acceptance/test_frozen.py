"""A worker stands still past its lease and goes on: the run was done once, by another."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import make_url

from tests.acceptance.conftest import Query, Trace
from tests.acceptance.rough import (
    APP,
    CHILD,
    HOLDER,
    LEASE,
    UNFINISHED,
    WORKERS,
    assert_nobody_was_buried,
    pass_time,
    short_settings,
)
from tests.conftest import StartWorker
from tests.harness import wait_for
from tests.harness.apps import environment
from tests.harness.proxy import Proxy
from tests.harness.services import POSTGRES


@pytest.fixture
def app_name() -> str:
    return APP


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, Any]:
    return short_settings(database_url, trace.path)


@pytest.mark.parametrize("main_only", [False, True], ids=["whole worker", "main process only"])
def test_a_frozen_worker_is_taken_over_and_its_late_write_is_refused(
    app_module: ModuleType,
    start_worker: StartWorker,
    query: Query,
    trace: Trace,
    tmp_path: Path,
    main_only: bool,
) -> None:
    gate = tmp_path / "gate"
    first = start_worker()
    run = app_module.walk.delay("r", 4, gate=str(gate), at=1)
    wait_for(lambda: "r.1" in trace.lines(), what="the second step to run")
    second = start_worker(name="second")

    first.sigstop(main_only=main_only)
    wait_for(lambda: trace.count()["r.1"] == 2, timeout=20, what="the other worker to go on")
    gate.touch()
    assert run.get(timeout=10) == 4
    assert query(HOLDER, run.id) == "second"
    first.sigcont()

    wait_for(lambda: "goes on elsewhere: fenced" in first.logs(), what="the write to be refused")
    assert trace.count() == {"r.0": 1, "r.1": 2, "r.2": 1, "r.3": 1}
    assert run.get(timeout=1) == 4
    # It is a healthy worker again, under its old name.
    wait_for(lambda: query(WORKERS) == 2, what="both to beat")
    second.stop()
    assert app_module.walk.delay("after", 1).get(timeout=10) == 1
    assert_nobody_was_buried(first)


def test_a_child_whose_main_process_stands_still_starts_no_further_step(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    worker = start_worker()
    run = app_module.walk.delay("r", 3, gate=str(gate))
    wait_for(lambda: "r.0" in trace.lines(), what="the first step to run")

    worker.sigstop(main_only=True)
    pass_time(LEASE)
    gate.touch()
    wait_for(lambda: "goes on elsewhere: lease missed" in worker.logs(), what="the child to stop")
    assert trace.lines() == ["r.0"]
    worker.sigcont()

    assert run.get(timeout=15) == 3
    assert set(trace.count().values()) == {1}


def test_frozen_children_keep_their_runs_while_their_main_process_beats(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = start_worker()
    run = app_module.walk.delay("r", 3, gate=str(gate), at=1)
    wait_for(lambda: "r.1" in trace.lines(), what="the second step to run")
    second = start_worker(name="second")

    first.signal_children("SIGSTOP")
    gate.touch()
    pass_time(LEASE * 1.3)
    assert query(CHILD, run.id) in first.children()
    first.signal_children("SIGCONT")

    assert run.get(timeout=10) == 3
    assert set(trace.count().values()) == {1}
    assert_nobody_was_buried(first, second)


def test_children_of_a_killed_main_process_write_nothing_more(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = start_worker()
    run = app_module.walk.delay("r", 4, gate=str(gate), at=1)
    wait_for(lambda: "r.1" in trace.lines(), what="the second step to run")
    start_worker(name="second")

    # Where the system can, Celery has the kernel kill the children as well.
    first.kill(main_only=True)
    wait_for(lambda: trace.count()["r.1"] == 2, timeout=20, what="the other worker to go on")
    gate.touch()

    assert run.get(timeout=10) == 4
    assert query(HOLDER, run.id) == "second"
    wait_for(lambda: not first.children(), timeout=20, what="the orphans to end")
    assert trace.count() == {"r.0": 1, "r.1": 2, "r.2": 1, "r.3": 1}
    assert query(UNFINISHED) == 0


@pytest.mark.parametrize("postgres_server", ["machine"], indirect=True)
def test_a_worker_cut_off_from_postgres_is_taken_over_and_its_late_write_is_refused(
    app_module: ModuleType,
    start_worker: StartWorker,
    celery_setup_config: dict[str, Any],
    database_url: str,
    query: Query,
    trace: Trace,
    tmp_path: Path,
) -> None:
    proxy = Proxy(POSTGRES.port)
    behind = make_url(database_url).set(port=proxy.port).render_as_string(hide_password=False)
    gate = tmp_path / "gate"
    settings = {
        **celery_setup_config,
        "durable_database_url": behind,
        "worker_prefetch_multiplier": 1,  # it goes on taking messages until it has its fill
    }
    first = start_worker(concurrency=1, env=environment(settings))
    run = app_module.walk.delay("r", 4, gate=str(gate), at=1)
    wait_for(lambda: "r.1" in trace.lines(), what="the second step to run")
    start_worker(name="second")

    proxy.stall()
    wait_for(lambda: trace.count()["r.1"] == 2, timeout=20, what="the other worker to go on")
    gate.touch()
    assert run.get(timeout=10) == 4
    assert query(HOLDER, run.id) == "second"
    proxy.go()

    wait_for(lambda: "goes on elsewhere: fenced" in first.logs(), what="the write to be refused")
    assert trace.count() == {"r.0": 1, "r.1": 2, "r.2": 1, "r.3": 1}
    wait_for(lambda: query(WORKERS) == 2, what="both to beat")
    proxy.close()
