"""Statements of `durable.compensate`: that a run has something to undo, and that it does."""

from __future__ import annotations

from durable.store.connections import Connection

#: Line of the undo steps, and the first row in it, which says what the run ends as.
BRANCH = "undo"
NAME = "undo"

# Fenced like every write of a claim. A cancel that locks the row first finds
# the run running and asks its worker, which is whoever calls this.
_MARK = """
UPDATE durable.workflow_runs SET compensates = true
 WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'running'
"""


def mark(conn: Connection, run_id: str, attempt: int) -> bool:
    """Have a cancel of this run go to a worker. False: it is another claim's by now."""
    return conn.execute(_MARK, {"id": run_id, "attempt": attempt}).rowcount == 1


# From this commit on the body goes no further, whatever it does on replay, and
# the end of the run is decided: a later cancel, a pause or a crash do not change
# it. So the cancel that led to it is done with; a pause still counts. The first
# decision stands, also against a repeat after a lost answer.
_DECIDE = """
WITH run AS (
    UPDATE durable.workflow_runs
       SET control = CASE WHEN control = 'pause' THEN control END
     WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'running'
    RETURNING id, reason
), decided AS (
    INSERT INTO durable.step_attempts
           (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output, error,
            completed_at)
    SELECT id, 'undo', 0, 'undo', 1, 'undo', 'succeeded',
           json_build_object('status', %(status)s::text, 'reason',
               CASE WHEN %(status)s = 'canceled' THEN reason ELSE %(reason)s::text END),
           %(error)s::json, now()
      FROM run
    ON CONFLICT DO NOTHING
)
SELECT CASE WHEN %(status)s = 'canceled' THEN reason ELSE %(reason)s::text END FROM run
"""


def decide(
    conn: Connection,
    run_id: str,
    attempt: int,
    status: str,
    *,
    error: str | None = None,
    reason: str | None = None,
) -> tuple[str | None] | None:
    """Record that the run is to be undone and then ends so; its reason.

    None: it is another claim's by now.
    """
    params = {
        "id": run_id,
        "attempt": attempt,
        "status": status,
        "error": error,
        "reason": reason,
    }
    found: tuple[str | None] | None = conn.execute(_DECIDE, params).fetchone()
    return found
