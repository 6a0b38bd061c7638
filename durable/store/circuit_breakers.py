"""Queries on ``circuit_breakers``: what all workers together know of a service's health.

Every change of state raises ``generation``, and what a call reports names the
generation that let it through. So an answer that comes late (of a call from
before the breaker opened, of a probe that was replaced) changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from durable.store.connections import Connection


@dataclass(frozen=True, slots=True)
class Key:
    """Which breaker."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a call may go ahead.

    Attributes:
        generation: to be named when its outcome is reported; None: it may not.
        notable: whether a success has to be reported too.
        probe: whether it is the one call that tells if the service is back.
        due_in: seconds until a call that is refused now may be the next probe.
    """

    generation: int | None
    notable: bool = False
    probe: bool = False
    due_in: float = 0.0


_LOOK = """
SELECT state, failures, generation, extract(epoch FROM next_probe_at - now())::float8
  FROM durable.circuit_breakers
 WHERE namespace_id = %(namespace)s AND name = %(name)s
"""

# The first call of a breaker's life. ON CONFLICT: two workers make it at once.
_CREATE = """
INSERT INTO durable.circuit_breakers (namespace_id, name)
VALUES (%(namespace)s, %(name)s)
ON CONFLICT DO NOTHING
"""

# Of two calls that both found a probe due, the second waits here for the row of
# the first, and then sees a `next_probe_at` that is to come. That time is also
# when a probe whose worker has died is replaced.
_PROBE = """
UPDATE durable.circuit_breakers
   SET state = 'half_open', generation = generation + 1,
       next_probe_at = now() + make_interval(secs => %(reset_timeout)s)
 WHERE namespace_id = %(namespace)s AND name = %(name)s
   AND state <> 'closed' AND next_probe_at <= now()
RETURNING generation
"""


def admit(conn: Connection, key: Key, reset_timeout: float) -> Admission:
    """Let a call through, or not. One round trip while the breaker is closed.

    Safe to repeat after a lost answer: a probe that nobody makes is replaced
    after ``reset_timeout`` seconds.
    """
    params = {"namespace": key.namespace, "name": key.name, "reset_timeout": reset_timeout}
    row = conn.execute(_LOOK, params).fetchone()
    if row is None:
        conn.execute(_CREATE, params)
        return Admission(0)
    state, failures, generation, due_in = row
    if state == "closed":
        return Admission(generation, notable=failures > 0)
    if due_in > 0:
        return Admission(None, due_in=due_in)
    taken = conn.execute(_PROBE, params).fetchone()
    if taken is None:  # by another call, just now
        return Admission(None, due_in=reset_timeout)
    return Admission(taken[0], notable=True, probe=True)


# Counted by the server, on the row as it is: two failures at once are two. The
# generation says that the call was let through by the state it reports to, so
# the state is 'closed' or, for the probe, 'half_open'.
_OPENS = "(state = 'half_open' OR failures + 1 >= %(threshold)s)"

_FAILED = f"""
UPDATE durable.circuit_breakers
   SET failures = failures + 1,
       state = CASE WHEN {_OPENS} THEN 'open' ELSE state END,
       generation = CASE WHEN {_OPENS} THEN generation + 1 ELSE generation END,
       opened_at = CASE WHEN {_OPENS} THEN coalesce(opened_at, now()) END,
       next_probe_at = CASE WHEN {_OPENS} THEN now() + make_interval(secs => %(reset_timeout)s) END
 WHERE namespace_id = %(namespace)s AND name = %(name)s AND generation = %(generation)s
RETURNING failures, state
"""


def failed(
    conn: Connection, key: Key, generation: int, *, threshold: int, reset_timeout: float
) -> int | None:
    """Count a failure; how many there were, if it opens the breaker.

    Repeated after a lost answer it may count twice, which opens the breaker a
    call too early at worst.
    """
    params = {
        "namespace": key.namespace,
        "name": key.name,
        "generation": generation,
        "threshold": threshold,
        "reset_timeout": reset_timeout,
    }
    row = conn.execute(_FAILED, params).fetchone()
    return row[0] if row is not None and row[1] == "open" else None


_SUCCEEDED = """
UPDATE durable.circuit_breakers
   SET generation = CASE WHEN state = 'closed' THEN generation ELSE generation + 1 END,
       state = 'closed', failures = 0, opened_at = NULL, next_probe_at = NULL
 WHERE namespace_id = %(namespace)s AND name = %(name)s AND generation = %(generation)s
"""


def succeeded(conn: Connection, key: Key, generation: int) -> bool:
    """Forget the failures, and close the breaker if this was its probe. False: it came too late."""
    params = {"namespace": key.namespace, "name": key.name, "generation": generation}
    return conn.execute(_SUCCEEDED, params).rowcount > 0


_GIVE_BACK = """
UPDATE durable.circuit_breakers
   SET state = 'open', generation = generation + 1, next_probe_at = now()
 WHERE namespace_id = %(namespace)s AND name = %(name)s AND generation = %(generation)s
   AND state = 'half_open'
"""


def give_back(conn: Connection, key: Key, generation: int) -> None:
    """Let the next call be the probe: this one ended without having learnt anything."""
    params = {"namespace": key.namespace, "name": key.name, "generation": generation}
    conn.execute(_GIVE_BACK, params)


_RESET = """
UPDATE durable.circuit_breakers
   SET state = 'closed', generation = generation + 1,
       failures = 0, opened_at = NULL, next_probe_at = NULL
 WHERE namespace_id = %(namespace)s AND name = %(name)s
"""


def reset(conn: Connection, key: Key) -> None:
    """Close a breaker by hand."""
    conn.execute(_RESET, {"namespace": key.namespace, "name": key.name})


_STATE = """
SELECT state FROM durable.circuit_breakers
 WHERE namespace_id = %(namespace)s AND name = %(name)s
"""


def state(conn: Connection, key: Key) -> str:
    """Tell the state: ``closed``, ``open`` or ``half_open``."""
    row = conn.execute(_STATE, {"namespace": key.namespace, "name": key.name}).fetchone()
    return "closed" if row is None else str(row[0])
