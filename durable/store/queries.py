"""What clients ask about runs: the row, the outcome, whose it is. Nothing here changes a run."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import NamedTuple

from psycopg.rows import class_row

from durable.errors import RunNotFound
from durable.store.connections import Connection
from durable.store.prepared import Prepared


def is_run_id(task_id: str) -> bool:
    """Tell ids of runs, which are UUIDs, from those that a user gave to plain tasks."""
    try:
        uuid.UUID(task_id)
    except ValueError:
        return False
    return True


def checked_run_id(run_id: object) -> str:
    """Return the id of a run in Postgres' spelling.

    Raises:
        RunNotFound: no run can have that id.
    """
    try:
        return str(uuid.UUID(str(run_id)))
    except ValueError:
        raise RunNotFound(f"{run_id!r:.80} is not the id of a run, which is a UUID") from None


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run as clients see it. JSON as text, times as aware datetimes."""

    id: str
    namespace: str
    name: str
    status: str
    worker_id: str | None
    attempt: int
    retries: int
    recoveries: int
    reason: str | None
    input: str | None
    output: str | None
    error: str | None
    progress: str | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    available_at: datetime | None
    deadline_at: datetime | None
    subject: str | None
    erased_at: datetime | None
    version: str | None
    generation: int
    passes: int
    handed_back: int


_GET = """
SELECT id::text, namespace_id AS namespace, workflow_name AS name, status, worker_id, attempt,
       retries, recoveries, reason, input, output, error, progress,
       created_at, started_at, completed_at,
       nullif(available_at, 'infinity') AS available_at, deadline_at,
       subject, erased_at, version, generation, passes, handed_back
  FROM durable.workflow_runs
 WHERE id = %(id)s AND namespace_id = %(namespace)s
"""


def get(conn: Connection, run_id: str, namespace: str) -> RunRow | None:
    """Load a run as clients see it."""
    with conn.cursor(row_factory=class_row(RunRow)) as cursor:
        return cursor.execute(_GET, {"id": run_id, "namespace": namespace}).fetchone()


_OUTCOME = """
SELECT namespace_id, status, (started_at IS NOT NULL)::text, reason,
       CASE WHEN status = 'succeeded' THEN output::text END,
       CASE WHEN status = 'failed' THEN error::text END,
       CASE WHEN status NOT IN ('succeeded', 'failed', 'canceled') THEN progress::text END,
       extract(epoch FROM completed_at)::text, (erased_at IS NOT NULL)::text
  FROM durable.workflow_runs
 WHERE id = %(id)s
"""

_outcome = Prepared("durable_outcome", _OUTCOME)


class Outcome(NamedTuple):
    """What ``get()`` polls; JSON as text."""

    namespace: str
    status: str
    started: bool
    reason: str | None
    output: str | None
    error: str | None
    progress: str | None
    completed_at: datetime | None
    erased: bool


def outcome(conn: Connection, run_id: str, namespace: str) -> Outcome | None:
    """Load the outcome of a run, or how far it is.

    Raises:
        RunNotFound: the run belongs to another namespace.
    """
    row = _outcome.row(conn, {"id": run_id})
    if row is None:
        return None
    *texts, started, reason, output, error, progress, ended, erased = row
    if texts[0] != namespace:
        raise foreign(run_id, str(texts[0]), namespace)
    completed_at = None if ended is None else datetime.fromtimestamp(float(ended), timezone.utc)
    return Outcome(
        namespace,
        str(texts[1]),
        started == "true",
        reason,
        output,
        error,
        progress,
        completed_at,
        erased == "true",
    )


_NAME = """
SELECT workflow_name FROM durable.workflow_runs
 WHERE id = %(id)s::uuid AND namespace_id = %(namespace)s
"""


def name_of(conn: Connection, run_id: str, namespace: str) -> str | None:
    """Tell of which workflow a run of the namespace is."""
    row: tuple[str] | None = conn.execute(_NAME, {"id": run_id, "namespace": namespace}).fetchone()
    return None if row is None else row[0]


_INPUT = "SELECT input::text FROM durable.workflow_runs WHERE id = %(id)s::uuid"


def input_of(conn: Connection, run_id: str) -> str | None:
    """Load what a run was started with, as JSON text."""
    row: tuple[str | None] | None = conn.execute(_INPUT, {"id": run_id}).fetchone()
    return None if row is None else row[0]


_NAMESPACE = "SELECT namespace_id FROM durable.workflow_runs WHERE id = %(id)s::uuid"


def namespace_of(conn: Connection, run_id: str) -> str | None:
    """Tell whose a run is. None: there is no such run."""
    row: tuple[str] | None = conn.execute(_NAMESPACE, {"id": run_id}).fetchone()
    return None if row is None else row[0]


def missing(conn: Connection, run_id: str, namespace: str) -> RunNotFound:
    """Make the error for a run that is not in this namespace: it may be in another."""
    theirs = namespace_of(conn, run_id)
    if theirs is not None and theirs != namespace:
        return foreign(run_id, theirs, namespace)
    return RunNotFound(f"there is no run {run_id} in namespace {namespace!r}")


def foreign(run_id: str, theirs: str, ours: str) -> RunNotFound:
    """Make the error for a run of another namespace."""
    return RunNotFound(
        f"run {run_id} belongs to namespace {theirs!r}, and this app's durable_namespace is {ours!r}"
    )


_KNOWN = """
SELECT id::text FROM durable.workflow_runs
 WHERE id = ANY(%(ids)s::uuid[]) AND namespace_id = %(namespace)s
"""


def known(conn: Connection, run_ids: Sequence[str], namespace: str) -> set[str]:
    """Tell which of these ids are runs of the namespace."""
    params = {"ids": list(run_ids), "namespace": namespace}
    return {row[0] for row in conn.execute(_KNOWN, params).fetchall()}


def now(conn: Connection) -> datetime:
    """Read the database's clock: an aware datetime in UTC."""
    row = conn.execute("SELECT clock_timestamp() AT TIME ZONE 'utc'").fetchone()
    assert row is not None
    moment: datetime = row[0]
    return moment.replace(tzinfo=timezone.utc)
