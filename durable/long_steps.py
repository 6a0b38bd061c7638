"""``durable.heartbeat``: how a long step reports, and learns that it is to stop."""

from __future__ import annotations

from typing import Any

from durable.context import active


def heartbeat(details: Any = None) -> None:
    """Report how far the running step is, for the attempt that may come after it.

    Call it every few seconds in a step that takes minutes. If the worker dies,
    the step runs again from its beginning, and `heartbeat_details` tells it
    what was reported last: it goes on from there. It is also where the step
    learns that it need not go on: it is left, without a result, if the run
    was canceled or paused, or is another worker's by now. A paused run comes
    back to the step when it is resumed.

    One statement and one commit. Steps that do not call it cost nothing more.
    What is unwound is unwound as by an exception: ``finally`` blocks run.

    Args:
        details: anything the codec can store; None leaves what was reported.

    Raises:
        NotInWorkflow: outside a step of a run.
        PayloadError: the details cannot be stored.

    Example:
        >>> @step
        ... def load(rows: list[str]) -> int:
        ...     begin = durable.heartbeat_details() or 0
        ...     for number in range(begin, len(rows)):
        ...         ...  # write rows[number]
        ...         durable.heartbeat(number + 1)
        ...     return len(rows)
        >>> @workflow
        ... def load_all(rows: list[str]) -> int:
        ...     return load(rows)
        >>> load_all.delay(["a", "b", "c"]).get(timeout=30)
        3
    """
    active("heartbeat").heartbeat(details)


def heartbeat_details() -> Any:
    """Return what the step has reported last by `heartbeat` before this attempt; else None.

    The earlier attempt was cut off by a crash, a pause or a lost lease, or it has failed.

    Raises:
        NotInWorkflow: outside a step of a run.

    Example:
        >>> @step(retry_backoff=0.1)
        ... def count(limit: int) -> int:
        ...     number = durable.heartbeat_details() or 0
        ...     durable.heartbeat(number + 1)
        ...     if number + 1 < limit:
        ...         raise durable.TransientError("not yet")
        ...     return number + 1
        >>> @workflow
        ... def counting(limit: int) -> int:
        ...     return count(limit)
        >>> counting(3)
        3
    """
    return active("heartbeat_details").heartbeat_details()
