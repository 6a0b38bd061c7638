"""Runs through a real worker, against Celery with its own Postgres result backend."""

from __future__ import annotations

import importlib
import os
import statistics

import psycopg

from benchmarks import workers
from benchmarks.report import Figure, at_least, at_most, interleaved

_TASKS = 3_000
_ROUNDS = 3

_RUNS_DONE = "SELECT count(*) FROM durable.workflow_runs WHERE status = 'succeeded'"
_TASKS_DONE = "SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'"


def measure(url: str) -> list[Figure]:
    """Drain queues of no-ops in turns, then time single calls."""
    os.environ["DURABLE_BENCH_DATABASE"] = url
    apps = importlib.import_module("benchmarks.apps")
    rates: dict[str, list[float]] = {"durable": [], "database": [], "steps": []}
    with psycopg.connect(url, autocommit=True) as conn:
        for _ in range(_ROUNDS):
            rates["durable"].append(
                _drain(
                    conn, "durable_app", apps.durable_noop, (), "durable.workflow_runs", _RUNS_DONE
                )
            )
            rates["database"].append(
                _drain(conn, "database_app", apps.database_noop, (), "celery_taskmeta", _TASKS_DONE)
            )
            rates["steps"].append(
                _drain(
                    conn,
                    "durable_app",
                    apps.durable_steps,
                    (5,),
                    "durable.workflow_runs",
                    _RUNS_DONE,
                )
            )
    median = {name: statistics.median(each) for name, each in rates.items()}
    return [
        Figure("durable no-op runs", f"{median['durable']:,.0f} /s"),
        Figure(
            "plain no-op tasks, Celery's Postgres result backend", f"{median['database']:,.0f} /s"
        ),
        at_least("durable / plain", median["durable"] / median["database"], 1.5, "×"),
        Figure("durable runs of 5 steps", f"{median['steps']:,.0f} /s"),
        *_latency(apps),
    ]


def _drain(
    conn: psycopg.Connection,
    app: str,
    task: object,
    args: tuple[object, ...],
    table: str,
    done: str,
) -> float:
    if conn.execute("SELECT to_regclass(%s)", (table,)).fetchone()[0] is not None:
        conn.execute(f"TRUNCATE {table} CASCADE")
    for _ in range(_TASKS):
        task.apply_async(args)
    with workers.worker(app):
        return workers.rate(lambda: _count(conn, table, done), _TASKS)


def _count(conn: psycopg.Connection, table: str, done: str) -> int:
    if conn.execute("SELECT to_regclass(%s)", (table,)).fetchone()[0] is None:
        return 0
    return int(conn.execute(done).fetchone()[0])


def _latency(apps: object) -> list[Figure]:
    with workers.worker("durable_app"), workers.worker("redis_app"):
        apps.durable_noop.delay().get(timeout=30)
        apps.redis_noop.delay().get(timeout=30)
        times = interleaved(
            {
                "durable": lambda: apps.durable_noop.delay().get(timeout=30),
                "redis": lambda: apps.redis_noop.delay().get(timeout=30),
            },
            rounds=200,
            per_round=1,
        )
    return [
        Figure("delay() to result, durable, p50", f"{times.median('durable') * 1e3:.2f} ms"),
        Figure(
            "delay() to result, plain with Redis results, p50",
            f"{times.median('redis') * 1e3:.2f} ms",
        ),
        at_most("durable / plain", times.ratio("durable", "redis"), 1.6, "×"),
    ]
