"""The outcome of a plain task goes to the run that started it; runs do so by a trigger."""

from __future__ import annotations

from dataclasses import dataclass

from durable.store.connections import Connection


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a plain task ended. JSON as text.

    Attributes:
        waiter: the run that started it.
        status: ``succeeded``, ``failed`` or ``canceled``.
    """

    waiter: str
    task_id: str
    task_name: str
    status: str
    output: str | None = None
    error: str | None = None
    reason: str | None = None


# Of a run that has ended already, the outcome is told once more: the waiter
# may have been restarted since, and what it heard before was set aside. One
# that ends at this moment tells it itself.
_TELLS = """
SELECT completed_at IS NULL OR durable.deliver(
           parent_run_id, id::text, workflow_name, status,
           CASE WHEN status = 'succeeded' THEN output END,
           CASE WHEN status = 'failed' THEN error END, reason)::text IS NOT NULL
  FROM durable.workflow_runs
 WHERE id = %(run)s AND parent_run_id = %(waiter)s AND reports
"""

_DELIVER = """
SELECT durable.deliver(%(waiter)s, %(task_id)s, %(task_name)s, %(status)s, %(output)s::json,
                       %(error)s::json, %(reason)s)
"""


def deliver(conn: Connection, outcome: Outcome) -> None:
    """Put an outcome into the history of the run that waits for it, and wake the run."""
    conn.execute(_DELIVER, {field: getattr(outcome, field) for field in Outcome.__slots__})


def tells(conn: Connection, run_id: str, waiter: str) -> bool:
    """Whether a run's outcome goes to ``waiter``: not that of one which somebody else started."""
    return conn.execute(_TELLS, {"run": run_id, "waiter": waiter}).fetchone() is not None
