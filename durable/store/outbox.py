"""The outbox: what is sent to runs in somebody's transaction, and its delivery after the commit.

A direct `events.send` updates the run's row. In a transaction of the caller's
that lock would last until its end, and the worker that advances the run would
wait for it. So the caller only inserts a row here, which locks nothing of
anybody's, and a dispatcher does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from durable.errors import RunEnded
from durable.store import control, runs
from durable.store.connections import Connection
from durable.store.control import Order
from durable.store.events import NewEvent
from durable.store.queries import missing

# The run is looked at, not locked: should it end before the commit, the event
# comes too late, as one that was sent a moment later.
_PUT = """
WITH run AS MATERIALIZED (
    SELECT id, namespace_id, status FROM durable.workflow_runs
     WHERE id = %(run_id)s::uuid AND namespace_id = %(namespace)s::text
), known AS MATERIALIZED (
    SELECT id FROM durable.workflow_events
     WHERE workflow_run_id = %(run_id)s::uuid AND idempotency_key = %(idempotency_key)s::text
     UNION ALL
    SELECT id FROM durable.outbox
     WHERE workflow_run_id = %(run_id)s::uuid AND idempotency_key = %(idempotency_key)s::text
     LIMIT 1
), put AS (
    INSERT INTO durable.outbox
           (id, namespace_id, workflow_run_id, kind, event_type, payload, idempotency_key)
    SELECT %(id)s::uuid, run.namespace_id, run.id, 'event', %(type)s::text, %(payload)s::json,
           %(idempotency_key)s::text
      FROM run
     WHERE run.status NOT IN ('succeeded', 'failed', 'canceled')
       AND NOT EXISTS (SELECT FROM known)
    ON CONFLICT (id) DO NOTHING
    RETURNING pg_notify('durable', namespace_id)
)
SELECT run.status, (SELECT id::text FROM known), (SELECT count(*) FROM put) FROM run
"""


def put_event(conn: Connection, event: NewEvent) -> str:
    """Send an event with the commit of the caller's transaction ``conn``; its id.

    Of events with one idempotency key that are under way in several
    transactions at once, the first that is delivered counts.

    Raises:
        RunEnded: the run has ended.
        RunNotFound: there is no such run in this namespace.
    """
    params = {field: getattr(event, field) for field in NewEvent.__slots__}
    row = conn.execute(_PUT, params).fetchone()
    if row is None:
        raise missing(conn, event.run_id, event.namespace)
    status, known, _ = row
    if known is not None:
        return str(known)
    if status in runs.ENDED:
        raise RunEnded(
            f"run {event.run_id} has ended ({status}): it takes no event {event.type!r} any more"
        )
    return event.id


@dataclass(frozen=True, slots=True)
class Sent:
    """A row of the outbox that is to be delivered."""

    id: str
    seq: int
    kind: str
    run_id: str
    reason: str | None
    actor: str


_PENDING = """
SELECT id::text, seq, kind, workflow_run_id::text, reason, actor FROM durable.outbox
 WHERE namespace_id = %(namespace)s AND seq > %(after)s
 ORDER BY seq LIMIT %(most)s
"""


def pending(conn: Connection, namespace: str, *, after: int = 0, most: int = 100) -> list[Sent]:
    """Look for what is to be delivered behind number ``after``, oldest first.

    From there, as those before it have been delivered, and their dead rows
    would be looked at again each time.
    """
    params = {"namespace": namespace, "after": after, "most": most}
    return [Sent(*row) for row in conn.execute(_PENDING, params).fetchall()]


# One row a transaction: of one that locked the rows of several runs, another
# that ends a child and wakes its parent would be in the way. Two dispatchers
# that look at the same rows go through them side by side: the second waits for
# the first at each, so what was sent to a run comes in order.
_DELIVER = "SELECT durable.deliver_event(%(id)s)"

_DELETE = "DELETE FROM durable.outbox WHERE id = %(id)s"


def deliver(conn: Connection, sent: Sent, namespace: str) -> None:
    """Do what was sent; nothing, if another dispatcher has done it meanwhile."""
    if sent.kind == "event":
        conn.execute(_DELIVER, {"id": sent.id})
        return
    order = Order(sent.id, [sent.run_id], namespace, sent.actor, sent.reason)
    control.cancel(conn, order)
    conn.execute(_DELETE, {"id": sent.id})


def deliver_next(conn: Connection, namespace: str) -> bool:
    """Deliver the oldest row of the outbox. False: there is none."""
    found = pending(conn, namespace, most=1)
    for sent in found:
        deliver(conn, sent, namespace)
    return bool(found)
