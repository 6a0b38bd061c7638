"""Queries about which workers have the code of which runs.

Code is a task's name and, for a run with a version, that version. Workers
report both with each beat: ``workers.workflows`` and, as ``name@version``,
``workers.versions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from durable.store.connections import Connection

# The first message that went astray is rung anew at once, by a worker that has
# the code and to a queue of its own. Should that not help (two workers of one
# name, a broker that refuses the queue), the pause doubles up to a minute, so
# that no storm comes of it. Only while the message is the newest: a run that a
# worker has claimed meanwhile, or that was woken and rung again, is not doubted.
_HAND_BACK = """
UPDATE durable.workflow_runs
   SET rung = false,
       handed_back = handed_back + 1,
       available_at = least(now() + CASE WHEN handed_back = 0 THEN interval '0' ELSE
                            interval '1 second' * least(60, 2 ^ least(handed_back - 1, 6)) END,
                            CASE WHEN completed_at IS NULL THEN deadline_at END,
                            CASE WHEN completed_at IS NULL THEN expires_at END),
       reason = CASE WHEN completed_at IS NULL
                     THEN 'lacking code: ' || %(worker)s || ' got its message and lacks '
                          || coalesce('version ' || version || ' of ', '') || workflow_name
                          || ' (' || (handed_back + 1) || ' in a row handed back)'
                     ELSE reason END
 WHERE id = %(id)s AND namespace_id = %(namespace)s AND rung
   AND (   %(versions)s::text[] IS NULL
        OR (completed_at IS NULL AND NOT version = ANY(%(versions)s::text[])))
RETURNING CASE WHEN handed_back = 1 THEN pg_notify('durable', namespace_id) END
"""


def hand_back(
    conn: Connection,
    run_id: str,
    namespace: str,
    worker: str,
    versions: Sequence[str] | None = None,
) -> bool:
    """Put a run aside whose message came to ``worker``, which lacks its code.

    ``versions`` are those that it has of the workflow; None: it has none at
    all. False: the run is of a version that it has, or it has been claimed or
    rung anew in the meantime.
    """
    params = {
        "id": run_id,
        "namespace": namespace,
        "worker": worker,
        "versions": None if versions is None else list(versions),
    }
    return conn.execute(_HAND_BACK, params).rowcount == 1


# Due and not rung by any dispatcher, or rung so long ago that the message is
# doubted, for want of a worker. Told once: a fleet that looks every few seconds
# writes nothing more.
_TELL_LACKING = """
WITH lacking AS (
    SELECT r.id, 'lacking code: no live worker has '
                 || coalesce('version ' || r.version || ' of ', '') || r.workflow_name AS why
      FROM durable.workflow_runs r
     WHERE r.namespace_id = %(namespace)s AND r.available_at <= now()
       AND r.status IN ('pending', 'sleeping')
       AND NOT EXISTS (SELECT FROM durable.workers w
                        WHERE w.namespace_id = r.namespace_id
                          AND r.workflow_name = ANY(w.workflows)
                          AND (r.version IS NULL
                               OR r.workflow_name || '@' || r.version = ANY(w.versions)))
       AND NOT coalesce(starts_with(r.reason, 'lacking code: no live worker'), false)
     LIMIT 1000 FOR UPDATE OF r SKIP LOCKED
)
UPDATE durable.workflow_runs r SET reason = lacking.why FROM lacking WHERE r.id = lacking.id
RETURNING r.id::text, r.reason
"""


def tell_lacking(conn: Connection, namespace: str) -> dict[str, str]:
    """Write on due runs that no live worker has their code; ids and reasons of new ones."""
    return dict(conn.execute(_TELL_LACKING, {"namespace": namespace}).fetchall())


# An ended run counts while Celery has still to deliver what follows its end.
_UNFINISHED = """
SELECT count(*) FILTER (WHERE status IN ('pending', 'running')),
       count(*) FILTER (WHERE status IN ('sleeping', 'waiting')),
       count(*) FILTER (WHERE status = 'paused'),
       count(*) FILTER (WHERE completed_at IS NOT NULL),
       count(*) FILTER (WHERE starts_with(reason, 'lacking code') AND completed_at IS NULL)
  FROM durable.workflow_runs
 WHERE namespace_id = %(namespace)s
   AND (completed_at IS NULL OR available_at < 'infinity')
   AND (%(names)s::text[] IS NULL OR workflow_name = ANY(%(names)s::text[]))
   AND (%(versions)s::text[] IS NULL OR version = ANY(%(versions)s::text[]))
"""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """How many runs are not over, by what they do."""

    active: int
    parked: int
    paused: int
    delivering: int
    lacking: int

    @property
    def total(self) -> int:
        """All of them; those that lack a worker are among the others."""
        return self.active + self.parked + self.paused + self.delivering


def unfinished(
    conn: Connection, namespace: str, names: Sequence[str] = (), versions: Sequence[str] = ()
) -> Unfinished:
    """Count the runs that are not over: of all workflows and versions, or of these."""
    params = {
        "namespace": namespace,
        "names": list(names) or None,
        "versions": list(versions) or None,
    }
    row = conn.execute(_UNFINISHED, params).fetchone()
    assert row is not None
    return Unfinished(*row)
