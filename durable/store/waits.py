"""Queries of what a run waits for: a due time, an event, the outcome of a task.

A wait is a row of ``step_attempts`` that stays ``running`` until it is over.
Each function opens it or, called again, looks whether it is over now. The run
then parks, which is a statement of its own: whatever ends a wait raises
``wake``, and so the park notices what came in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from durable.store.connections import Connection


class Place(NamedTuple):
    """Where in a run, and by which claim of it, something is asked for."""

    run_id: str
    fence: int
    branch: str
    ordinal: int
    name: str


@dataclass(frozen=True, slots=True)
class Wait:
    """How a wait stands.

    Attributes:
        status: ``running`` while it goes on, ``succeeded``, or ``failed``.
        output: JSON text of what it brought.
        error: JSON text of a failure.
        context: JSON text with ``outcome`` and ``reason`` of a task.
        due_in: seconds until it is over anyway; None: no such time.
    """

    status: str
    output: str | None = None
    error: str | None = None
    context: str | None = None
    due_in: float | None = None

    @property
    def over(self) -> bool:
        """Whether there is something to go on with."""
        return self.status != "running"


_KEY = "(workflow_run_id, ordinal, attempt, set_aside, branch, step_name)"

# The due time is fixed by the first insert, by the database's clock. FOR SHARE
# as in every write of a claim: a zombie gets no row.
_SLEEP = f"""
INSERT INTO durable.step_attempts AS s
       (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, due_at, completed_at)
SELECT run.id, %(branch)s, %(ordinal)s, %(name)s, 1, 'sleep',
       CASE WHEN due > now() THEN 'running' ELSE 'succeeded' END,
       due, CASE WHEN due > now() THEN NULL ELSE now() END
  FROM (SELECT id FROM durable.workflow_runs
         WHERE id = %(run_id)s AND attempt = %(fence)s AND status = 'running'
           FOR SHARE) run,
       coalesce(%(until)s::timestamptz, now() + make_interval(secs => %(seconds)s::float8)) due
ON CONFLICT {_KEY} DO UPDATE
   SET status = CASE WHEN s.due_at <= now() THEN 'succeeded' ELSE s.status END,
       completed_at = CASE WHEN s.due_at <= now() THEN coalesce(s.completed_at, now()) END
RETURNING status, NULL, NULL, NULL, extract(epoch FROM due_at - now())::float8
"""


def sleep(
    conn: Connection, place: Place, seconds: float | None, until: datetime | None = None
) -> Wait | None:
    """Begin a sleep of so many seconds or until a time, or see how long it still takes.

    None: the run is another claim's by now.
    """
    return _wait(conn, _SLEEP, {**place._asdict(), "seconds": seconds, "until": until})


# The oldest event that nobody has taken ends the wait, also one that came
# after the due time: a timeout counts once it is recorded. A repeat after a
# lost answer finds the wait over, and must not take a second event: hence the
# NOT EXISTS. `given` names the event that a schema has found good; the run
# looks at the payload first, and only then takes it.
_EVENT = f"""
WITH run AS MATERIALIZED (
    SELECT id FROM durable.workflow_runs
     WHERE id = %(run_id)s AND attempt = %(fence)s AND status = 'running'
       FOR SHARE
), event AS MATERIALIZED (
    SELECT e.id, e.payload
      FROM durable.workflow_events e JOIN run ON e.workflow_run_id = run.id
     WHERE e.event_type = %(name)s AND e.consumed_at IS NULL
       AND (NOT %(checked)s OR e.id = %(given)s::uuid)
       AND NOT EXISTS (SELECT FROM durable.step_attempts s
                        WHERE s.workflow_run_id = run.id AND s.ordinal = %(ordinal)s
                          AND s.branch = %(branch)s AND s.step_name = %(name)s
                          AND s.set_aside = 0 AND s.status <> 'running')
     ORDER BY e.seq LIMIT 1 FOR UPDATE OF e
), consumed AS (
    UPDATE durable.workflow_events e
       SET consumed_at = now(), consumed_branch = %(branch)s, consumed_ordinal = %(ordinal)s
      FROM event WHERE e.id = event.id
)
INSERT INTO durable.step_attempts AS s
       (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output, context,
        due_at, completed_at)
SELECT run.id, %(branch)s, %(ordinal)s, %(name)s, 1, 'event',
       CASE WHEN event.id IS NOT NULL THEN 'succeeded'
            WHEN %(timeout)s::float8 <= 0 THEN 'failed' ELSE 'running' END,
       event.payload, jsonb_build_object('event', event.id),
       now() + make_interval(secs => %(timeout)s::float8),
       CASE WHEN event.id IS NOT NULL OR %(timeout)s::float8 <= 0 THEN now() END
  FROM run LEFT JOIN event ON true
ON CONFLICT {_KEY} DO UPDATE
   SET status = CASE WHEN s.status <> 'running' THEN s.status
                     WHEN excluded.output IS NOT NULL THEN 'succeeded'
                     WHEN s.due_at <= now() THEN 'failed' ELSE 'running' END,
       completed_at = CASE WHEN s.status <> 'running' THEN s.completed_at
                           WHEN excluded.output IS NOT NULL OR s.due_at <= now() THEN now() END,
       output = coalesce(s.output, excluded.output),
       context = CASE WHEN s.output IS NULL THEN excluded.context ELSE s.context END
RETURNING status, output::text, NULL, NULL, extract(epoch FROM due_at - now())::float8
"""


def event(
    conn: Connection,
    place: Place,
    timeout: float | None,
    *,
    checked: bool = False,
    given: str | None = None,
) -> Wait | None:
    """Take an event of the type that `place` names, or wait for one, or give up.

    With ``checked`` only the event ``given`` is taken. None: the run is
    another claim's by now.
    """
    params = {**place._asdict(), "timeout": timeout, "checked": checked, "given": given}
    return _wait(conn, _EVENT, params)


# No fence and no lock on the run: a zombie may say that it waits, it costs a
# wake-up. A lock would be taken in the other order than by a task that ends.
_RESULT = f"""
INSERT INTO durable.step_attempts AS s
       (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, config)
SELECT id, %(task)s, 0, 'result', 1, 'result', 'running', '{{"awaited": true}}'
  FROM durable.workflow_runs
 WHERE id = %(run_id)s AND attempt = %(fence)s AND status = 'running'
ON CONFLICT {_KEY} DO UPDATE SET config = excluded.config
RETURNING status, output::text, error::text, context::text, NULL
"""


def result(conn: Connection, run_id: str, fence: int, task: str) -> Wait | None:
    """Look for the outcome of a task that the run started, or ask to be woken by it.

    None: the run is another claim's by now.
    """
    return _wait(conn, _RESULT, {"run_id": run_id, "fence": fence, "task": task})


# The wait for a result with a timeout has a place of its own, so that it ends
# in the same way on every replay. It is over, well or not, once.
_TIMER = f"""
INSERT INTO durable.step_attempts AS s
       (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, due_at, completed_at)
SELECT id, %(branch)s, %(ordinal)s, %(name)s, 1, 'timer',
       CASE WHEN %(met)s THEN 'succeeded' WHEN %(seconds)s::float8 <= 0 THEN 'failed'
            ELSE 'running' END,
       now() + make_interval(secs => %(seconds)s::float8),
       CASE WHEN %(met)s OR %(seconds)s::float8 <= 0 THEN now() END
  FROM durable.workflow_runs
 WHERE id = %(run_id)s AND attempt = %(fence)s AND status = 'running'
   FOR SHARE
ON CONFLICT {_KEY} DO UPDATE
   SET status = CASE WHEN s.status <> 'running' THEN s.status WHEN %(met)s THEN 'succeeded'
                     WHEN s.due_at <= now() THEN 'failed' ELSE 'running' END,
       completed_at = CASE WHEN s.status <> 'running' THEN s.completed_at
                           WHEN %(met)s OR s.due_at <= now() THEN now() END
RETURNING status, NULL, NULL, NULL, extract(epoch FROM due_at - now())::float8
"""


def timer(conn: Connection, place: Place, seconds: float, *, met: bool) -> Wait | None:
    """Begin, look at, or (``met``) end well the time that a wait may take.

    None: the run is another claim's by now.
    """
    return _wait(conn, _TIMER, {**place._asdict(), "seconds": seconds, "met": met})


def _wait(conn: Connection, statement: str, params: dict[str, Any]) -> Wait | None:
    row = conn.execute(statement, params).fetchone()
    return None if row is None else Wait(*row)
