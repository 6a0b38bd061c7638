"""Rows of steps whose body is still running: of those that report, and those that run once.

An ordinary step is recorded when it has ended, and costs no more. One that
sends heartbeats, or may run only once, has a row with status ``running``
before that. An open row is no result: who finds one in the history knows that
the attempt was cut off.
"""

from __future__ import annotations

from durable.store.connections import Connection
from durable.store.steps import StepAttempt, Written
from durable.store.waits import HELD_RUN, KEY

# FOR SHARE as in every write of a claim: a zombie gets no row, and a claim that
# comes in between waits and then finds the row in the history. `control` comes
# out of the lock, so that it is the newest. A repeat after a lost answer finds
# the row; one that has ended meanwhile stays as it is.
#   What may run only once is not begun if the run is asked to stop: its row says
# that the body may have run. A cancel does not stop what undoes.
_OPEN = f"""
WITH run AS MATERIALIZED (
    {HELD_RUN}
), opened AS (
    INSERT INTO durable.step_attempts AS s
           (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output, config)
    SELECT id, %(branch)s, %(ordinal)s, %(name)s, %(attempt)s, %(kind)s, 'running',
           %(output)s::json,
           CASE WHEN %(once)s THEN '{{"at_most_once": true}}'::jsonb ELSE '{{}}' END
      FROM run WHERE control IS NULL OR NOT %(once)s
                  OR (control = 'cancel' AND %(branch)s = 'undo')
    ON CONFLICT {KEY} DO UPDATE SET output = coalesce(excluded.output, s.output)
     WHERE s.status = 'running'
)
SELECT control FROM run
"""


def open_step(conn: Connection, step: StepAttempt, *, once: bool) -> Written:
    """Say that a step's body is running, and store what it reports (``output``).

    ``once``: it is about to run, for the first and last time; it may not if
    the answer is `Written.CANCEL` or `Written.PAUSE`.
    """
    row = conn.execute(_OPEN, {**step._asdict(), "once": once}).fetchone()
    if row is None:
        return Written.FENCED
    return Written.RECORDED if row[0] is None else Written(row[0])
