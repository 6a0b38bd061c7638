"""Queries on ``workflow_runs``: start, claim, park, end, control.

Each function is one round trip and one commit. A run's life is a chain of
compare-and-swaps on ``attempt``, the fence: a claim and a take-over raise it,
every write of a worker names the one it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from durable.store.canceling import CANCEL
from durable.store.cascade import follow
from durable.store.connections import Connection
from durable.store.prepared import Prepared, Row
from durable.store.set_aside import what_failed
from durable.store.steps import END_OPENED, StepAttempt

#: Where the dispatcher listens. The payload is the namespace.
CHANNEL = "durable"

ENDED = frozenset({"succeeded", "failed", "canceled"})


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run as it is inserted. Durations in seconds; JSON as text."""

    id: str
    namespace: str
    name: str
    input: str
    message: str
    queue: str | None = None
    delay: float | None = None
    deadline: float | None = None
    expires: float | None = None
    rung: bool = True
    ring_again: float = 20.0
    tail: bool = False
    parent: str | None = None
    reports: bool = False
    on_parent_cancel: str | None = None
    fan_out: str | None = None
    fan_index: int | None = None
    held: bool = False
    subject: str | None = None
    version: str | None = None


class Claim(NamedTuple):
    """What a worker is given with a run; JSON as text."""

    id: str
    name: str
    status: str
    attempt: int
    wake: int
    input: str
    message: str
    output: str | None
    error: str | None
    retries: int
    control: str | None
    reason: str | None
    tail: bool
    generation: int
    passes: int
    version: str | None
    compensates: bool

    @classmethod
    def from_texts(cls, row: Row) -> Claim:
        """Make one of the columns that a claim returns."""
        columns: dict[str, Any] = dict(zip(cls._fields, row, strict=True))
        for number in ("attempt", "wake", "retries", "generation", "passes"):
            columns[number] = int(columns[number])
        for flag in ("tail", "compensates"):
            columns[flag] = columns[flag] == "true"
        return cls(**columns)


# A run is accepted when this is committed. A repeat after a lost answer finds
# its own row; so does the second of two beats that start one entry.
# `available_at` of a run whose message is about to be published is the time
# at which the dispatcher starts to doubt that the message lives. What is for
# the dispatcher to ring, now or soon, is announced with the commit, as it may
# sleep past it. Parameters are cast: the connection may be somebody else's,
# whose driver gives texts a type.
_INSERT_INTO = """
INSERT INTO durable.workflow_runs
       (id, namespace_id, workflow_name, status, input, message, queue, rung, rung_at, tail,
        parent_run_id, reports, on_parent_cancel, fan_out_id, fan_index, held, subject,
        version,
        available_at, deadline_at, expires_at)
"""

_NEW_ROW = """
       %(id)s::uuid, %(namespace)s, %(name)s,
        CASE WHEN %(held)s THEN 'waiting' WHEN %(delay)s::float8 IS NULL THEN 'pending'
             ELSE 'sleeping' END,
        %(input)s::json, %(message)s::json, %(queue)s, %(rung)s,
        CASE WHEN %(rung)s THEN now() END, %(tail)s,
        %(parent)s::uuid, %(reports)s, %(on_parent_cancel)s, %(fan_out)s::uuid,
        %(fan_index)s::integer, %(held)s,
        %(subject)s,
        %(version)s,
        least(CASE WHEN %(held)s THEN 'infinity' ELSE
                  now() + make_interval(secs => coalesce(%(delay)s::float8,
                      CASE WHEN %(rung)s THEN %(ring_again)s::float8 ELSE 0 END)) END,
              now() + make_interval(secs => %(deadline)s::float8),
              now() + make_interval(secs => %(expires)s::float8)),
        now() + make_interval(secs => %(deadline)s::float8),
        now() + make_interval(secs => %(expires)s::float8)
"""

_ANNOUNCED = """
ON CONFLICT (id) DO NOTHING
RETURNING CASE WHEN NOT (rung OR held) AND available_at < now() + interval '5 seconds'
               THEN pg_notify('durable', namespace_id) END
"""

_INSERT = f"{_INSERT_INTO} VALUES ({_NEW_ROW}) {_ANNOUNCED}"

_insert = Prepared("durable_insert", _INSERT)


def insert(conn: Connection, run: NewRun) -> bool:
    """Accept a run. False: a run of that id was there already."""
    return _insert.changed(conn, _params(run)) == 1


def _params(run: NewRun) -> dict[str, Any]:
    return {field: getattr(run, field) for field in NewRun.__slots__}


@dataclass(frozen=True, slots=True)
class Key:
    """An idempotency key of a start call.

    Attributes:
        plain: JSON text of the input, by which calls are compared.
        ttl: seconds from the end of the run for which the key stays taken.
        reuse: when this call may take a key that was taken before:
            ``after_ttl``, ``after_failure`` or ``after_end``.
    """

    key: str
    plain: str
    ttl: float
    reuse: str


# The key and the run, both or neither. `same`: whether the run that has the key
# was started with the same input.
_INSERT_KEYED = f"""
WITH taken AS MATERIALIZED (
    SELECT run, same FROM durable.take_key(
        %(namespace)s::text, %(name)s::text, %(key)s::text, %(plain)s::json, %(id)s::uuid,
        make_interval(secs => %(ttl)s::float8), %(reuse)s::text)
), accepted AS (
    {_INSERT_INTO}
    SELECT {_NEW_ROW} FROM taken WHERE taken.run = %(id)s::uuid
    {_ANNOUNCED}
)
SELECT run::text, same, (SELECT count(*) FROM accepted) FROM taken
"""


def insert_keyed(conn: Connection, run: NewRun, key: Key) -> tuple[str, bool]:
    """Accept a run, or find the one that has its key.

    Returns:
        The id of the key's run, and whether that has the same input.
    """
    params = {**_params(run), **{field: getattr(key, field) for field in Key.__slots__}}
    found = conn.execute(_INSERT_KEYED, params).fetchone()
    assert found is not None
    return str(found[0]), bool(found[1])


# All or nothing, for the dispatchers to ring; one announcement is enough.
_INSERT_MANY = f"""
WITH given AS (
    SELECT * FROM unnest(%(ids)s::uuid[], %(inputs)s::json[], %(messages)s::json[],
                         %(queues)s::text[]) AS each (id, input, message, queue)
), accepted AS (
    {_INSERT_INTO}
    SELECT {{row}} FROM given
    ON CONFLICT (id) DO NOTHING
    RETURNING available_at
)
SELECT CASE WHEN min(available_at) < now() + interval '5 seconds'
            THEN pg_notify('durable', %(namespace)s) END
  FROM accepted
""".format(
    row=_NEW_ROW.replace("%(id)s::uuid", "given.id")
    .replace("%(input)s::json", "given.input")
    .replace("%(message)s::json", "given.message")
    .replace("%(queue)s", "given.queue")
)


def insert_many(conn: Connection, runs: Sequence[NewRun]) -> None:
    """Accept runs that differ in id, input, message and queue only; all of them or none."""
    params = {
        **_params(runs[0]),
        "ids": [run.id for run in runs],
        "inputs": [run.input for run in runs],
        "messages": [run.message for run in runs],
        "queues": [run.queue for run in runs],
    }
    conn.execute(_INSERT_MANY, params)


# A run that was started by SQL alone: its way is known to the app that rings
# it. What the call has said goes before what the task says.
_ROUTE = """
UPDATE durable.workflow_runs
   SET message = %(message)s::json, queue = coalesce(%(queue)s, queue), tail = tail OR %(tail)s,
       deadline_at = coalesce(deadline_at,
                              created_at + make_interval(secs => %(deadline)s::float8)),
       available_at = least(available_at,
                            created_at + make_interval(secs => %(deadline)s::float8))
 WHERE id = %(id)s AND message IS NULL
"""

_UNROUTED = """
SELECT input::text, queue, config ->> 'priority'
  FROM durable.workflow_runs WHERE id = %(id)s
"""


def unrouted(conn: Connection, run_id: str) -> tuple[str, str | None, int | None]:
    """Load what a start by SQL has given: input as JSON text, queue, priority."""
    row = conn.execute(_UNROUTED, {"id": run_id}).fetchone()
    assert row is not None
    return row[0], row[1], None if row[2] is None else int(row[2])


def route(
    conn: Connection,
    run_id: str,
    *,
    message: str,
    queue: str | None,
    tail: bool,
    deadline: float | None,
) -> None:
    """Store where the messages of a run go that was started by SQL alone."""
    params = {"id": run_id, "message": message, "queue": queue, "tail": tail, "deadline": deadline}
    conn.execute(_ROUTE, params)


# Races: of two messages for one run, the row lock lets one UPDATE see
# 'pending' and the other 'running'. A run that has ended is claimable only
# while the dispatcher has rung it for its undelivered continuation, once per
# ring; its age doubles the pause, since there are some that Celery can never
# deliver. An expired run stays for the dispatcher to end. A run with a version
# is for code that has it: its message may have come to any worker of the queue.
# An ended one only has its stored outcome delivered, which any code can.
_CLAIM = """
UPDATE durable.workflow_runs
   SET status = CASE WHEN status = 'pending' THEN 'running' ELSE status END,
       attempt = attempt + 1,
       worker_id = %(worker)s,
       child_pid = %(pid)s,
       rung = false,
       available_at = CASE WHEN status = 'pending' THEN coalesce(deadline_at, 'infinity')
                           ELSE now() + greatest(make_interval(secs => %(tail_timeout)s),
                                                 now() - completed_at) END,
       expires_at = NULL,
       handed_back = 0,
       reason = CASE WHEN starts_with(reason, 'lacking code') THEN NULL ELSE reason END,
       started_at = coalesce(started_at, now()),
       claimed_at = now()
 WHERE id = %(id)s AND namespace_id = %(namespace)s
   AND (   (status = 'pending' AND (expires_at IS NULL OR expires_at > now())
            AND (version IS NULL OR version = ANY(%(versions)s::text[])))
        OR (status IN ('succeeded', 'failed', 'canceled') AND rung))
RETURNING id::text, workflow_name, status, attempt::text, wake::text, input::text,
          coalesce(message::text, '{}'),
          output::text, error::text, retries::text, control, reason, tail::text,
          generation::text, passes::text, version, compensates::text
"""

_claim = Prepared("durable_claim", _CLAIM)

# Its snapshot has to be taken after the claim got the row lock: as one
# statement with it, in a CTE, it returned the history as it was before, and a
# step committed meanwhile was missing. After the claim nothing is added by
# anybody else, since every write names its attempt; so a first claim, whose
# run has no history yet, need not ask. In the order in which things ended:
# branches are told in that order again.
_HISTORY = """
SELECT branch, ordinal, step_name, attempt, kind, status, output, error, context::text
  FROM durable.step_attempts
 WHERE workflow_run_id = %(id)s AND set_aside = 0
 ORDER BY completed_at, ordinal, attempt, branch, step_name
"""

StepRecord = tuple[str, int, str, int, str, str, "str | None", "str | None", "str | None"]


def claim(
    conn: Connection,
    run_id: str,
    namespace: str,
    *,
    worker: str,
    pid: int,
    tail_timeout: float,
    versions: Sequence[str] = (),
) -> tuple[Claim, Sequence[StepRecord]] | None:
    """Take a run and its whole history. None: it is not there for the taking.

    ``versions`` are those that the worker's code can execute, besides runs without one.
    """
    params = {
        "id": run_id,
        "namespace": namespace,
        "worker": worker,
        "pid": pid,
        "tail_timeout": tail_timeout,
        "versions": "{" + ",".join(f'"{each}"' for each in versions) + "}",
    }
    row = _claim.row(conn, params)
    if row is None:
        return None
    claimed = Claim.from_texts(row)
    steps = conn.execute(_HISTORY, params).fetchall() if claimed.attempt > 1 else ()
    return claimed, steps


# The outcome, once. A repeat after a lost answer matches nothing, and `_state`
# then tells it from a lost run. The reason of a cancellation was given with
# the request, which may have come after this worker's claim.
_FINISH = """
UPDATE durable.workflow_runs
   SET status = %(status)s, output = %(output)s, error = %(error)s,
       reason = CASE WHEN %(status)s = 'canceled' AND control IS NOT NULL THEN reason
                     ELSE %(reason)s END,
       completed_at = now(), child_pid = NULL, rung = false,
       available_at = CASE WHEN tail THEN now() + make_interval(secs => %(tail_timeout)s)
                           ELSE 'infinity' END
 WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'running'
"""

_finish = Prepared("durable_finish", _FINISH)


def finish(
    conn: Connection,
    run_id: str,
    attempt: int,
    status: str,
    *,
    tail_timeout: float,
    output: str | None = None,
    error: str | None = None,
    reason: str | None = None,
) -> bool:
    """End a run. False: it is no longer this attempt's to end."""
    params = {
        "id": run_id,
        "attempt": attempt,
        "status": status,
        "output": output,
        "error": error,
        "reason": reason,
        "tail_timeout": tail_timeout,
    }
    if _finish.changed(conn, params) == 1:
        return True
    return _state(conn, run_id) == (attempt, status)


# Parking is a compare-and-swap on `attempt` and `wake`. Whatever wakes a run
# updates it by primary key alone and raises `wake`: if that came first, the
# run goes straight back to 'pending' (or is paused, if that was it); if the park
# came first, the waker waits
# for the row and finds it parked. A waker that asked for status = 'waiting'
# matched nothing beside an uncommitted park, and the wake-up was lost.
# A due time close by is announced, as the dispatcher may sleep past it.
_PARKED = """
WITH parked AS (
    UPDATE durable.workflow_runs
       SET status = CASE WHEN control = 'pause' THEN 'paused'
                         WHEN wake <> %(wake)s THEN 'pending' ELSE %(status)s END,
           control = CASE WHEN control = 'cancel' THEN control END,
           available_at = CASE WHEN control = 'pause' THEN coalesce(deadline_at, 'infinity')
                               WHEN wake <> %(wake)s OR %(status)s = 'pending' THEN now()
                               ELSE least(now() + make_interval(secs => %(delay)s::float8),
                                          deadline_at, 'infinity') END,
           retries = retries + %(retries)s, generation = generation + %(retries)s,
           reason = CASE WHEN control IS NULL THEN %(reason)s ELSE reason END,
           child_pid = NULL, rung = false
     WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'running'
    RETURNING id, namespace_id, available_at, generation
)"""

_ANNOUNCE = """
SELECT CASE WHEN available_at < now() + interval '5 seconds'
            THEN pg_notify('durable', namespace_id) END
  FROM parked
"""

_WITH_STEP = f""", step AS (
    INSERT INTO durable.step_attempts AS s
           (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, error, context,
            created_at, completed_at)
    SELECT id, %(branch)s, %(ordinal)s, %(step_name)s, %(step_attempt)s, %(step_kind)s, 'failed',
           %(step_error)s, %(step_context)s, now() - make_interval(secs => %(seconds)s), now()
      FROM parked WHERE %(step_name)s::text IS NOT NULL
    {END_OPENED}
)"""

_PARK = _PARKED + _WITH_STEP + _ANNOUNCE

# A retry of the whole body: what failed is to be done again.
_PARK_TO_RETRY = _PARKED + what_failed("parked") + _ANNOUNCE


@dataclass(frozen=True, slots=True)
class Park:
    """How a run gives its slot back.

    Attributes:
        status: ``sleeping``, ``waiting``, ``paused``, or ``pending`` to be
            rung again at once.
        delay: seconds until due; None: until something wakes it.
        retry: whether this is a retry of the whole body; failed steps are
            then set aside, so that they run again.
    """

    status: str
    reason: str
    delay: float | None = None
    retry: bool = False


def park(
    conn: Connection,
    run_id: str,
    attempt: int,
    wake: int,
    how: Park,
    failed: StepAttempt | None = None,
) -> bool:
    """Park a run, and record the failed step that made it wait, in one statement.

    False: the run is no longer this attempt's, nothing was stored.
    """
    params = {
        "id": run_id,
        "attempt": attempt,
        "wake": wake,
        "status": how.status,
        "delay": how.delay,
        "reason": how.reason,
        "retries": int(how.retry),
        "branch": failed and failed.branch,
        "ordinal": failed and failed.ordinal,
        "step_name": failed and failed.name,
        "step_attempt": failed and failed.attempt,
        "step_kind": failed and failed.kind,
        "step_error": failed and failed.error,
        "step_context": failed and failed.context,
        "seconds": failed.seconds if failed else 0.0,
    }
    if conn.execute(_PARK_TO_RETRY if how.retry else _PARK, params).rowcount == 1:
        return True
    # A repeat after a lost answer finds the run parked, and not yet claimed anew.
    now_attempt, status = _state(conn, run_id) or (None, "")
    return now_attempt == attempt and status not in ENDED


# By primary key alone, so that it waits for a park that is being committed
# instead of missing it.
_CANCEL = f"""
UPDATE durable.workflow_runs r
   SET {CANCEL},
       reason = %(reason)s
 WHERE id = ANY(%(ids)s::uuid[]) AND namespace_id = %(namespace)s
   AND status NOT IN ('succeeded', 'failed', 'canceled')
RETURNING id::text, status,
          CASE WHEN tail OR compensates THEN pg_notify('durable', namespace_id) END
"""


def cancel(conn: Connection, run_ids: Sequence[str], namespace: str, reason: str) -> dict[str, str]:
    """Cancel runs for the system's own reasons; people's requests go through `store.control`.

    Their new statuses by id. Ended and unknown ones are left out.
    """
    params = {"ids": list(run_ids), "namespace": namespace, "reason": reason}
    found = {row[0]: row[1] for row in conn.execute(_CANCEL, params).fetchall()}
    follow(conn, [run_id for run_id, status in found.items() if status in ENDED])
    return found


# A hard time limit: the child is about to be killed by its pool. Ended by
# worker, as the main process does not know the attempt.
_FAIL_HELD = """
UPDATE durable.workflow_runs
   SET status = 'failed', error = %(error)s, reason = %(reason)s, completed_at = now(),
       attempt = attempt + 1, rung = false, child_pid = NULL, tail = true, available_at = now()
 WHERE id = %(id)s AND status = 'running' AND worker_id = %(worker)s
RETURNING pg_notify('durable', namespace_id)
"""


def fail_held(conn: Connection, run_id: str, worker: str, error: str, reason: str) -> bool:
    """Fail a run that ``worker`` holds, from outside its child."""
    params = {"id": run_id, "worker": worker, "error": error, "reason": reason}
    return conn.execute(_FAIL_HELD, params).rowcount == 1


# Only while the run is in this claim's hands or its outcome is unchanged: a
# restart meanwhile owes a new continuation.
_TAIL_DONE = """
UPDATE durable.workflow_runs
   SET available_at = 'infinity'
 WHERE id = %(id)s AND attempt = %(attempt)s AND status IN ('succeeded', 'failed', 'canceled')
"""


def tail_done(conn: Connection, run_id: str, attempt: int) -> None:
    """Note that Celery has delivered what follows the end of the run."""
    conn.execute(_TAIL_DONE, {"id": run_id, "attempt": attempt})


# The publish failed, or a message was lost for sure: the dispatcher is to
# ring. Not if a worker has it by now.
_UNRING = """
UPDATE durable.workflow_runs
   SET rung = false, available_at = now() + make_interval(secs => %(delay)s)
 WHERE id = ANY(%(ids)s::uuid[]) AND rung
RETURNING CASE WHEN %(delay)s < 1 THEN pg_notify('durable', namespace_id) END
"""


def unring(conn: Connection, run_ids: Sequence[str], delay: float = 0.0) -> None:
    """Have the dispatcher ring these runs (again) in ``delay`` seconds."""
    conn.execute(_UNRING, {"ids": list(run_ids), "delay": delay})


_SET_PROGRESS = """
UPDATE durable.workflow_runs SET progress = %(progress)s
 WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'running'
"""


def set_progress(conn: Connection, run_id: str, attempt: int, progress: str) -> bool:
    """Store what `durable.set_progress` and ``update_state`` report."""
    params = {"id": run_id, "attempt": attempt, "progress": progress}
    return conn.execute(_SET_PROGRESS, params).rowcount == 1


_STATE = "SELECT attempt, status FROM durable.workflow_runs WHERE id = %(id)s"


def _state(conn: Connection, run_id: str) -> tuple[int, str] | None:
    row: tuple[int, str] | None = conn.execute(_STATE, {"id": run_id}).fetchone()
    return row
