"""Queries on ``step_attempts``: the one statement that a step costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple

from durable.store.connections import Connection
from durable.store.prepared import Prepared
from durable.store.waits import KEY


class StepAttempt(NamedTuple):
    """One attempt of one step, as it is recorded when it has ended.

    A tuple, since one is made for every step: a frozen dataclass takes five
    times as long to make.

    Attributes:
        fence: the run's ``attempt`` that this belongs to.
        seconds: how long the body ran, by the worker's monotonic clock.
        context: JSON text with ``class``, ``reason`` and ``final`` of a failure.
        opened: whether a row of it may be there already, see `store.long_steps`.
    """

    run_id: str
    fence: int
    branch: str
    ordinal: int
    name: str
    attempt: int
    kind: str
    status: str
    seconds: float
    output: str | None = None
    error: str | None = None
    context: str | None = None
    opened: bool = False


class Written(Enum):
    """What became of a step's record."""

    RECORDED = "recorded"
    FENCED = "fenced"  # the run is another worker's by now: stop
    CANCEL = "cancel"  # recorded, and somebody asked the run to stop for good
    PAUSE = "pause"  # recorded, and somebody asked the run to pause


# FOR SHARE: without the lock a claim fits between the look at the run and the
# commit of the row, loads the history without this step, and runs it again.
# `control` stands in the predicate instead of being returned: asking a run to
# stop is rare, and then costs a second statement; a step pays nothing for it.
# ON CONFLICT: a repeat after a lost answer finds the row in place.
_RECORD = """
INSERT INTO durable.step_attempts
       (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output, error,
        context, created_at, completed_at)
SELECT id, %(branch)s, %(ordinal)s, %(name)s, %(attempt)s, %(kind)s, %(status)s, %(output)s,
       %(error)s, %(context)s, statement_timestamp() - make_interval(secs => %(seconds)s),
       statement_timestamp()
  FROM durable.workflow_runs
 WHERE id = %(run_id)s AND attempt = %(fence)s AND status = 'running' AND control IS NULL
   FOR SHARE
ON CONFLICT DO NOTHING
"""

_record = Prepared("durable_record", _RECORD)

# The same for a run that was asked to stop: what its step did is kept.
_RECORD_CONTROLLED = (
    _RECORD.replace("AND control IS NULL", "AND control IS NOT NULL")
    + "RETURNING (SELECT control FROM durable.workflow_runs WHERE id = %(run_id)s)"
)

# The end of an attempt whose row was opened before (`store.long_steps`). The
# row that a lost answer has ended already is left as it is. What a failed
# attempt has reported stays in `output`, for the next one.
END_OPENED = f"""ON CONFLICT {KEY} DO UPDATE
   SET status = excluded.status, output = coalesce(excluded.output, s.output),
       error = excluded.error, context = excluded.context,
       created_at = least(s.created_at, excluded.created_at), completed_at = excluded.completed_at
 WHERE s.status = 'running'
"""

_END = _RECORD.replace("durable.step_attempts", "durable.step_attempts AS s").replace(
    "ON CONFLICT DO NOTHING\n", END_OPENED
)

_END_CONTROLLED = (
    _END.replace("AND control IS NULL", "AND control IS NOT NULL")
    + "RETURNING (SELECT control FROM durable.workflow_runs WHERE id = %(run_id)s)"
)

# An open row is no record.
_LOOK = """
SELECT r.attempt = %(fence)s AND r.status = 'running', r.control,
       EXISTS (SELECT FROM durable.step_attempts s
                WHERE s.workflow_run_id = r.id AND s.branch = %(branch)s
                  AND s.ordinal = %(ordinal)s AND s.step_name = %(name)s
                  AND s.attempt = %(attempt)s AND s.set_aside = 0
                  AND s.status <> 'running')
  FROM durable.workflow_runs r
 WHERE r.id = %(run_id)s
"""


def record(conn: Connection, step: StepAttempt) -> Written:
    """Record an attempt of a step if the run is still this worker's."""
    params = step._asdict()
    changed = conn.execute(_END, params).rowcount if step.opened else _record.changed(conn, params)
    if changed == 1:
        return Written.RECORDED
    return _look_into(conn, params, _END_CONTROLLED if step.opened else _RECORD_CONTROLLED)


def record_in(cursor: Any, step: StepAttempt) -> Written:
    """Like `record`, as the last statement of a transaction that the caller commits."""
    params = step._asdict()
    cursor.execute(_END if step.opened else _RECORD, params)
    if cursor.rowcount == 1:
        return Written.RECORDED
    cursor.execute(_END_CONTROLLED if step.opened else _RECORD_CONTROLLED, params)
    row = cursor.fetchone()
    return Written.FENCED if row is None else Written(row[0])


def was_recorded(conn: Connection, step: StepAttempt) -> bool:
    """Tell whether a commit whose answer was lost took place."""
    row = conn.execute(_LOOK, step._asdict()).fetchone()
    return bool(row and row[2])


def _look_into(conn: Connection, params: Mapping[str, object], controlled: str) -> Written:
    row = conn.execute(_LOOK, params).fetchone()
    ours, control, recorded = row or (False, None, False)
    if not ours:
        return Written.FENCED
    if control is None:
        return Written.RECORDED if recorded else Written.FENCED
    if recorded or conn.execute(controlled, params).rowcount == 1:
        return Written(control)
    return Written.FENCED


_OF_RUN = """
SELECT s.branch, s.ordinal, s.step_name, s.attempt, s.kind, s.status, s.output, s.error,
       s.context::text, s.created_at, s.completed_at
  FROM durable.step_attempts s JOIN durable.workflow_runs r ON r.id = s.workflow_run_id
 WHERE r.id = %(id)s AND r.namespace_id = %(namespace)s AND s.set_aside = 0
 ORDER BY s.branch, s.ordinal, s.attempt
"""


@dataclass(frozen=True, slots=True)
class StepRow:
    """An attempt of a step as clients see it. JSON as text, times as aware datetimes."""

    branch: str
    ordinal: int
    name: str
    attempt: int
    kind: str
    status: str
    output: str | None
    error: str | None
    context: str | None
    started_at: datetime
    completed_at: datetime | None


def of_run(conn: Connection, run_id: str, namespace: str) -> list[StepRow]:
    """Load the attempts of a run's steps, in order."""
    rows = conn.execute(_OF_RUN, {"id": run_id, "namespace": namespace}).fetchall()
    return [StepRow(*row) for row in rows]
