"""Queries on ``workflow_events``: what is sent to a run from outside."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from psycopg.rows import class_row

from durable.errors import RunEnded
from durable.store.connections import Connection
from durable.store.queries import missing
from durable.store.waits import HELD_RUN, Place


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event as it is inserted; the sender makes the id, so that a repeat does no harm."""

    id: str
    run_id: str
    namespace: str
    type: str
    payload: str
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event as clients see it. The payload is JSON text, times are aware datetimes.

    Attributes:
        received_at: when it was accepted, by the database's clock.
        consumed_at: when a wait took or refused it; None: not yet.
        branch: and ``ordinal``: the place of that wait, as in ``result.steps()``.
        error: why the schema of that wait refused the payload; None: it did not.
    """

    id: str
    type: str
    payload: str
    idempotency_key: str | None
    received_at: datetime
    consumed_at: datetime | None
    branch: str | None
    ordinal: int | None
    error: str | None

    @property
    def consumed_by(self) -> str | None:
        """The step that took or refused it, for people; None: none has."""
        if self.ordinal is None:
            return None
        branch = f" of branch {self.branch}" if self.branch else ""
        return f"step {self.ordinal}{branch}: wait for {self.type!r}"


# In one commit: the event, and its run woken by primary key (see durable.wake).
# The update comes first and locks the row, so events of a run get their `seq`
# in the order in which they are committed. ON CONFLICT: a repeat after a lost
# answer, or the second event of an idempotency key.
_SEND = """
WITH run AS MATERIALIZED (
    UPDATE durable.workflow_runs
       SET wake = wake + 1,
           available_at = CASE WHEN status = 'waiting' AND NOT held THEN now()
                               ELSE available_at END,
           status = CASE WHEN status = 'waiting' AND NOT held THEN 'pending' ELSE status END
     WHERE id = %(run_id)s AND namespace_id = %(namespace)s
       AND status NOT IN ('succeeded', 'failed', 'canceled')
    RETURNING id, namespace_id, status
), event AS (
    INSERT INTO durable.workflow_events
           (id, workflow_run_id, namespace_id, event_type, payload, idempotency_key)
    SELECT %(id)s, id, namespace_id, %(type)s, %(payload)s, %(idempotency_key)s FROM run
    ON CONFLICT DO NOTHING
    RETURNING id
)
SELECT (SELECT id::text FROM event),
       CASE WHEN status = 'pending' THEN pg_notify('durable', namespace_id) END
  FROM run
"""

_KNOWN = """
SELECT id::text FROM durable.workflow_events
 WHERE namespace_id = %(namespace)s AND workflow_run_id = %(run_id)s
   AND (id = %(id)s OR idempotency_key = %(idempotency_key)s)
"""

_STATUS = """
SELECT status FROM durable.workflow_runs WHERE id = %(run_id)s AND namespace_id = %(namespace)s
"""


def send(conn: Connection, event: NewEvent) -> str:
    """Send an event; its id, or that of the first one of the same idempotency key.

    Raises:
        RunEnded: the run has ended.
        RunNotFound: there is no such run in this namespace.
    """
    params = {field: getattr(event, field) for field in NewEvent.__slots__}
    row = conn.execute(_SEND, params).fetchone()
    if row is not None and row[0] is not None:
        return str(row[0])
    known = conn.execute(_KNOWN, params).fetchone()
    if known is not None:
        return str(known[0])
    status = conn.execute(_STATUS, params).fetchone()
    if status is None:
        raise missing(conn, event.run_id, event.namespace)
    raise RunEnded(
        f"run {event.run_id} has ended ({status[0]}): it takes no event {event.type!r} any more"
    )


# Those in the outbox are sent, too: they are committed, and delivered any moment.
_OF_RUN = """
SELECT id, type, payload, idempotency_key, received_at, consumed_at, branch, ordinal, error
  FROM (SELECT e.id::text, e.event_type AS type, e.payload, e.idempotency_key, e.received_at,
               e.consumed_at, e.consumed_branch AS branch, e.consumed_ordinal AS ordinal, e.error,
               0 AS place, e.seq
          FROM durable.workflow_events e
         WHERE e.workflow_run_id = %(id)s AND e.namespace_id = %(namespace)s
         UNION ALL
        SELECT o.id::text, o.event_type, o.payload, o.idempotency_key, o.created_at,
               NULL, NULL, NULL, NULL, 1, o.seq
          FROM durable.outbox o
         WHERE o.workflow_run_id = %(id)s AND o.namespace_id = %(namespace)s AND o.kind = 'event'
       ) sent
 ORDER BY place, seq
"""


def of_run(conn: Connection, run_id: str, namespace: str) -> list[EventRow]:
    """Load the events that were sent to a run, in order."""
    with conn.cursor(row_factory=class_row(EventRow)) as cursor:
        return cursor.execute(_OF_RUN, {"id": run_id, "namespace": namespace}).fetchall()


_NEXT = """
SELECT r.wake, e.id::text, e.payload
  FROM durable.workflow_runs r
  LEFT JOIN LATERAL (
       SELECT id, payload FROM durable.workflow_events
        WHERE workflow_run_id = r.id AND event_type = %(type)s AND consumed_at IS NULL
        ORDER BY seq LIMIT 1) e ON true
 WHERE r.id = %(run_id)s
"""


class Glimpse(NamedTuple):
    """The oldest event of a type that nobody has taken, if there is one.

    ``wake`` is the run's counter in the same snapshot: an event that comes
    after this look raises it.
    """

    wake: int
    id: str | None
    payload: str | None


def peek(conn: Connection, run_id: str, event_type: str) -> Glimpse:
    """Look at the next event of a type without taking it."""
    row = conn.execute(_NEXT, {"run_id": run_id, "type": event_type}).fetchone()
    return Glimpse(-1, None, None) if row is None else Glimpse(*row)


# Fenced, as every write of a claim: a zombie, with code of an older release
# perhaps, refuses nothing.
_REFUSE = f"""
WITH run AS MATERIALIZED (
    {HELD_RUN}
), refused AS (
    UPDATE durable.workflow_events e
       SET consumed_at = now(), consumed_branch = %(branch)s, consumed_ordinal = %(ordinal)s,
           error = %(error)s
      FROM run WHERE e.workflow_run_id = run.id AND e.id = %(id)s AND e.consumed_at IS NULL
)
SELECT id::text FROM run
"""


def refuse(conn: Connection, place: Place, event_id: str, error: str) -> bool:
    """Put an event aside whose payload does not fit the schema of the wait at ``place``.

    False: the run is another claim's by now.
    """
    params = {**place._asdict(), "id": event_id, "error": error}
    return conn.execute(_REFUSE, params).fetchone() is not None
