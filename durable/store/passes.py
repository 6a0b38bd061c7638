"""The statement behind `durable.continue_as_new`."""

from __future__ import annotations

from durable.store.connections import Connection

# One pass ends and the next one is there, in one commit: a crash before it
# leaves the old pass with its whole history, one after it the new pass, due
# now. Fenced like every write of a claim, so a zombie begins nothing.
#   The history is deleted, not set aside: an endless run is not to grow. So are
# the events that it has consumed; those with a key stay, since a repeat has to
# be known for one, but belong to no place any more. What has not been consumed
# is the next pass's.
#   A fan-out's counter is deleted once it is at rest. One that still counts is
# locked by the ends of its items, which go on to lock this run; it is left
# alone.
#   A cancel that was asked for meanwhile is obeyed by the next claim, a pause now.
_BEGIN_ANEW = """
WITH anew AS (
    UPDATE durable.workflow_runs
       SET status = CASE WHEN control = 'pause' THEN 'paused' ELSE 'pending' END,
           available_at = CASE WHEN control = 'pause' THEN coalesce(deadline_at, 'infinity')
                               ELSE now() END,
           reason = CASE WHEN control IS NULL THEN 'continue-as-new' ELSE reason END,
           control = CASE WHEN control = 'cancel' THEN control END,
           input = %(input)s, version = %(version)s,
           generation = generation + 1, passes = passes + 1,
           retries = 0, recoveries = 0, child_pid = NULL, rung = false
     WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'running'
    RETURNING id, namespace_id
), steps AS (
    DELETE FROM durable.step_attempts s USING anew WHERE s.workflow_run_id = anew.id
), events AS (
    DELETE FROM durable.workflow_events e USING anew
     WHERE e.workflow_run_id = anew.id AND e.consumed_at IS NOT NULL AND e.idempotency_key IS NULL
), keyed_events AS (
    UPDATE durable.workflow_events e SET consumed_branch = NULL, consumed_ordinal = NULL
      FROM anew
     WHERE e.workflow_run_id = anew.id AND e.consumed_at IS NOT NULL
       AND e.idempotency_key IS NOT NULL AND e.consumed_ordinal IS NOT NULL
), counters AS (
    DELETE FROM durable.fan_outs f USING anew
     WHERE f.workflow_run_id = anew.id
       AND f.id IN (SELECT w.id FROM durable.fan_outs w
                     WHERE w.workflow_run_id = anew.id AND w.shard = -1 AND w.remaining = 0)
)
SELECT pg_notify('durable', namespace_id) FROM anew
"""

_BEGUN = """
SELECT attempt, generation, status FROM durable.workflow_runs WHERE id = %(id)s
"""


def begin_anew(
    conn: Connection,
    run_id: str,
    attempt: int,
    generation: int,
    *,
    given: str,
    version: str | None,
) -> bool:
    """End the pass of this attempt and ``generation``; begin the next one without history.

    ``given`` is JSON text of its arguments, ``version`` that of the code that
    ends this pass and is to execute the next. False: the run is no longer this
    attempt's, nothing was stored.
    """
    params = {"id": run_id, "attempt": attempt, "input": given, "version": version}
    if conn.execute(_BEGIN_ANEW, params).rowcount == 1:
        return True
    # A repeat after a lost answer finds the next pass there, not yet claimed.
    row = conn.execute(_BEGUN, params).fetchone()
    return row is not None and row[:2] == (attempt, generation + 1)
