"""Queries of an erasure: find the runs, lock them, empty them, and what others have of them.

All in one transaction of the caller's. Rows are locked in the order of their
ids, as by every action on many runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg.rows import class_row

from durable.store.connections import Connection


@dataclass(frozen=True, slots=True)
class Found:
    """A run that is to be erased.

    Attributes:
        ended: whether it has.
        owed: whether Celery has still to deliver its result, callbacks or chain.
        erased: whether it was erased before.
    """

    id: str
    name: str
    status: str
    ended: bool
    owed: bool
    erased: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """A row in the history of a run that stays, with the outcome of one that goes.

    JSON as text.

    Attributes:
        run: that goes.
        parent: that stays.
        parent_status: of the one that stays.
        parent_ended: whether it has.
    """

    run: str
    index: int | None
    parent: str
    parent_status: str
    parent_ended: bool
    branch: str
    ordinal: int
    name: str
    attempt: int
    set_aside: int
    kind: str
    status: str
    output: str | None
    error: str | None
    context: str | None


_TREE = """
WITH RECURSIVE tree AS (
    SELECT id FROM durable.workflow_runs
     WHERE namespace_id = %(namespace)s
       AND (id = %(run_id)s::uuid OR subject = %(subject)s)
    UNION
    SELECT child.id FROM durable.workflow_runs child JOIN tree ON child.parent_run_id = tree.id
)
"""

_FIND = (
    _TREE
    + """
SELECT r.id::text AS id, r.workflow_name AS name, r.status, r.completed_at IS NOT NULL AS ended,
       r.completed_at IS NOT NULL AND r.available_at < 'infinity' AS owed,
       r.erased_at IS NOT NULL AS erased
  FROM durable.workflow_runs r JOIN tree USING (id)
 ORDER BY r.id
"""
)


def find(conn: Connection, namespace: str, run_id: str | None, subject: str | None) -> list[Found]:
    """Find a run, or those of a subject, with all their children."""
    params = {"namespace": namespace, "run_id": run_id, "subject": subject}
    with conn.cursor(row_factory=class_row(Found)) as cursor:
        return cursor.execute(_FIND, params).fetchall()


# The tree is the snapshot's, the rows are as they were locked: a parent that
# still ran in the snapshot may have started a child and ended since. So the
# caller asks again until no row is new; a run that has ended starts no more.
_LOCK = _FIND + " FOR UPDATE OF r"


def lock(conn: Connection, namespace: str, run_id: str | None, subject: str | None) -> list[Found]:
    """Find the runs and lock them, as they are then."""
    params = {"namespace": namespace, "run_id": run_id, "subject": subject}
    with conn.cursor(row_factory=class_row(Found)) as cursor:
        found: list[Found] = []
        while True:
            again = cursor.execute(_LOCK, params).fetchall()
            if len(again) == len(found):
                return again
            found = again


# A parent that is locked here cannot be restarted until this is committed.
_COPIES = """
SELECT r.id::text AS run, r.fan_index AS index, p.id::text AS parent,
       p.status AS parent_status, p.completed_at IS NOT NULL AS parent_ended,
       s.branch, s.ordinal, s.step_name AS name, s.attempt, s.set_aside, s.kind, s.status,
       s.output, s.error, s.context::text AS context
  FROM durable.workflow_runs r
  JOIN durable.workflow_runs p ON p.id = r.parent_run_id
  JOIN durable.step_attempts s
    ON s.workflow_run_id = p.id
   AND (   (s.kind = 'result' AND s.branch = r.id::text)
        OR (s.kind = 'fan_out' AND s.context ->> 'fan_out' = r.fan_out_id::text))
 WHERE r.id = ANY(%(ids)s::uuid[]) AND NOT p.id = ANY(%(ids)s::uuid[])
 ORDER BY p.id, r.fan_index FOR UPDATE OF p
"""


def copies(conn: Connection, ids: Sequence[str]) -> list[Copy]:
    """Find what the parents that stay have of these runs; lock the parents."""
    with conn.cursor(row_factory=class_row(Copy)) as cursor:
        return cursor.execute(_COPIES, {"ids": list(ids)}).fetchall()


_REPLACE = """
UPDATE durable.step_attempts
   SET status = %(status)s, output = %(output)s, error = %(error)s, context = %(context)s
 WHERE workflow_run_id = %(parent)s AND ordinal = %(ordinal)s AND attempt = %(attempt)s
   AND set_aside = %(set_aside)s AND branch = %(branch)s AND step_name = %(name)s
"""


def replace(conn: Connection, copy: Copy) -> None:
    """Store what is left of a copy."""
    conn.execute(_REPLACE, {name: getattr(copy, name) for name in Copy.__slots__})


# What is left of a run: ids, names, statuses, times. It is never rung again,
# so its message goes too, and with it what Celery may not have delivered.
_ERASE = (
    """
UPDATE durable.workflow_runs
   SET input = NULL, output = NULL, error = NULL, progress = NULL, context = NULL,
       message = '{}', reason = NULL, subject = NULL, tail = false, rung = false,
       available_at = 'infinity', erased_at = now()
 WHERE id = ANY(%(ids)s::uuid[])
""",
    """
UPDATE durable.step_attempts SET output = NULL, error = NULL, context = NULL
 WHERE workflow_run_id = ANY(%(ids)s::uuid[])
""",
    """
UPDATE durable.workflow_events SET payload = 'null', error = NULL, idempotency_key = NULL
 WHERE workflow_run_id = ANY(%(ids)s::uuid[])
""",
    # A hash of few possible inputs tells which it was. The key itself stays taken; if
    # another run takes it meanwhile, the row is that one's and no longer matches.
    """
UPDATE durable.idempotency_keys SET input_hash = NULL
 WHERE workflow_run_id = ANY(%(ids)s::uuid[])
""",
    """
INSERT INTO durable.run_actions
       (order_id, workflow_run_id, action, actor, reason, before, after)
SELECT %(order)s, id, 'erase', %(actor)s, %(reason)s, status, status
  FROM durable.workflow_runs WHERE id = ANY(%(ids)s::uuid[])
""",
)


def erase(
    conn: Connection, ids: Sequence[str], *, order: str, actor: str, reason: str | None
) -> None:
    """Empty these runs, and note who did it."""
    params = {"ids": list(ids), "order": order, "actor": actor, "reason": reason}
    for statement in _ERASE:
        conn.execute(statement, params)


_ORDERED = "SELECT workflow_run_id::text FROM durable.run_actions WHERE order_id = %(order)s"


def ordered(conn: Connection, order: str) -> list[str]:
    """Tell what an erasure has done whose answer was lost."""
    return [row[0] for row in conn.execute(_ORDERED, {"order": order}).fetchall()]
