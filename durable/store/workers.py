"""Queries on ``workers``: beats, take-over of the dead, release of orphans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from durable.store.connections import Connection


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker reports with each beat."""

    id: str
    namespace: str
    hostname: str
    pid: int
    pool: str
    concurrency: int
    queues: Sequence[str]
    workflows: Sequence[str]
    free_slots: int
    idle_beats: int
    versions: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker as another one sees it."""

    id: str
    beat: int
    queues: Sequence[str]
    workflows: Sequence[str]
    idle_beats: int
    versions: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pulse:
    """The answer to a beat: all workers, and the runs that this one holds (id to attempt)."""

    peers: Sequence[Peer]
    held: Mapping[str, int]


# One statement a beat: report, see the peers, see the runs held. Inserted
# again should a peer have buried this worker by mistake; its runs were
# fenced by that, so nothing is doubled.
_BEAT = """
WITH beat AS (
    INSERT INTO durable.workers AS w
           (id, namespace_id, hostname, pid, pool, concurrency, queues, workflows, beat,
            free_slots, idle_beats, versions)
    VALUES (%(id)s, %(namespace)s, %(hostname)s, %(pid)s, %(pool)s, %(concurrency)s,
            %(queues)s, %(workflows)s, 1, %(free_slots)s, %(idle_beats)s,
            %(versions)s)
    ON CONFLICT (id) DO UPDATE
       SET beat = w.beat + 1, free_slots = excluded.free_slots, queues = excluded.queues,
           concurrency = excluded.concurrency, idle_beats = excluded.idle_beats, beat_at = now()
)
SELECT (SELECT json_agg(json_build_array(id, beat, queues, workflows, idle_beats, versions))::text
          FROM durable.workers WHERE namespace_id = %(namespace)s),
       (SELECT json_object_agg(id, attempt)::text
          FROM durable.workflow_runs WHERE worker_id = %(id)s AND status = 'running')
"""


def beat(conn: Connection, report: Beat) -> Pulse:
    """Report that this worker lives; see who else does and what it holds."""
    import json

    params = {field: getattr(report, field) for field in Beat.__slots__}
    params |= {key: list(params[key]) for key in ("queues", "workflows", "versions")}
    row = conn.execute(_BEAT, params).fetchone()
    peers, held = row or (None, None)
    return Pulse([Peer(*peer) for peer in json.loads(peers or "[]")], json.loads(held or "{}"))


_LEAVE = "DELETE FROM durable.workers WHERE id = %(id)s"


def leave(conn: Connection, worker_id: str) -> None:
    """Sign off at a warm shutdown."""
    conn.execute(_LEAVE, {"id": worker_id})


# What happens to a run whose worker is gone, in one expression list: fenced,
# and rung at once; or ended, if it was asked to or did this too often. The
# count starts anew with every step committed since the claim. A failure is
# rung too, so that Celery's hooks see it. A canceled run that has something to undo
# goes on, to do so.
_TAKE_OVER = """
   SET attempt = r.attempt + 1,
       recoveries = fate.recoveries,
       status = CASE WHEN r.control = 'cancel' AND NOT r.compensates THEN 'canceled'
                     WHEN fate.lost THEN 'failed'
                     WHEN r.control = 'pause' THEN 'paused' ELSE 'pending' END,
       control = CASE WHEN r.control = 'cancel' AND r.compensates THEN r.control END,
       reason = CASE WHEN r.control = 'cancel' AND NOT (r.compensates AND fate.lost) THEN r.reason
                     WHEN fate.lost THEN 'lost'
                     WHEN r.control = 'pause' THEN r.reason ELSE %(reason)s END,
       error = CASE WHEN fate.lost THEN %(error)s ELSE r.error END,
       completed_at = CASE WHEN (r.control = 'cancel' AND NOT r.compensates) OR fate.lost
                           THEN now() END,
       tail = r.tail OR fate.lost,
       available_at = CASE WHEN r.control = 'cancel' AND NOT (r.compensates OR r.tail)
                           THEN 'infinity'
                           WHEN r.control = 'pause' AND NOT fate.lost
                           THEN coalesce(r.deadline_at, 'infinity') ELSE now() END,
       child_pid = NULL,
       rung = false
"""

_FATE = """
SELECT h.id, h.recoveries, h.recoveries >= %(max_recoveries)s AS lost
  FROM (SELECT id,
               CASE WHEN EXISTS (SELECT FROM durable.step_attempts s
                                  WHERE s.workflow_run_id = workflow_runs.id
                                    AND s.completed_at >= workflow_runs.claimed_at)
                    THEN 1 ELSE recoveries + 1 END AS recoveries
          FROM durable.workflow_runs
         WHERE status = 'running' AND {who}
           FOR UPDATE) h
"""

_RELEASE = (
    "WITH fate AS ("
    + _FATE
    + "), released AS (UPDATE durable.workflow_runs r"
    + _TAKE_OVER
    + " FROM fate WHERE r.id = fate.id RETURNING r.id, r.namespace_id)"
    + " SELECT id::text, pg_notify('durable', namespace_id) FROM released"
)

# A child of this worker died: all that it held goes on at once.
_RELEASE_CHILD = _RELEASE.format(who="worker_id = %(worker)s AND child_pid = %(pid)s")

# Runs of this worker that none of its requests stands for: a claim was
# committed and its answer lost. The attempt that was seen guards against one
# that has ended and been claimed anew in between.
_RELEASE_ORPHANS = _RELEASE.format(
    who="worker_id = %(worker)s AND (id, attempt) IN"
    " (SELECT * FROM unnest(%(ids)s::uuid[], %(attempts)s::int[]))"
)

# The beat stands in the predicate: a worker that moved after all is not
# buried. The row's deletion decides between two peers that saw it at once.
_BURY = "DELETE FROM durable.workers WHERE id = %(worker)s AND beat = %(beat)s"

_RELEASE_WORKER = _RELEASE.format(who="worker_id = %(worker)s")

# Runs claimed in the name of a worker that nobody knows (any more): by a child
# that outlived it, say.
_RELEASE_UNKNOWN = _RELEASE.format(
    who="namespace_id = %(namespace)s AND claimed_at < now() - make_interval(secs => %(lease)s)"
    " AND NOT EXISTS (SELECT FROM durable.workers w WHERE w.id = workflow_runs.worker_id)"
)

# Messages that a dead worker had taken from the broker may be hidden there
# for an hour. Doubting them now costs nothing: a run is rung again only when
# a worker of its queue is idle.
_DOUBT = """
UPDATE durable.workflow_runs SET available_at = now()
 WHERE namespace_id = %(namespace)s AND rung AND available_at > now()
   AND available_at < 'infinity' AND status = 'pending'
   AND (queue IS NULL OR queue = ANY(%(queues)s))
"""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What to write on runs that are taken over.

    Attributes:
        max_recoveries: so many in a row without a step end the run.
        error: stored failure, JSON text, of a run that is ended.
    """

    max_recoveries: int
    error: str


def release_child(conn: Connection, worker: str, pid: int, recovery: Recovery) -> list[str]:
    """Release what a dead child held; the ids."""
    return _released(conn, _RELEASE_CHILD, recovery, "child lost", worker=worker, pid=pid)


def release_orphans(
    conn: Connection, worker: str, orphans: Mapping[str, int], recovery: Recovery
) -> list[str]:
    """Release runs (id to attempt) that this worker holds without knowing it; the ids."""
    ids, attempts = list(orphans), list(orphans.values())
    return _released(
        conn, _RELEASE_ORPHANS, recovery, "orphaned", worker=worker, ids=ids, attempts=attempts
    )


def bury(conn: Connection, peer: Peer, namespace: str, recovery: Recovery) -> list[str] | None:
    """Take over everything from a dead worker; the ids. None: it lives, or a peer did it."""
    with conn.transaction():
        found = conn.execute(_BURY, {"worker": peer.id, "beat": peer.beat}).rowcount
        if not found:
            return None
        released = _released(conn, _RELEASE_WORKER, recovery, "worker lost", worker=peer.id)
        conn.execute(_DOUBT, {"namespace": namespace, "queues": list(peer.queues)})
        return released


def release_unknown(
    conn: Connection, namespace: str, lease: float, recovery: Recovery
) -> list[str]:
    """Release runs held in the name of a worker that is not registered; the ids."""
    return _released(
        conn, _RELEASE_UNKNOWN, recovery, "worker unknown", namespace=namespace, lease=lease
    )


def _released(
    conn: Connection, statement: str, recovery: Recovery, reason: str, **who: object
) -> list[str]:
    params = {
        "max_recoveries": recovery.max_recoveries,
        "error": recovery.error,
        "reason": reason,
        **who,
    }
    return [row[0] for row in conn.execute(statement, params).fetchall()]
