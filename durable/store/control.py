"""What people do to runs: cancel, pause, resume, restart, settle a step. Audited.

Each action is one transaction over the runs that it names. Their rows are
locked first, in the order of their ids, so that two bulk actions cannot wait
for each other in a circle; one statement then judges them and acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg.rows import class_row

from durable.store.canceling import CANCEL
from durable.store.cascade import follow
from durable.store.connections import Connection
from durable.store.set_aside import AT_STEP, BEGINNING, everything_from, what_failed


@dataclass(frozen=True, slots=True)
class Order:
    """An action as it is asked for.

    Attributes:
        id: of this order, so that a repeat after a lost answer is no second one.
        run_ids: the runs to act on.
        actor: who asks.
        reason: why; for the audit, and shown with the run.
    """

    id: str
    run_ids: Sequence[str]
    namespace: str
    actor: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What an action did to one run.

    Attributes:
        before: status of the run when the action came.
        control: what its worker had been asked already: ``cancel``, ``pause`` or None.
        after: its status now; ``running`` also if its worker was asked.
        changed: whether the action did anything.
    """

    run_id: str
    before: str
    control: str | None
    after: str
    changed: bool


@dataclass(frozen=True, slots=True)
class ActionRow:
    """An action in the audit: who did what to a run, when and why."""

    action: str
    actor: str
    reason: str | None
    before: str
    after: str
    detail: str | None
    at: datetime


_FRAME = """
WITH target AS MATERIALIZED (
    SELECT id, status, control, namespace_id FROM durable.workflow_runs
     WHERE id = ANY(%(ids)s::uuid[]) AND namespace_id = %(namespace)s
), changed AS (
    UPDATE durable.workflow_runs r
       SET {changes}
      FROM target t
     WHERE r.id = t.id AND r.erased_at IS NULL AND ({allowed})
       AND NOT EXISTS (SELECT FROM durable.run_actions a
                        WHERE a.order_id = %(order)s AND a.workflow_run_id = r.id)
    RETURNING r.id, r.status, r.generation
){more}, audit AS (
    INSERT INTO durable.run_actions
           (order_id, workflow_run_id, action, actor, reason, before, control, after, detail)
    SELECT %(order)s, c.id, %(action)s, %(actor)s, %(reason)s, t.status, t.control, c.status,
           %(detail)s
      FROM changed c JOIN target t USING (id)
)
SELECT t.id::text, coalesce(done.before, t.status),
       CASE WHEN done.before IS NULL THEN t.control ELSE done.control END,
       coalesce(c.status, done.after, t.status), c.id IS NOT NULL OR done.before IS NOT NULL,
       CASE WHEN c.id IS NOT NULL THEN pg_notify('durable', t.namespace_id) END
  FROM target t LEFT JOIN changed c USING (id)
       LEFT JOIN durable.run_actions done
              ON done.order_id = %(order)s AND done.workflow_run_id = t.id
"""

# Taken first, by a statement of its own: what a worker committed while this
# waited is then in the snapshot of the one that follows, the run's steps too.
_LOCK = """
SELECT FROM durable.workflow_runs
 WHERE id = ANY(%(ids)s::uuid[]) AND namespace_id = %(namespace)s
 ORDER BY id FOR UPDATE
"""

_CANCEL = _FRAME.format(
    changes=f"{CANCEL}, reason = coalesce(%(reason)s::text, 'canceled')",
    allowed="""t.status NOT IN ('succeeded', 'failed', 'canceled')
            AND t.control IS DISTINCT FROM 'cancel'""",
    more="",
)

# A pause lasts until somebody resumes, or to the deadline. A delayed start
# keeps its time in `context`.
_PAUSE = _FRAME.format(
    changes="""
           control = CASE WHEN t.status = 'running' THEN 'pause' END,
           wake = wake + 1,
           status = CASE WHEN t.status = 'running' THEN 'running' ELSE 'paused' END,
           reason = coalesce(%(reason)s::text, 'paused by ' || %(actor)s::text),
           rung = rung AND t.status = 'running',
           context = CASE WHEN t.status = 'sleeping' AND started_at IS NULL
                          THEN coalesce(context, '{}')
                               || jsonb_build_object('starts_at', available_at)
                          ELSE context END,
           available_at = CASE WHEN t.status = 'running' THEN available_at
                               ELSE coalesce(deadline_at, 'infinity') END""",
    allowed="""(t.status IN ('pending', 'sleeping', 'waiting')
             AND t.control IS DISTINCT FROM 'cancel')
            OR (t.status = 'running' AND t.control IS NULL)""",
    more="",
)

# A resumed run replays and comes to its wait again, whose due time stands in
# the wait's own row. An item over the limit of a fan-out starts: the others
# may have ended meanwhile, and then nobody would release it. What was canceled, and
# stopped on the way to undo, goes on with that.
_RESUME = _FRAME.format(
    changes="""
           control = CASE WHEN t.status = 'paused' THEN t.control END,
           wake = wake + 1,
           status = CASE WHEN t.status = 'running' THEN 'running'
                         WHEN (context ->> 'starts_at')::timestamptz > now() THEN 'sleeping'
                         ELSE 'pending' END,
           reason = NULL, held = false,
           rung = rung AND t.status = 'running',
           available_at = CASE WHEN t.status = 'running' THEN available_at
                               WHEN (context ->> 'starts_at')::timestamptz > now()
                               THEN (context ->> 'starts_at')::timestamptz ELSE now() END,
           context = context - 'starts_at'""",
    allowed="t.status = 'paused' OR (t.status = 'running' AND t.control = 'pause')",
    more="",
)

_RESTART_CHANGES = """
           generation = generation + 1, attempt = attempt + 1, wake = wake + 1,
           status = 'pending', reason = NULL, held = false, control = {control},
           output = NULL, error = NULL, completed_at = NULL, rung = false,
           retries = 0, recoveries = 0, expires_at = NULL,
           deadline_at = now() + (deadline_at - created_at), available_at = now()"""

_HAS_STEP = f""" AND EXISTS (SELECT FROM durable.step_attempts s
                     WHERE s.workflow_run_id = r.id AND s.set_aside = 0 AND s.kind <> 'result'
                       AND {AT_STEP})"""


def _restarting(
    aside: str,
    control: str = "CASE WHEN t.status = 'paused' THEN t.control END",
    condition: str = "",
) -> str:
    """Make the statement of a restart; a paused run that was to be canceled still is."""
    return _FRAME.format(
        changes=_RESTART_CHANGES.format(control=control),
        allowed=f"t.status IN ('succeeded', 'failed', 'canceled', 'paused'){condition}",
        more=aside,
    )


# What was recorded before the place counts; see `set_aside`.
_RESTART = {
    "failed": _restarting(what_failed("changed")),
    "beginning": _restarting(everything_from(BEGINNING, "changed"), control="NULL"),
    "step": _restarting(everything_from(AT_STEP, "changed"), condition=_HAS_STEP),
}


def cancel(conn: Connection, order: Order) -> list[Change]:
    """Cancel runs: at once, or before the next step of one that runs."""
    changes = _act(conn, _CANCEL, "cancel", order)
    follow(conn, [each.run_id for each in changes if each.after == "canceled"])
    return changes


def pause(conn: Connection, order: Order) -> list[Change]:
    """Pause runs: at once, or before the next step of one that runs."""
    return _act(conn, _PAUSE, "pause", order)


def resume(conn: Connection, order: Order) -> list[Change]:
    """Let paused runs go on."""
    return _act(conn, _RESUME, "resume", order)


@dataclass(frozen=True, slots=True)
class From:
    """Where a restart begins.

    Attributes:
        where: ``beginning``, ``failed`` (only what failed, see `set_aside`) or ``step``.
        step: its name.
        ordinal: its position, if the name alone is not enough; likewise ``branch``.
    """

    where: str
    step: str | None = None
    ordinal: int | None = None
    branch: str | None = None


def restart(conn: Connection, order: Order, begin: From) -> list[Change]:
    """Have ended or paused runs run again; what they recorded before `begin` counts."""
    more = {"step": begin.step, "ordinal": begin.ordinal, "branch": begin.branch}
    detail = begin.where if begin.step is None else f"step {begin.step}"
    return _act(conn, _RESTART[begin.where], "restart", order, detail, more)


def _act(
    conn: Connection,
    statement: str,
    action: str,
    order: Order,
    detail: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> list[Change]:
    params = {
        "order": order.id,
        "ids": list(order.run_ids),
        "namespace": order.namespace,
        "actor": order.actor,
        "reason": order.reason,
        "action": action,
        "detail": detail,
        **(more or {}),
    }
    with conn.transaction():
        conn.execute(_LOCK, params)
        rows = conn.execute(statement, params).fetchall()
    return [Change(*row[:5]) for row in rows]


# An operator's word for what a step brought. The attempts that failed are set
# aside, and the result stands at their place as if the step had succeeded.
# Only while nobody executes the run.
_SETTLE = _FRAME.format(
    changes="generation = generation + 1",
    allowed="""t.status IN ('paused', 'failed', 'canceled')
            AND EXISTS (SELECT FROM durable.step_attempts s
                         WHERE s.workflow_run_id = r.id AND s.branch = %(branch)s
                           AND s.ordinal = %(ordinal)s AND s.set_aside = 0 AND s.kind = 'run')""",
    more=""", aside AS (
    UPDATE durable.step_attempts s SET set_aside = c.generation
      FROM changed c
     WHERE s.workflow_run_id = c.id AND s.branch = %(branch)s AND s.ordinal = %(ordinal)s
       AND s.set_aside = 0
    RETURNING s.workflow_run_id, s.step_name, s.attempt, s.created_at
), settled AS (
    INSERT INTO durable.step_attempts
           (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output, context,
            created_at, completed_at)
    SELECT workflow_run_id, %(branch)s, %(ordinal)s, step_name, max(attempt) + 1, 'run',
           'succeeded', %(output)s, jsonb_build_object('settled_by', %(actor)s::text),
           max(created_at), now()
      FROM aside GROUP BY workflow_run_id, step_name
)""",
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step stands in a run."""

    branch: str
    ordinal: int


_PLACES = """
SELECT DISTINCT s.branch, s.ordinal
  FROM durable.step_attempts s JOIN durable.workflow_runs r ON r.id = s.workflow_run_id
 WHERE r.id = %(id)s AND r.namespace_id = %(namespace)s AND s.step_name = %(step)s
   AND s.set_aside = 0 AND s.kind = 'run'
 ORDER BY s.branch, s.ordinal
"""


def places(conn: Connection, run_id: str, namespace: str, step: str) -> list[Place]:
    """Look up where a run has tried a step of that name."""
    params = {"id": run_id, "namespace": namespace, "step": step}
    return [Place(*row) for row in conn.execute(_PLACES, params).fetchall()]


def settle(
    conn: Connection, order: Order, *, branch: str, ordinal: int, name: str, output: str
) -> list[Change]:
    """Record what a step brought, in the place of its failed attempts."""
    more = {"branch": branch, "ordinal": ordinal, "output": output}
    return _act(conn, _SETTLE, "settle", order, f"step {name}", more)


@dataclass(frozen=True, slots=True)
class Which:
    """Which runs a bulk action is for; what is None does not matter.

    Attributes:
        statuses: any of these.
        name: of the workflow.
        created_before: and ``created_after``: aware datetimes.
        reason: text that the run's reason contains, in any case.
    """

    statuses: Sequence[str] | None = None
    name: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    reason: str | None = None


_WHICH = """
SELECT id::text FROM durable.workflow_runs
 WHERE namespace_id = %(namespace)s AND id > %(after)s
   AND (%(statuses)s::text[] IS NULL OR status = ANY(%(statuses)s))
   AND (%(name)s::text IS NULL OR workflow_name = %(name)s)
   AND (%(created_after)s::timestamptz IS NULL OR created_at >= %(created_after)s)
   AND (%(created_before)s::timestamptz IS NULL OR created_at < %(created_before)s)
   AND (%(reason)s::text IS NULL OR strpos(lower(reason), lower(%(reason)s)) > 0)
 ORDER BY id LIMIT %(limit)s
"""

FIRST = "00000000-0000-0000-0000-000000000000"


def which(
    conn: Connection, namespace: str, which: Which, *, after: str = FIRST, limit: int
) -> list[str]:
    """Look up runs in the order of their ids, some at a time."""
    params = {
        "namespace": namespace,
        "statuses": None if which.statuses is None else list(which.statuses),
        "name": which.name,
        "created_after": which.created_after,
        "created_before": which.created_before,
        "reason": which.reason,
        "after": after,
        "limit": limit,
    }
    return [row[0] for row in conn.execute(_WHICH, params).fetchall()]


_ACTIONS = """
SELECT a.action, a.actor, a.reason, a.before, a.after, a.detail, a.at
  FROM durable.run_actions a JOIN durable.workflow_runs r ON r.id = a.workflow_run_id
 WHERE r.id = %(id)s AND r.namespace_id = %(namespace)s
 ORDER BY a.seq
"""


def actions(conn: Connection, run_id: str, namespace: str) -> list[ActionRow]:
    """Load what people did to a run, in order."""
    with conn.cursor(row_factory=class_row(ActionRow)) as cursor:
        return cursor.execute(_ACTIONS, {"id": run_id, "namespace": namespace}).fetchall()
