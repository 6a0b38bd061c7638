"""The store's queries in short, and statements that wait where a test wants them to."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import psycopg
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader

from durable.store import runs, workers
from durable.store.connections import Connection
from durable.store.pool import Database
from durable.store.runs import Claim, NewRun, Park, StepRecord
from durable.store.steps import StepAttempt
from durable.store.workers import Beat, Pulse, Recovery
from tests.harness.waiting import wait_for

P = ParamSpec("P")
T = TypeVar("T")

RECOVERY = Recovery(max_recoveries=3, error='{"type": "durable.errors:RunLost"}')


@dataclass(frozen=True)
class Store:
    """One connection, one namespace, and what the tests do with them all the time."""

    conn: Connection
    namespace: str = "default"

    @property
    def backend(self) -> int:
        return self.conn.info.backend_pid

    def start(self, **options: Any) -> str:
        """Insert a run; its id."""
        given = {"id": str(uuid.uuid4()), "namespace": self.namespace, "name": "shop.order"}
        run = NewRun(**{**given, "input": '{"args":[],"kwargs":{}}', "message": "{}", **options})
        assert runs.insert(self.conn, run)
        return run.id

    def claim(
        self, run_id: str, worker: str = "w1", pid: int = 1
    ) -> tuple[Claim, list[StepRecord]] | None:
        found = runs.claim(
            self.conn, run_id, self.namespace, worker=worker, pid=pid, tail_timeout=30.0
        )
        return None if found is None else (found[0], list(found[1]))

    def hold(self, run_id: str, worker: str = "w1", pid: int = 1) -> Claim:
        """Claim a run that is there for the taking."""
        found = self.claim(run_id, worker, pid)
        assert found is not None
        return found[0]

    def running(self, **options: Any) -> Claim:
        """Start a run and claim it."""
        return self.hold(self.start(**options))

    def park(self, claim: Claim, how: Park, failed: StepAttempt | None = None) -> bool:
        return runs.park(self.conn, claim.id, claim.attempt, claim.wake, how, failed)

    def finish(self, claim: Claim, status: str = "succeeded", **outcome: Any) -> bool:
        return runs.finish(
            self.conn, claim.id, claim.attempt, status, **{"tail_timeout": 30.0, **outcome}
        )

    def cancel(self, *run_ids: str, reason: str = "canceled") -> dict[str, str]:
        return runs.cancel(self.conn, run_ids, self.namespace, reason)

    def beat(self, worker: str, **report: Any) -> Pulse:
        return workers.beat(self.conn, self.report(worker, **report))

    def report(self, worker: str, **report: Any) -> Beat:
        beat = Beat(worker, self.namespace, "host", 1, "prefork", 2, ["celery"], [], 2, 2)
        return replace(beat, **report)

    def release_child(self, worker: str = "w1", pid: int = 1) -> list[str]:
        return workers.release_child(self.conn, worker, pid, RECOVERY)

    def row(self, run_id: str) -> dict[str, Any]:
        """All of a run's row, and ``due_in``: seconds until ``available_at``, None for never."""
        with self.conn.cursor(row_factory=dict_row) as cursor:
            cursor.adapters.register_loader("timestamptz", TextLoader)  # 'infinity' is no datetime
            row = cursor.execute(
                "SELECT *, CASE WHEN available_at < 'infinity'"
                " THEN extract(epoch FROM available_at - now())::float8 END AS due_in"
                " FROM durable.workflow_runs WHERE id = %s",
                (run_id,),
            ).fetchone()
        assert row is not None
        return row

    def status(self, run_id: str) -> str:
        return str(self.row(run_id)["status"])

    def set(self, run_id: str, **columns: str) -> None:
        """Put SQL expressions into columns of a run: time that has passed, say."""
        pairs = ", ".join(f"{column} = {value}" for column, value in columns.items())
        statement = f"UPDATE durable.workflow_runs SET {pairs} WHERE id = %s"
        self.conn.execute(statement.encode(), (run_id,))

    def steps(self, run_id: str) -> list[tuple[Any, ...]]:
        """Ordinal, name, attempt, status and generation of what is recorded."""
        return self.conn.execute(
            "SELECT ordinal, step_name, attempt, status, set_aside FROM durable.step_attempts"
            " WHERE workflow_run_id = %s ORDER BY 1, 3, 5",
            (run_id,),
        ).fetchall()


def step_of(
    claim: Claim,
    ordinal: int = 0,
    name: str = "charge",
    *,
    attempt: int = 1,
    status: str = "succeeded",
    **rest: Any,
) -> StepAttempt:
    """An ended attempt of a step, as the claim's worker records it."""
    rest = {"output": "1" if status == "succeeded" else None, **rest}
    return StepAttempt(
        claim.id, claim.attempt, "", ordinal, name, attempt, "run", status, 0.01, **rest
    )


@contextmanager
def open_database(url: str, **options: Any) -> Iterator[Database]:
    """A `Database` as an app has one, closed afterwards."""
    database = Database(lambda: url, **options)
    try:
        yield database
    finally:
        database.close()


@dataclass
class Traffic:
    """What went over the wire: statements executed, and how often an answer was waited for."""

    statements: int = 0
    round_trips: int = 0


@contextmanager
def traced(conn: Connection) -> Iterator[Traffic]:
    """Count what a connection sends, as libpq sees it."""
    traffic = Traffic()
    with tempfile.TemporaryFile() as file:
        conn.pgconn.trace(file.fileno())
        try:
            yield traffic
        finally:
            conn.pgconn.untrace()
        file.seek(0)
        lines = file.read().decode(errors="replace").splitlines()
    sent = [line.split("\t")[3] for line in lines if "\tF\t" in line]
    traffic.statements = sum(kind in {"Execute", "Query"} for kind in sent)
    traffic.round_trips = sum("\tReadyForQuery" in line for line in lines)


class Background:
    """Calls functions in a thread; most of them are to wait for a lock."""

    def __init__(self, url: str) -> None:
        self._threads = ThreadPoolExecutor(4)
        self._conn = psycopg.connect(url, autocommit=True)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self._threads.submit(function, *args, **kwargs)

    def blocked(
        self, store: Store, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Call it and return when the connection of ``store`` waits for somebody's lock."""
        future = self.call(function, *args, **kwargs)

        def waits() -> bool:
            if future.done():
                raise AssertionError(f"it did not wait: {future.result()!r}")
            query = "SELECT cardinality(pg_blocking_pids(%s)) > 0"
            row = self._conn.execute(query, (store.backend,)).fetchone()
            return bool(row and row[0])

        wait_for(waits, what="the statement to wait for a lock")
        return future

    def close(self) -> None:
        self._conn.close()
        self._threads.shutdown()
