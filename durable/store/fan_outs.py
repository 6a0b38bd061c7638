"""Queries of a fan-out: its row in the parent's history, its counters, its items.

An item is a run whose ``fan_out_id`` and ``fan_index`` say where it belongs.
The trigger on the end of a run (migration 0002) counts the items down, starts
those that are held, and wakes the parent; nothing here is on the path of an
item.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from durable.store import runs
from durable.store.connections import Connection
from durable.store.runs import NewRun
from durable.store.waits import HELD_RUN, KEY, Place, Wait


@dataclass(frozen=True, slots=True)
class NewFanOut:
    """What is recorded of a fan-out when it begins.

    Attributes:
        id: of the fan-out; those of its items derive from it.
        items: how many there are.
        stop_at_first: whether the first failure ends it.
        limited: whether some items are held at first.
    """

    id: str
    items: int
    stop_at_first: bool
    limited: bool


@dataclass(frozen=True, slots=True)
class State:
    """How a fan-out stands.

    Attributes:
        id: as it was first recorded.
        kind: of the row at this place; not ``fan_out`` if the code has changed.
        items: how many it was begun with.
        started: whether all its items are in Postgres.
        done: whether all have ended.
        stopped: whether one has failed and ends it.
        wait: the outcome, if it is recorded.
    """

    id: str
    kind: str
    items: int
    started: bool
    done: bool
    stopped: bool
    wait: Wait


# FOR SHARE as in every write of a claim: a zombie gets no row. The counters
# come with the row and only with it: counted from the first item on, since an
# item may end before the last one is inserted. A conflict returns the row as
# it is, hence the update that changes nothing. `xmax` is 0 in a new row.
_OPEN = f"""
WITH run AS MATERIALIZED (
    {HELD_RUN}
), opened AS (
    INSERT INTO durable.step_attempts AS s
           (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output, context,
            completed_at)
    SELECT id, %(branch)s, %(ordinal)s, %(name)s, 1, 'fan_out',
           CASE WHEN %(items)s = 0 THEN 'succeeded' ELSE 'running' END,
           CASE WHEN %(items)s = 0 THEN '[]'::json END,
           jsonb_build_object('fan_out', %(id)s::text, 'items', %(items)s::int,
                              'stop_at_first', %(stop_at_first)s::bool),
           CASE WHEN %(items)s = 0 THEN now() END
      FROM run
    ON CONFLICT {KEY} DO UPDATE SET kind = s.kind
    RETURNING s.workflow_run_id, s.kind, s.status, s.output, s.error, s.context, s.xmax = 0 AS new
), counted AS (
    INSERT INTO durable.fan_outs
           (id, shard, workflow_run_id, remaining, stop_at_first, limited)
    SELECT %(id)s::uuid, shard, opened.workflow_run_id, remaining, %(stop_at_first)s, %(limited)s
      FROM opened, (SELECT -1, least(%(items)s, 16)
                    UNION ALL
                    SELECT n, (%(items)s - n + 15) / 16
                      FROM generate_series(0, least(%(items)s, 16) - 1) n) AS c (shard, remaining)
     WHERE opened.new AND %(items)s > 0
)
SELECT kind, status, opened.context::text, output::text, error::text,
       coalesce(whole.remaining = 0, false), whole.stopped_by IS NOT NULL
  FROM opened LEFT JOIN durable.fan_outs whole
    ON whole.id = (opened.context ->> 'fan_out')::uuid AND whole.shard = -1
"""


def open(conn: Connection, place: Place, fan_out: NewFanOut) -> State | None:  # noqa: A001
    """Begin a fan-out, or see how far it is. None: the run is another claim's by now."""
    row = conn.execute(_OPEN, {**place._asdict(), **asdict(fan_out)}).fetchone()
    if row is None:
        return None
    kind, status, context, output, error, done, stopped = row
    about: Mapping[str, Any] = json.loads(context or "{}")
    return State(
        id=about.get("fan_out", ""),
        kind=kind,
        items=about.get("items", -1),
        started=about.get("started", False),
        done=done,
        stopped=stopped,
        wait=Wait(status, output, error, context),
    )


#: Columns of an item's row that differ from item to item, and their types.
_COLUMNS = {
    "id": "uuid",
    "name": "text",
    "input": "text",
    "message": "text",
    "queue": "text",
    "delay": "float8",
    "deadline": "float8",
    "expires": "float8",
    "tail": "bool",
    "fan_index": "int",
    "held": "bool",
    "subject": "text",
    "version": "text",
}

# The ids derive from the fan-out's, so that a repeat, by this claim or by the
# next one after a crash, finds its rows in place: whatever became of an item
# meanwhile is not touched. The lock on the parent is released with each lot.
_INSERT = f"""
WITH run AS MATERIALIZED (
    {HELD_RUN}
), inserted AS (
    INSERT INTO durable.workflow_runs
           (id, namespace_id, workflow_name, status, input, message, queue, rung, tail,
            parent_run_id, on_parent_cancel, fan_out_id, fan_index, held, subject,
            version, available_at, deadline_at, expires_at)
    SELECT i.id, run.namespace_id, i.name,
           CASE WHEN i.held THEN 'waiting' WHEN i.delay IS NULL THEN 'pending' ELSE 'sleeping' END,
           i.input::json, i.message::json, i.queue, false, i.tail,
           run.id, 'cancel', %(fan_out)s, i.fan_index, i.held, i.subject,
           i.version,
           least(CASE WHEN i.held THEN 'infinity'
                      ELSE now() + make_interval(secs => coalesce(i.delay, 0)) END,
                 now() + make_interval(secs => i.deadline),
                 now() + make_interval(secs => i.expires)),
           now() + make_interval(secs => i.deadline),
           now() + make_interval(secs => i.expires)
      FROM run, unnest({", ".join(f"%({name})s::{kind}[]" for name, kind in _COLUMNS.items())})
           AS i ({", ".join(_COLUMNS)})
    ON CONFLICT (id) DO NOTHING
)
SELECT pg_notify('durable', namespace_id) FROM run
"""


def insert(conn: Connection, place: Place, fan_out: str, items: Sequence[NewRun]) -> bool:
    """Accept a lot of items. False: the run is another claim's by now.

    Held items have to be inserted before the first of the others, or an end
    of one of these finds nobody to let in.
    """
    params: dict[str, Any] = {column: [] for column in _COLUMNS}
    for item in items:
        for column, values in params.items():
            values.append(getattr(item, column))
    params |= {"run_id": place.run_id, "fence": place.fence, "fan_out": fan_out}
    return conn.execute(_INSERT, params).fetchone() is not None


_STARTED = f"""
UPDATE durable.step_attempts s SET context = s.context || '{{"started": true}}'
  FROM ({HELD_RUN}) run
 WHERE s.workflow_run_id = run.id AND s.branch = %(branch)s AND s.ordinal = %(ordinal)s
   AND s.step_name = %(name)s AND s.attempt = 1 AND s.set_aside = 0
"""


def started(conn: Connection, place: Place) -> bool:
    """Note that all items are inserted. False: the run is another claim's by now."""
    return conn.execute(_STARTED, place._asdict()).rowcount == 1


# Not fenced, and the parent's row is not locked: an end of an item holds its
# row and may wait for the parent's, and this would wait for the item's. Nothing
# is lost by that, since the failure that ends the fan-out is committed. The
# held items come last: an end may wait for one of them while it holds a
# started one.
_UNFINISHED = """
SELECT id::text, namespace_id FROM durable.workflow_runs
 WHERE parent_run_id = %(run_id)s AND fan_out_id = %(fan_out)s AND completed_at IS NULL
 ORDER BY held, id FOR UPDATE
"""


def cancel_unfinished(conn: Connection, run_id: str, fan_out: str) -> int:
    """Cancel the items of a fan-out that has stopped; how many. Safe to repeat."""
    with conn.transaction():
        rows = conn.execute(_UNFINISHED, {"run_id": run_id, "fan_out": fan_out}).fetchall()
        if not rows:
            return 0
        ids = [row[0] for row in rows]
        return len(runs.cancel(conn, ids, rows[0][1], "another item of the fan-out failed"))


# json_agg keeps the text of each output. SKIP LOCKED: the ends of canceled
# items may be counting at this moment, and wait for the parent's row, which is
# locked here; a counter that is left over goes with the run.
_SETTLE = f"""
WITH run AS MATERIALIZED (
    {HELD_RUN}
), whole AS MATERIALIZED (
    SELECT stopped_by FROM durable.fan_outs
     WHERE id = %(fan_out)s AND shard = -1 AND (remaining = 0 OR stopped_by IS NOT NULL)
), item AS NOT MATERIALIZED (
    SELECT fan_index, status, output, error,
           jsonb_build_object('item', fan_index, 'run', id, 'task', workflow_name,
                              'outcome', status, 'reason', reason) AS about
      FROM durable.workflow_runs
     WHERE parent_run_id = %(run_id)s AND fan_out_id = %(fan_out)s
), settled AS (
    UPDATE durable.step_attempts s
       SET status = CASE WHEN stopped_by IS NULL THEN 'succeeded' ELSE 'failed' END,
           output = CASE WHEN stopped_by IS NULL THEN
               (SELECT json_agg(CASE WHEN i.status = 'succeeded' THEN i.output END
                                ORDER BY i.fan_index) FROM item i) END,
           error = CASE WHEN stopped_by IS NULL THEN
               (SELECT json_agg(json_build_object('about', i.about, 'error', i.error)
                                ORDER BY i.fan_index) FROM item i WHERE i.status <> 'succeeded')
               ELSE (SELECT i.error FROM item i WHERE i.fan_index = stopped_by) END,
           context = s.context || coalesce(
               (SELECT i.about FROM item i WHERE i.fan_index = stopped_by), '{{}}'),
           completed_at = now()
      FROM run, whole
     WHERE s.workflow_run_id = run.id AND s.branch = %(branch)s AND s.ordinal = %(ordinal)s
       AND s.step_name = %(name)s AND s.attempt = 1 AND s.set_aside = 0 AND s.status = 'running'
    RETURNING 1
), counters AS (
    SELECT f.id, f.shard FROM durable.fan_outs f
     WHERE f.id = %(fan_out)s AND EXISTS (SELECT FROM settled)
       FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM durable.fan_outs f USING counters c WHERE f.id = c.id AND f.shard = c.shard
)
SELECT count(*) FROM settled
"""


def settle(conn: Connection, place: Place, fan_out: str) -> None:
    """Put the outcome of a fan-out that is over into its row; `open` returns it then."""
    conn.execute(_SETTLE, {**place._asdict(), "fan_out": fan_out})
