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


_DELIVER = """
SELECT durable.deliver(%(waiter)s, %(task_id)s, %(task_name)s, %(status)s, %(output)s::json,
                       %(error)s::json, %(reason)s)
"""


def deliver(conn: Connection, outcome: Outcome) -> None:
    """Put an outcome into the history of the run that waits for it, and wake the run."""
    conn.execute(_DELIVER, {field: getattr(outcome, field) for field in Outcome.__slots__})
