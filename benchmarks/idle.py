"""What an idle worker asks of Postgres."""

from __future__ import annotations

import os
import time

import psycopg

from benchmarks import workers
from benchmarks.report import Figure, at_most

_SECONDS = 20.0

# Each statement of an idle worker is a transaction of its own.
_TRANSACTIONS = """
SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()
"""


def measure(url: str) -> list[Figure]:
    """Count the transactions of one idle worker, less those of the counting."""
    os.environ["DURABLE_BENCH_DATABASE"] = url
    with psycopg.connect(url, autocommit=True) as conn, workers.worker("durable_app"):
        while not conn.execute("SELECT count(*) FROM durable.workers").fetchone()[0]:
            time.sleep(0.1)
        time.sleep(5)  # statistics of the start come in late
        before = _transactions(conn)
        time.sleep(_SECONDS)
        after = _transactions(conn)
    return [at_most("statements of an idle worker", (after - before - 2) / _SECONDS, 1.2, " /s")]


def _transactions(conn: psycopg.Connection) -> int:
    conn.execute("SELECT pg_stat_clear_snapshot()")
    return int(conn.execute(_TRANSACTIONS).fetchone()[0])
