"""The dispatcher's one statement: which runs to ring now, and how long it may sleep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from durable.store.connections import Connection


@dataclass(frozen=True, slots=True)
class Doorbell:
    """A message to publish for a run.

    Attributes:
        message: its options; None: nobody knows the way yet, it was started by SQL.
        woken: whether the run was claimed before: it goes ahead of new ones.
        direct: whether only this worker may get it: others lack the code.
    """

    id: str
    name: str
    message: str | None
    woken: bool = False
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be rung now.

    Attributes:
        doorbells: messages to publish.
        cascades: canceled runs whose tied children are still to be canceled.
        more: whether the batch was full.
        next_in: seconds until the next timer that is known now; None: none.
        outbox: whether there is something to deliver.
    """

    doorbells: Sequence[Doorbell]
    cascades: Sequence[str]
    more: bool
    next_in: float | None
    outbox: bool = False


# `< 'infinity'` is what makes the partial index fit: without it each look read
# the whole table. SKIP LOCKED lets every worker's dispatcher take other rows.
# Two ways in:
#   fresh  something has come due and was not rung yet: always.
#   again  a message was published but nobody claimed: only while a worker of
#          that queue reports a free slot, since with all of them busy the
#          message just waits its turn. Its age doubles the pause, so that a
#          task's rate limit does not collect messages without end.
# Only names and versions that a live worker has registered are rung; the rest
# wait, visible. A run whose message came to a worker without its code is rung
# by a worker that has it, to that worker's own queue; where producers still send
# ordinary messages, some workers may not even know ours, so all are.
# A run without a message was started by SQL, and only who has the task knows
# the way to its queue.
# What a run is judged by comes out of the locking SELECTs: they return the row
# as it was locked. Looked up again by id it was the statement's snapshot, and a
# cancel committed between the two was undone.
# Deadlines and expiry end a run here, wherever it is; one that runs is fenced
# by it. A run with a Celery continuation is rung for that, and so is one that
# failed, for Celery's hooks.
_HAS_CODE = """workflow_name = ANY(%({names})s)
                 AND (version IS NULL OR completed_at IS NOT NULL
                      OR workflow_name || '@' || version = ANY(%({versions})s))"""
_KNOWN = (
    _HAS_CODE.format(names="names", versions="versions")
    + " AND (message IS NOT NULL OR workflow_name = ANY(%(own_names)s))"
)
_MINE = _HAS_CODE.format(names="own_names", versions="own_versions")
_DIRECT = "(%(direct)s OR handed_back > 0)"

_DUE = f"""
WITH fresh AS MATERIALIZED (
    SELECT id, status, expires_at, deadline_at FROM durable.workflow_runs
     WHERE namespace_id = %(namespace)s AND NOT rung
       AND available_at <= now() AND available_at < 'infinity'
       AND (CASE WHEN {_DIRECT} THEN {_MINE} ELSE {_KNOWN} END
            OR ((deadline_at <= now() OR expires_at <= now())
                AND status <> ALL ('{{succeeded,failed,canceled}}')))
     ORDER BY available_at LIMIT %(batch)s FOR UPDATE SKIP LOCKED
), again AS MATERIALIZED (
    SELECT id, status, expires_at, deadline_at FROM durable.workflow_runs
     WHERE namespace_id = %(namespace)s AND rung
       AND available_at <= now() AND available_at < 'infinity'
       AND (CASE WHEN {_DIRECT} THEN %(own_idle)s AND {_MINE}
                 ELSE {_KNOWN}
                 AND (queue = ANY(%(idle_queues)s) OR (queue IS NULL AND %(idle)s)) END
            OR ((deadline_at <= now() OR expires_at <= now())
                AND status <> ALL ('{{succeeded,failed,canceled}}')))
     ORDER BY available_at LIMIT %(batch)s FOR UPDATE SKIP LOCKED
), due AS (
    SELECT id, status = ANY('{{succeeded,failed,canceled}}') AS ended,
           coalesce(expires_at <= now(), false) AS expired,
           coalesce(deadline_at <= now(), false) AS late
      FROM (TABLE fresh UNION ALL TABLE again) AS locked
), rung AS (
    UPDATE durable.workflow_runs r
       SET status = CASE WHEN ended THEN r.status WHEN expired THEN 'canceled'
                         WHEN late THEN 'failed' ELSE 'pending' END,
           reason = CASE WHEN ended THEN r.reason WHEN expired THEN 'expired'
                         WHEN late THEN 'deadline' ELSE r.reason END,
           error = CASE WHEN late AND NOT ended AND NOT expired THEN %(late)s ELSE r.error END,
           completed_at = CASE WHEN ended THEN r.completed_at
                               WHEN expired OR late THEN now() END,
           attempt = r.attempt + CASE WHEN late AND NOT ended THEN 1 ELSE 0 END,
           tail = r.tail OR (late AND NOT expired),
           rung_at = CASE WHEN r.rung THEN r.rung_at ELSE now() END,
           rung = (ended OR r.tail OR NOT expired) AND r.workflow_name = ANY(
               CASE WHEN {_DIRECT} OR r.message IS NULL THEN %(own_names)s::text[]
                    ELSE %(names)s::text[] END),
           available_at = CASE
               WHEN expired AND NOT ended AND NOT r.tail THEN 'infinity'
               ELSE least(now() + greatest(make_interval(secs => %(ring_again)s),
                                           CASE WHEN r.rung THEN now() - r.rung_at END),
                          CASE WHEN NOT (ended OR expired OR late) THEN r.deadline_at END,
                          CASE WHEN NOT (ended OR expired OR late) THEN r.expires_at END) END
      FROM due WHERE r.id = due.id
    RETURNING r.id, r.workflow_name, r.message, r.rung, r.started_at IS NOT NULL AS woken,
              {_DIRECT} AS direct
)
SELECT id::text, workflow_name, message::text, woken, direct FROM rung WHERE rung
UNION ALL
SELECT id::text, NULL, NULL, NULL, NULL FROM durable.workflow_runs
 WHERE namespace_id = %(namespace)s AND cascades
UNION ALL
SELECT CASE WHEN EXISTS (SELECT FROM durable.outbox WHERE namespace_id = %(namespace)s)
            THEN 'outbox' END,
       (SELECT count(*)::text FROM due), (
    SELECT extract(epoch FROM min(available_at) - now())::text FROM durable.workflow_runs
     WHERE namespace_id = %(namespace)s AND NOT rung
       AND available_at > now() AND available_at < 'infinity'), NULL, NULL
"""


@dataclass(frozen=True, slots=True)
class Code:
    """Which workflows can be executed.

    Attributes:
        names: of workflows.
        versions: ``name@version``, for runs that have one.
    """

    names: Sequence[str] = ()
    versions: Sequence[str] = ()


def due(
    conn: Connection,
    namespace: str,
    *,
    names: Sequence[str],
    idle_queues: Sequence[str],
    batch: int,
    ring_again: float,
    late_error: str,
    versions: Sequence[str] = (),
    own: Code | None = None,
    own_idle: bool = False,
    direct: bool = False,
) -> Due:
    """Take up to ``batch`` due runs, mark them rung, return what to publish.

    ``names`` and ``versions`` are what some live worker has, ``own`` what this
    one has. ``own_idle``: whether it has a free slot.
    ``direct``: whether all that it rings has to come to itself.
    """
    own = own or Code()
    rows = conn.execute(
        _DUE,
        {
            "namespace": namespace,
            "names": list(names),
            "versions": list(versions),
            "own_names": list(own.names),
            "own_versions": list(own.versions),
            "own_idle": own_idle,
            "direct": direct,
            "idle_queues": list(idle_queues),
            "idle": bool(idle_queues),
            "batch": batch,
            "ring_again": ring_again,
            "late": late_error,
        },
    ).fetchall()
    *found, (outbox, count, next_in, _, _) = rows
    return Due(
        [Doorbell(*row) for row in found if row[1] is not None],
        [row[0] for row in found if row[1] is None],
        more=int(count) >= batch,
        next_in=None if next_in is None else float(next_in),
        outbox=outbox is not None,
    )
