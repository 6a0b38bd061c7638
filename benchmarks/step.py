"""One step against the bare INSERT of its row, on one connection each, committed alike."""

from __future__ import annotations

import itertools
import os

from benchmarks.report import Figure, at_most, interleaved
from durable.classify import Classifier
from durable.clock import SYSTEM
from durable.codec import Codec
from durable.execution import Execution, Services
from durable.history import History
from durable.journal import PostgresJournal
from durable.lease import Lease
from durable.steps import step
from durable.store import runs
from durable.store.pool import Database
from durable.store.sessions import Sessions

_BARE = """
INSERT INTO durable.step_attempts
       (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output, created_at,
        completed_at)
VALUES (%s, '', %s, 'benchmarks.step.work', 1, 'run', 'succeeded', %s, now(), now())
"""


@step
def work(number: int) -> dict[str, int]:
    """A small step with a small result."""
    return {"number": number}


def measure(url: str) -> list[Figure]:
    """Time steps through the whole of the package, and bare inserts, in turns."""
    database = Database(lambda: url)
    execution = _execution(database)
    bare, run_id, numbers = database.connect(), SYSTEM.uuid(), itertools.count()

    def one_step() -> None:
        work(1)

    def one_insert() -> None:
        bare.execute(_BARE, (run_id, next(numbers), '{"number":1}'))

    with execution.active():
        times = interleaved({"bare": one_insert, "step": one_step}, rounds=100, per_round=50)
    size = bare.execute(
        "SELECT pg_total_relation_size('durable.step_attempts') / count(*)"
        " FROM durable.step_attempts"
    ).fetchone()
    bare.close()
    database.close()
    return [
        Figure("bare INSERT, committed", f"{times.median('bare') * 1e6:.0f} µs"),
        Figure("one step, Python included", f"{times.median('step') * 1e6:.0f} µs"),
        at_most("one step / bare INSERT", times.ratio("step", "bare"), 1.2, "×"),
        at_most("stored for a small step, heap and indexes", float(size[0]), 250, " bytes"),
    ]


def _execution(database: Database) -> Execution:
    run_id = SYSTEM.uuid()
    database.call(
        runs.insert, runs.NewRun(run_id, "default", "bench", '{"args":[],"kwargs":{}}', "{}")
    )
    claimed = database.call(
        runs.claim, run_id, "default", worker="bench", pid=os.getpid(), tail_timeout=30.0
    )
    assert claimed is not None
    lease = Lease(3600.0, SYSTEM.monotonic)
    lease.renew(SYSTEM.monotonic())
    return Execution(
        id=run_id,
        name="bench",
        attempt=claimed[0].attempt,
        history=History(),
        journal=PostgresJournal(database, Sessions(database, 1), lease, claimed[0]),
        services=Services(Codec(), Classifier(), SYSTEM, ()),
    )
