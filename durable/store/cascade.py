"""Cancels the tied children of canceled runs, and theirs."""

from __future__ import annotations

from collections.abc import Sequence

from durable.store.canceling import CANCEL
from durable.store.connections import Connection

# Tied, and not yet canceled or asked to stop.
_TO_CANCEL = """child.on_parent_cancel = 'cancel'
           AND child.status NOT IN ('succeeded', 'failed', 'canceled')
           AND ((child.status <> 'running' AND NOT child.compensates)
                OR child.control IS DISTINCT FROM 'cancel')"""

# The end of the parent has put `cascades` on it, in the same commit (see
# durable.on_cancel), and this comes in a commit of its own, repeated until
# the mark is gone. In one commit with the parent's end it would lock parent,
# then child, while a child that ends locks itself, then its parent.
# SKIP LOCKED for the same reason: nothing is waited for while other children
# are locked. Who was passed over is being claimed, parked or ended; the mark
# stays for it. A child with a Celery continuation is rung, as in a cancel.
_CASCADE = f"""
UPDATE durable.workflow_runs r
   SET {CANCEL},
       reason = 'its parent was canceled', held = false
  FROM (SELECT child.id
          FROM durable.workflow_runs child
          JOIN durable.workflow_runs parent ON parent.id = child.parent_run_id
         WHERE child.parent_run_id = ANY(%(ids)s::uuid[]) AND parent.status = 'canceled'
           AND {_TO_CANCEL}
           FOR UPDATE OF child SKIP LOCKED) tied
 WHERE r.id = tied.id
RETURNING r.id::text, CASE WHEN r.tail OR r.compensates THEN pg_notify('durable', r.namespace_id) END
"""

# Its snapshot is of after the commit above. No child can have come since: it
# would have found its parent canceled.
_DONE = f"""
UPDATE durable.workflow_runs r SET cascades = false
 WHERE r.id = ANY(%(ids)s::uuid[]) AND r.cascades
   AND NOT (r.status = 'canceled' AND EXISTS (
       SELECT FROM durable.workflow_runs child
        WHERE child.parent_run_id = r.id
          AND {_TO_CANCEL}))
"""


_MARKED = """
SELECT id::text FROM durable.workflow_runs WHERE id = ANY(%(ids)s::uuid[]) AND cascades
"""


def follow(conn: Connection, run_ids: Sequence[str]) -> None:
    """Cancel the tied children of those among these runs that have just been canceled.

    For whoever cancels, since it is to work without a worker. Should he die
    before, or a child be locked just now, a dispatcher goes on.
    """
    if run_ids:
        marked = [row[0] for row in conn.execute(_MARKED, {"ids": list(run_ids)}).fetchall()]
        cascade(conn, marked)


def cascade(conn: Connection, run_ids: Sequence[str]) -> int:
    """Cancel the tied children of these canceled runs, down the tree; how many were canceled.

    One that runs is asked to stop; its own children follow when it has.
    """
    count, parents = 0, list(run_ids)
    while parents:
        params = {"ids": parents}
        children = [row[0] for row in conn.execute(_CASCADE, params).fetchall()]
        conn.execute(_DONE, params)
        count += len(children)
        parents = children
    return count
