"""Starts in the caller's transaction: how soon after the commit; and thousands at once."""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable

import psycopg

import durable
from benchmarks import workers
from benchmarks.report import Figure, at_least, at_most

_STARTS = 200
_MANY = 10_000
_ROUNDS = 3

_STARTED = "SELECT extract(epoch FROM started_at)::float8 FROM durable.workflow_runs WHERE id = %s"
_CLOCK = "SELECT extract(epoch FROM clock_timestamp())::float8"


def measure(url: str) -> list[Figure]:
    """Commit to start with an idle worker; then `start_many`, with no worker in its way."""
    os.environ["DURABLE_BENCH_DATABASE"] = url
    apps = importlib.import_module("benchmarks.apps")
    task = apps.durable_noop
    with (
        psycopg.connect(url) as mine,
        psycopg.connect(url, autocommit=True) as conn,
        workers.worker("durable_app"),
    ):
        task.delay().get(timeout=30)

        def in_transaction() -> str:
            return str(task.apply_async(transaction=mine).id)

        def by_sql() -> str:
            row = mine.execute("SELECT durable.enqueue(%s)", (task.name,)).fetchone()
            return str(row[0])

        python = [_commit_to_start(mine, conn, in_transaction) for _ in range(_STARTS)]
        sql = [_commit_to_start(mine, conn, by_sql) for _ in range(_STARTS)]
    rate = statistics.median(_start_many(apps.durable_steps) for _ in range(_ROUNDS))
    return [
        at_most("commit to start, transaction=, p50", _median_ms(python), 100, " ms"),
        Figure("commit to start, transaction=, p95", f"{_p95_ms(python):.3g} ms"),
        at_most("commit to start, durable.enqueue, p50", _median_ms(sql), 100, " ms"),
        at_least(f"start_many of {_MANY:,} runs, accepted", rate, 4_000, " /s"),
    ]


def _commit_to_start(
    mine: psycopg.Connection, conn: psycopg.Connection, start: Callable[[], str]
) -> float:
    """Seconds from just before the commit to the claim, both by the server's clock."""
    run_id = start()
    committed = mine.execute(_CLOCK).fetchone()[0]
    mine.commit()
    while (started := conn.execute(_STARTED, (run_id,)).fetchone()[0]) is None:
        time.sleep(0.0005)
    return float(started) - committed


def _start_many(task: object) -> float:
    items = [(number,) for number in range(_MANY)]
    started = time.perf_counter()
    durable.start_many(task, items)
    return _MANY / (time.perf_counter() - started)


def _median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def _p95_ms(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1] * 1e3
