"""Queries of what a run waits for: a due time, an event, the outcome of a task.

A wait is a row of ``step_attempts`` that stays ``running`` until it is over.
Each function opens it or, called again, looks whether it is over now. The run
then parks, which is a statement of its own: whatever ends a wait raises
``wake``, and so the park notices what came in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from durable.store.connections import Connection

if TYPE_CHECKING:
    from durable.codec import Codec

#: Status of a `Wait` that was neither begun nor looked at, as something came in between.
LOOK_AGAIN = "look again"


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


#: Key of ``step_attempts``, for ON CONFLICT.
KEY = "(workflow_run_id, ordinal, attempt, set_aside, branch, step_name)"

#: A run, while it is the claim's that writes. FOR SHARE: a claim that takes it
#: over waits for the commit, and then sees what was written.
HELD_RUN = """SELECT id, namespace_id, wake, control FROM durable.workflow_runs
     WHERE id = %(run_id)s AND attempt = %(fence)s AND status = 'running'
       FOR SHARE"""

# The due time is fixed by the first insert, by the database's clock. FOR SHARE
# as in every write of a claim: a zombie gets no row.
_SLEEP = f"""
INSERT INTO durable.step_attempts AS s
       (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, due_at, completed_at)
SELECT run.id, %(branch)s, %(ordinal)s, %(name)s, 1, 'sleep',
       CASE WHEN due > now() THEN 'running' ELSE 'succeeded' END,
       due, CASE WHEN due > now() THEN NULL ELSE now() END
  FROM ({HELD_RUN}) run,
       coalesce(%(until)s::timestamptz, now() + make_interval(secs => %(seconds)s::float8)) due
ON CONFLICT {KEY} DO UPDATE
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
#   An event that is committed while this waits for the run's lock is not in
# this statement's snapshot: a timeout would be recorded although the event was
# accepted before. But it has raised `wake`, and the row comes back as it was
# locked: if that is not what the snapshot (or the look at the payload, `seen`)
# had, nothing is written, and the caller looks again.
_EVENT = f"""
WITH run AS MATERIALIZED (
    {HELD_RUN}
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
), step AS (
    INSERT INTO durable.step_attempts AS s
           (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output, context,
            due_at, completed_at)
    SELECT run.id, %(branch)s, %(ordinal)s, %(name)s, 1, 'event',
           CASE WHEN event.id IS NOT NULL THEN 'succeeded'
                WHEN %(timeout)s::float8 <= 0 THEN 'failed' ELSE 'running' END,
           CASE WHEN event.id IS NOT NULL THEN coalesce(%(value)s::json, event.payload) END,
           jsonb_build_object('event', event.id),
           now() + make_interval(secs => %(timeout)s::float8),
           CASE WHEN event.id IS NOT NULL OR %(timeout)s::float8 <= 0 THEN now() END
      FROM run LEFT JOIN event ON true
     WHERE event.id IS NOT NULL
        OR run.wake = coalesce(%(seen)s::int, (SELECT wake FROM durable.workflow_runs
                                                WHERE id = %(run_id)s))
    ON CONFLICT {KEY} DO UPDATE
       SET status = CASE WHEN s.status <> 'running' THEN s.status
                         WHEN excluded.output IS NOT NULL THEN 'succeeded'
                         WHEN s.due_at <= now() THEN 'failed' ELSE 'running' END,
           completed_at = CASE WHEN s.status <> 'running' THEN s.completed_at
                               WHEN excluded.output IS NOT NULL OR s.due_at <= now() THEN now()
                          END,
           output = coalesce(s.output, excluded.output),
           context = CASE WHEN s.output IS NULL THEN excluded.context ELSE s.context END
    RETURNING status, output, due_at
)
SELECT coalesce(status, '{LOOK_AGAIN}'), output::text, NULL, NULL,
       extract(epoch FROM due_at - now())::float8
  FROM run LEFT JOIN step ON true
"""


def event(
    conn: Connection,
    place: Place,
    timeout: float | None,
    *,
    checked: bool = False,
    given: str | None = None,
    value: str | None = None,
    seen: int | None = None,
) -> Wait | None:
    """Take an event of the type that `place` names, or wait for one, or give up.

    None: the run is another claim's by now.

    Args:
        conn: where.
        place: of the wait.
        timeout: seconds; None: never.
        checked: whether the caller has looked (`events.peek`); only ``given`` is taken then.
        given: id of the event to take.
        value: JSON text of what the schema made of it.
        seen: the run's ``wake`` at that look. If it was raised since, the
            answer is `LOOK_AGAIN`.
    """
    params = {
        **place._asdict(),
        "timeout": timeout,
        "checked": checked,
        "given": given,
        "value": value,
        "seen": seen,
    }
    while True:
        wait = _wait(conn, _EVENT, params)
        if checked or wait is None or wait.status != LOOK_AGAIN:
            return wait


# No fence and no lock on the run: a zombie may say that it waits, it costs a
# wake-up. A lock would be taken in the other order than by a task that ends.
_RESULT = f"""
INSERT INTO durable.step_attempts AS s
       (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, config)
SELECT id, %(task)s, 0, 'result', 1, 'result', 'running', '{{"awaited": true}}'
  FROM durable.workflow_runs
 WHERE id = %(run_id)s AND attempt = %(fence)s AND status = 'running'
ON CONFLICT {KEY} DO UPDATE SET config = excluded.config
RETURNING status, output::text, error::text, context::text, NULL
"""

# A task that comes after one that has failed never starts, so nobody will tell
# how it ended: its outcome is the other's failure. Recorded, so that each
# replay sees the same; if its own comes at that moment after all, the row's
# lock has one of them see that it is too late. A failure that is not visible
# here yet wakes the run, as each does: so the park that follows fails.
_NEVER = """
UPDATE durable.step_attempts own
   SET status = 'failed', error = earlier.error, completed_at = now(),
       context = earlier.context || jsonb_build_object('by', earlier.branch)
  FROM (SELECT branch, error, context FROM durable.step_attempts
         WHERE workflow_run_id = %(run_id)s AND branch = ANY(%(before)s) AND kind = 'result'
           AND set_aside = 0 AND status = 'failed'
         ORDER BY completed_at, branch LIMIT 1) earlier
 WHERE own.workflow_run_id = %(run_id)s AND own.branch = %(task)s AND own.kind = 'result'
   AND own.set_aside = 0 AND own.status = 'running'
RETURNING own.status, own.output::text, own.error::text, own.context::text, NULL
"""


def result(
    conn: Connection, run_id: str, fence: int, task: str, before: Sequence[str] = ()
) -> Wait | None:
    """Look for the outcome of a task that the run started, or ask to be woken by it.

    None: the run is another claim's by now.

    Args:
        conn: where.
        run_id: the run that waits.
        fence: its claim.
        task: id of the task.
        before: ids of tasks whose failure means that ``task`` is never started.
    """
    params = {"run_id": run_id, "fence": fence, "task": task}
    own = _wait(conn, _RESULT, params)
    if own is None or own.over or not before:
        return own
    never = _wait(conn, _NEVER, {**params, "before": list(before)})
    return own if never is None else never


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
ON CONFLICT {KEY} DO UPDATE
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


# The pause was drawn by the worker, and counts from the failure as Postgres
# saw it. Nothing is written: the next attempt is a row of its own.
_BACK_OFF = """
SELECT CASE WHEN due > now() THEN 'running' ELSE 'succeeded' END, NULL, NULL, NULL,
       extract(epoch FROM due - now())::float8
  FROM durable.workflow_runs run
  JOIN durable.step_attempts s ON s.workflow_run_id = run.id,
       LATERAL (SELECT s.completed_at
                       + make_interval(secs => (s.context ->> 'retry_in')::float8) AS due) pause
 WHERE run.id = %(run_id)s AND run.attempt = %(fence)s AND run.status = 'running'
   AND s.branch = %(branch)s AND s.ordinal = %(ordinal)s AND s.step_name = %(name)s
   AND s.attempt = %(attempt)s AND s.set_aside = 0
"""


def back_off(conn: Connection, place: Place, attempt: int) -> Wait | None:
    """See how long it takes until a step may be tried again whose ``attempt`` has failed.

    None: the run is another claim's by now.
    """
    return _wait(conn, _BACK_OFF, {**place._asdict(), "attempt": attempt})


_LOOK = """
SELECT wake, control FROM durable.workflow_runs
 WHERE id = %(run_id)s AND attempt = %(fence)s AND status = 'running'
"""


class Look(NamedTuple):
    """What may have changed in a run while it is being executed."""

    wake: int
    control: str | None


def look(conn: Connection, run_id: str, fence: int) -> Look | None:
    """See whether something was sent to a run: then ``wake`` has been raised.

    None: the run is another claim's by now.
    """
    row = conn.execute(_LOOK, {"run_id": run_id, "fence": fence}).fetchone()
    return None if row is None else Look(*row)


def decrypted(wait: Wait, codec: Codec) -> Wait:
    """Decrypt what a wait has brought.

    Raises:
        EncryptionError: the key is not known here.
    """
    output, error = wait.output and codec.open(wait.output), wait.error and codec.open(wait.error)
    if output is wait.output and error is wait.error:
        return wait
    return replace(wait, output=output, error=error)


def _wait(conn: Connection, statement: str, params: dict[str, Any]) -> Wait | None:
    row = conn.execute(statement, params).fetchone()
    return None if row is None else Wait(*row)
