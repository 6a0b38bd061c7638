"""Setting parts of a run's history aside: for a restart, and for a retry of the body.

What is set aside counts no more and is not destroyed: it stays under the
number of the generation that discarded it. Consumed events become available
again, and the outcomes of tasks that are started anew go with their start.
"""

from __future__ import annotations

# From a place on, everything: the body may take another way this time. In
# other branches, which may have run at the same time, that is what began later.
_ONWARD = """, begin AS (
    SELECT c.id, c.generation, s.branch, s.ordinal, s.created_at
      FROM {runs} c CROSS JOIN LATERAL (
          SELECT branch, ordinal, created_at FROM durable.step_attempts s
           WHERE s.workflow_run_id = c.id AND s.set_aside = 0 AND s.kind <> 'result'
             AND {place}
           ORDER BY s.created_at, s.ordinal LIMIT 1) s
), discarded AS (
    SELECT s.workflow_run_id, b.generation, s.branch, s.ordinal, s.step_name, s.attempt, s.kind,
           s.output
      FROM durable.step_attempts s JOIN begin b ON s.workflow_run_id = b.id
     WHERE s.set_aside = 0 AND s.kind <> 'result'
       AND CASE WHEN s.branch = b.branch THEN s.ordinal >= b.ordinal
                ELSE s.created_at >= b.created_at END
)"""

# Only what failed and was the end of it: the last place of its branch. A
# failure with something recorded after it is one that the body has lived with;
# undone, the body would come to another step than the next one recorded. So it
# is with a started task that failed: it is started anew if nothing was recorded
# in the branch since its outcome came. A step that runs at most once runs again
# only for a person who names it. Once a run is being undone, its body goes no
# further: what counts then is what failed to undo.
_FAILED = """, discarded AS (
    SELECT s.workflow_run_id, c.generation, s.branch, s.ordinal, s.step_name, s.attempt, s.kind,
           s.output
      FROM durable.step_attempts s JOIN {runs} c ON s.workflow_run_id = c.id
     WHERE s.set_aside = 0 AND s.kind <> 'result' AND NOT s.config ? 'at_most_once'
       AND (s.branch = 'undo' OR NOT EXISTS (
            SELECT FROM durable.step_attempts u
             WHERE u.workflow_run_id = s.workflow_run_id AND u.branch = 'undo'
               AND u.set_aside = 0))
       AND (NOT EXISTS (SELECT FROM durable.step_attempts o
                         WHERE o.workflow_run_id = s.workflow_run_id AND o.branch = s.branch
                           AND o.set_aside = 0 AND o.kind <> 'result'
                           AND (o.ordinal > s.ordinal
                                OR (o.ordinal = s.ordinal AND o.status = 'succeeded')))
            OR (s.kind = 'dispatch' AND EXISTS (
                SELECT FROM durable.step_attempts r
                 WHERE r.workflow_run_id = s.workflow_run_id AND r.kind = 'result'
                   AND r.set_aside = 0 AND r.status = 'failed'
                   AND s.output::jsonb -> 'ids' ? r.branch
                   AND NOT EXISTS (
                       SELECT FROM durable.step_attempts o
                        WHERE o.workflow_run_id = s.workflow_run_id AND o.branch = s.branch
                          AND o.set_aside = 0 AND o.kind <> 'result'
                          AND o.created_at > r.completed_at))))
)"""

_ASIDE = """, aside AS (
    UPDATE durable.step_attempts s SET set_aside = d.generation
      FROM discarded d
     WHERE s.workflow_run_id = d.workflow_run_id AND s.set_aside = 0
       AND CASE WHEN s.kind = 'result'
                THEN d.kind = 'dispatch' AND d.output::jsonb -> 'ids' ? s.branch
                ELSE d.branch = s.branch AND d.ordinal = s.ordinal
                     AND d.step_name = s.step_name AND d.attempt = s.attempt END
), taken_back AS (
    UPDATE durable.workflow_events e
       SET consumed_at = NULL, consumed_branch = NULL, consumed_ordinal = NULL
      FROM discarded d
     WHERE d.kind = 'event' AND e.workflow_run_id = d.workflow_run_id
       AND e.consumed_branch = d.branch AND e.consumed_ordinal = d.ordinal AND e.error IS NULL
)"""

#: Where a restart can begin, as conditions on the step ``s``.
BEGINNING = "true"
AT_STEP = """s.step_name = %(step)s AND (%(ordinal)s::int IS NULL OR s.ordinal = %(ordinal)s)
             AND s.branch = coalesce(%(branch)s, s.branch)"""


def everything_from(place: str, runs: str) -> str:
    """Make the part of a statement that sets aside all from a place on.

    Args:
        place: `BEGINNING` or `AT_STEP`.
        runs: name of the CTE that gives ``id`` and the new ``generation``.
    """
    return _ONWARD.format(runs=runs, place=place) + _ASIDE


def what_failed(runs: str) -> str:
    """Make the part of a statement that sets aside what failed, and nothing else.

    Args:
        runs: name of the CTE that gives ``id`` and the new ``generation``.
    """
    return _FAILED.format(runs=runs) + _ASIDE
