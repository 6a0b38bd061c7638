"""A fan-out of ten thousand small steps over two workers."""

from __future__ import annotations

import importlib
import os
import time

import psutil
import psycopg

from benchmarks import workers
from benchmarks.report import Figure, at_least, at_most

_ITEMS = 10_000
_RUNS = 2_000  # single ones, to compare with
_CONCURRENCY = 1  # of each worker

_RUNS_DONE = "SELECT count(*) FROM durable.workflow_runs WHERE status = 'succeeded'"
_CLAIMS = """
SELECT count(*), sum(attempt) FROM durable.workflow_runs WHERE fan_out_id IS NOT NULL
"""
_HISTORY = "SELECT count(*) FROM durable.step_attempts WHERE workflow_run_id = %s"
_INSERTED = """
SELECT extract(epoch FROM max(c.created_at) - p.started_at)
  FROM durable.workflow_runs p JOIN durable.workflow_runs c ON c.parent_run_id = p.id
 WHERE p.id = %s GROUP BY p.started_at
"""
_BACKENDS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
_LATENCY = """
SELECT extract(epoch FROM p.completed_at - max(c.completed_at))
  FROM durable.workflow_runs p JOIN durable.workflow_runs c ON c.parent_run_id = p.id
 WHERE p.id = %s GROUP BY p.completed_at
"""


def measure(url: str) -> list[Figure]:
    """Fan out, wait for the results, look at what it took."""
    os.environ["DURABLE_BENCH_DATABASE"] = url
    apps = importlib.import_module("benchmarks.apps")
    for _ in range(_RUNS):
        apps.durable_noop.delay()
    with (
        workers.worker("durable_app", concurrency=_CONCURRENCY, name="one") as one,
        workers.worker("durable_app", concurrency=_CONCURRENCY, name="two") as two,
        psycopg.connect(url, autocommit=True) as conn,
    ):
        single = workers.rate(lambda: conn.execute(_RUNS_DONE).fetchone()[0], _RUNS)
        before = apps.durable_fan_out.delay(2).get(timeout=60)
        conn.execute("DELETE FROM durable.workflow_runs WHERE fan_out_id IS NOT NULL")
        spent = _processor_seconds(conn, one.pid, two.pid)
        started = time.perf_counter()
        run = apps.durable_fan_out.delay(_ITEMS)
        after = run.get(timeout=600)
        seconds = time.perf_counter() - started
        spent = [
            after - before
            for before, after in zip(spent, _processor_seconds(conn, one.pid, two.pid), strict=True)
        ]
        items, claims = conn.execute(_CLAIMS).fetchone()
        history, inserted, woken = (
            conn.execute(query, (run.id,)).fetchone()[0]
            for query in (_HISTORY, _INSERTED, _LATENCY)
        )
    assert after["sum"] == _ITEMS * (_ITEMS - 1) // 2
    assert (items, claims) == (_ITEMS, _ITEMS)  # each was claimed once
    return [
        at_least(f"{_ITEMS:,} items, delay() to result", _ITEMS / seconds, 400, " items/s"),
        Figure("single no-op runs through the same workers", f"{single:,.0f} /s"),
        at_least("item / single run", _ITEMS / seconds / single, 0.8, "×"),
        Figure("until the last item was inserted", f"{inserted:.2f} s"),
        Figure("processor time of the workers, an item", f"{spent[0] / _ITEMS * 1e6:.0f} µs"),
        Figure("processor time of Postgres, an item", f"{spent[1] / _ITEMS * 1e6:.0f} µs"),
        Figure("last item's end to the parent's end", f"{float(woken) * 1e3:,.0f} ms"),
        at_most("rows of the parent's history", history, 1),
        Figure("the parent's process, at most", f"{after['rss'] / 1024:,.0f} MiB"),
        Figure("the same with two items", f"{before['rss'] / 1024:,.0f} MiB"),
    ]


def _processor_seconds(conn: psycopg.Connection, *pids: int) -> tuple[float, float]:
    """Processor time so far of the workers with their children, and of the database's backends."""
    processes = [psutil.Process(pid) for pid in pids]
    processes += [child for process in processes for child in process.children(recursive=True)]
    backends = [psutil.Process(pid) for (pid,) in conn.execute(_BACKENDS)]
    return _seconds(processes), _seconds(backends)


def _seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)
