"""Tasks become workflows and plain tasks again while work is under way: nothing is lost or doubled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest

from durable.store.migrate import CODE_VERSION
from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import apps, wait_for

ROOT = Path(__file__).parents[2]
ROW = "SELECT row_to_json(r) FROM durable.workflow_runs r WHERE id = %s"
RUNS = "SELECT count(*) FROM durable.workflow_runs"
UNFINISHED = "SELECT count(*) FROM durable.workflow_runs WHERE completed_at IS NULL"
ORDERS = 20
#: The file system broker may lose an ordinary message.
BROKERS = pytest.mark.parametrize("celery_broker", ["rabbitmq", "redis"], indirect=True)


@pytest.fixture
def app_name() -> str:
    return "tests.apps.deploying"


@pytest.fixture
def accept_only(request: pytest.FixtureRequest) -> bool:
    return bool(getattr(request, "param", False))


@pytest.fixture
def app_settings(database_url: str, trace: Trace, accept_only: bool) -> dict[str, Any]:
    return {
        "durable_database_url": database_url,
        "durable_accept_only": accept_only,
        "durable_lease": 2,
        "durable_heartbeat_interval": 0.5,
        "durable_poll_interval": 0.5,
        "durable_ring_interval": 2,
        "worker_prefetch_multiplier": 1,
        "trace": str(trace.path),
    }


@pytest.fixture
def drain(celery_setup_config: dict[str, Any]) -> Iterator[Any]:
    """Start `durable drain`; what is started is gone after the test."""
    started = []

    def start(*args: str, **env: str) -> subprocess.Popen[str]:
        settings = apps.environment(celery_setup_config)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "celery",
                "-A",
                "tests.apps.deploying",
                "durable",
                "drain",
                *args,
            ],
            env={**os.environ, **settings, "PYTHONPATH": str(ROOT), **env},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def release(name: str, **env: str) -> dict[str, dict[str, str]]:
    return {"env": {"RELEASE": name, **env}}


def effects(trace: Trace) -> list[int]:
    return sorted(int(line.split()[1]) for line in trace.lines() if line.startswith("effect"))


@BROKERS
@pytest.mark.parametrize("accept_only", [True], indirect=True)
def test_producers_that_accept_only_let_workers_without_the_package_take_part(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    # The first half of a deploy: some workers have neither the package nor the line.
    start_worker(**release("bare"))
    start_worker(**release("durable"))
    for number in range(ORDERS):
        app_module.bill.delay(number)
    for _ in range(ORDERS):
        app_module.beat.delay()
    wait_for(lambda: len(effects(trace)) >= ORDERS, timeout=30, what="every order")
    wait_for(lambda: sum("beat" in each for each in trace.lines()) >= ORDERS, what="every beat")
    wait_for(lambda: query(UNFINISHED) == 0, what="every run to end")
    assert effects(trace) == list(range(ORDERS))
    beats = [line.split()[1] for line in trace.lines() if line.startswith("beat")]
    assert len(beats) == ORDERS
    assert "bare" in beats, "it took part"
    assert query(RUNS) == query(
        "SELECT count(*) FROM durable.workflow_runs WHERE status = 'succeeded'"
    )


@BROKERS
def test_a_worker_whose_task_is_still_plain_hands_runs_on(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    # The second half: all have the package, some have the line.
    plain = start_worker(**release("plain"))
    start_worker(**release("durable"))
    runs = [app_module.bill.delay(number) for number in range(ORDERS)]
    beats = [app_module.beat.delay() for _ in range(ORDERS)]
    assert [run.get(timeout=30) for run in (*runs, *beats)] == ["durable"] * 2 * ORDERS
    assert effects(trace) == list(range(ORDERS))
    assert trace.count()["beat durable"] == ORDERS
    assert "has it as a plain task" in plain.logs()

    # Ordinary messages, as producers without the line send them, are for both.
    by_name = [app_module.start_plainly("deploying.beat") for _ in range(ORDERS)]
    done = lambda: trace.count()["beat durable"] + trace.count()["beat plain"]  # noqa: E731
    wait_for(lambda: done() >= 2 * ORDERS, what="every ordinary message")
    wait_for(lambda: query(UNFINISHED) == 0, what="every run to end")
    assert done() == 2 * ORDERS
    assert trace.count()["beat plain"] == ORDERS - sum(
        query(ROW, each) is not None for each in by_name
    )


def test_the_line_is_taken_out_while_runs_exist(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace, drain: Any
) -> None:
    durable_worker = start_worker(**release("durable"))
    parked = app_module.waits.delay()
    wait_for(lambda: query(ROW, parked.id)["status"] == "waiting", what="the run to wait")

    # The new release everywhere, and one worker of the old one, off the shared queue.
    start_worker(**release("plain"))
    start_worker(
        **release("durable", DURABLE_ACCEPT_ONLY="1"), queues=["draining"], name="draining"
    )
    durable_worker.stop()
    draining = drain("--name", "deploying.waits", "--interval", "100ms", RELEASE="plain")
    assert draining.stdout.readline() == "1 runs are left: 1 sleeping or waiting.\n"

    # Producers of the new release send ordinary messages meanwhile.
    app_module.start_plainly("deploying.waits")
    wait_for(lambda: "waits plain" in trace.lines(), what="the plain task")
    assert draining.poll() is None
    parked.send_event("go")
    assert parked.get(timeout=20) == "durable"
    out, _ = draining.communicate(timeout=20)
    assert out.splitlines()[-1] == "No unfinished run is left."
    assert draining.returncode == 0
    assert trace.count() == {"waits plain": 1, "waits durable": 1}


def test_drain_gives_up_in_time_and_says_what_is_left(
    app_module: ModuleType, query: Query, drain: Any
) -> None:
    app_module.waits.delay()
    query(
        "UPDATE durable.workflow_runs SET status = 'paused', reason = 'for a person' RETURNING id"
    )
    app_module.beat.apply_async(countdown=3600)
    process = drain("--timeout", "300ms", "--interval", "100ms")
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    first, last = out.splitlines()
    assert first.startswith("2 runs are left: 1 sleeping or waiting, 1 paused. Paused runs wait")
    assert last.startswith("Error: 2 runs are left after 300ms.")
    other = drain("--name", "deploying.other")
    assert other.communicate(timeout=20)[0] == "No unfinished run is left.\n"


def test_older_code_works_on_a_newer_schema_until_the_schema_forbids_it(
    app_module: ModuleType, start_worker: StartWorker, database_url: str, trace: Trace
) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("UPDATE durable.alembic_version SET version_num = '9999'")
        conn.execute("ALTER TABLE durable.workflow_runs ADD of_tomorrow text DEFAULT 'x' NOT NULL")
        conn.execute("ALTER TABLE durable.step_attempts ADD of_tomorrow text")
        conn.execute("ALTER TABLE durable.workers ADD of_tomorrow text")
        worker = start_worker(**release("durable"))
        assert app_module.beat.delay().get(timeout=20) == "durable"

        conn.execute("UPDATE durable.schema_info SET min_code_version = %s", [CODE_VERSION + 1])
        late = start_worker(**release("durable"), wait=False)
        wait_for(lambda: not late.is_running(), timeout=20, what="the worker to refuse")
        assert f"needs celery-durable code version {CODE_VERSION + 1} or newer" in late.logs()
        assert worker.is_running(), "who runs already goes on"
