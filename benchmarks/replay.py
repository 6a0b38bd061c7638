"""The replay of a long history: one query."""

from __future__ import annotations

import os
import time

from benchmarks.report import Figure, at_most
from durable.clock import SYSTEM
from durable.history import History
from durable.store import runs
from durable.store.pool import Database

_STEPS = 10_000

_FILL = """
INSERT INTO durable.step_attempts
       (workflow_run_id, ordinal, step_name, attempt, kind, status, output, completed_at)
SELECT %s, n, 'benchmarks.replay.step', 1, 'run', 'succeeded', '{"number": 1}', now()
  FROM generate_series(0, %s) n
"""

_CLAIMED_BEFORE = "UPDATE durable.workflow_runs SET attempt = 1 WHERE id = %s"


def measure(url: str) -> list[Figure]:
    """Claim a run of 10,000 recorded steps and look each of them up."""
    database = Database(lambda: url)
    best = min(_replay(database) for _ in range(5))
    database.close()
    return [at_most(f"claim and replay of {_STEPS:,} steps", best * 1e3, 100, " ms")]


def _replay(database: Database) -> float:
    run_id = SYSTEM.uuid()
    database.call(
        runs.insert, runs.NewRun(run_id, "default", "bench", '{"args":[],"kwargs":{}}', "{}")
    )
    database.call(lambda conn: conn.execute(_FILL, (run_id, _STEPS - 1)))
    database.call(lambda conn: conn.execute(_CLAIMED_BEFORE, (run_id,)))
    started = time.perf_counter()
    claimed = database.call(
        runs.claim, run_id, "default", worker="bench", pid=os.getpid(), tail_timeout=30.0
    )
    assert claimed is not None
    history = History(claimed[1])
    found = [history.attempts("", n, "benchmarks.replay.step")[-1].output for n in range(_STEPS)]
    assert len(found) == _STEPS
    return time.perf_counter() - started
