"""Beats start one run per entry and due time, however many of them there are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.shared import ROOT, Shared, running
from tests.conftest import WORKERS
from tests.harness import wait_for
from tests.harness.postgres import PostgresServer

PERIOD = 0.5
RUNS = "SELECT count(*) FROM durable.workflow_runs WHERE workflow_name = %s"


@pytest.fixture(scope="module")
def shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("beat")
    schedule = {
        "known": {"task": "tests.apps.canvas.add", "schedule": PERIOD, "args": [1, 2]},
        "plain": {"task": "tests.apps.canvas.plain_double", "schedule": PERIOD, "args": [1]},
        # Beat does not know this one, as when it runs from another code base.
        "by name": {"task": "shared.of_workers", "schedule": PERIOD},
    }
    with running(
        "tests.apps.canvas", postgres_server, directory, beat_schedule=schedule, worker=None
    ) as shared:
        more = ("--without-mingle", "--without-gossip", "-I", "tests.apps.workers_only")
        shared.start_worker(args=more)
        yield shared


def start_beat(shared: Shared, name: str) -> subprocess.Popen[bytes]:
    directory = shared.directory
    command = [sys.executable, "-m", "celery", "-A", shared.module.__name__, "beat"]
    command += ["-s", str(directory / name), "--pidfile", "", "--max-interval", "1"]
    with (directory / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "-l", "INFO"], env=shared.env, cwd=ROOT, stdout=log, stderr=log
        )


def sent(log: Path, entry: str) -> int:
    return log.read_text().count(f"Sending due task {entry}")


def test_two_beats_start_one_run_for_each_due_time(
    shared: Shared, request: pytest.FixtureRequest
) -> None:
    request.node.stash[WORKERS] = shared.workers
    beats = [start_beat(shared, name) for name in ("left", "right")]
    logs = [shared.directory / "left.log", shared.directory / "right.log"]
    try:
        wait_for(lambda: all(sent(log, "by name") >= 4 for log in logs), timeout=30, what="4 times")
    finally:
        for beat in beats:
            beat.terminate()
        assert [beat.wait(10) for beat in beats] == [0, 0]

    ended = RUNS + " AND status = 'succeeded'"
    for entry, task in (("known", "tests.apps.canvas.add"), ("by name", "shared.of_workers")):
        both = sum(sent(log, entry) for log in logs)
        each = max(sent(log, entry) for log in logs)
        wait_for(
            lambda task=task: shared.query(ended, task) == shared.query(RUNS, task),
            what=f"the runs of {task} to end",
        )
        started = shared.query(RUNS, task)
        assert each <= started < both, (started, logs[0].read_text(), logs[1].read_text())
    # A plain task is Celery's alone: each beat sends one.
    plain = sum(sent(log, "plain") for log in logs)
    wait_for(
        lambda: shared.trace.read_text().count("plain_double") == plain, what="the plain tasks"
    )


def test_a_beat_inside_a_worker_starts_runs(shared: Shared, request: pytest.FixtureRequest) -> None:
    request.node.stash[WORKERS] = shared.workers
    before = shared.query(RUNS, "tests.apps.canvas.add")
    schedule = str(shared.directory / "embedded")
    args = ("--without-mingle", "--without-gossip", "-B", "-s", schedule)
    worker = shared.start_worker(args=args, concurrency=1)
    wait_for(
        lambda: shared.query(RUNS, "tests.apps.canvas.add") >= before + 2, what="the beat's runs"
    )
    worker.kill()  # a warm stop under this load may wait half a minute for a result: billiard's
