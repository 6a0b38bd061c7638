"""Waiting for a condition, the only way in which a test passes time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 0.01


def wait_for(condition: Callable[[], T], *, timeout: float = 10.0, what: str = "") -> T:
    """Call ``condition`` every 10 ms until it is true, and return what it returned.

    Args:
        condition: any callable; an exception that it raises is the test's own.
        timeout: seconds until the test fails.
        what: what was awaited, for the message; the name of ``condition`` otherwise.

    Raises:
        AssertionError: it did not come true in time.
    """
    started = time.monotonic()
    while not (value := condition()):
        if time.monotonic() - started > timeout:
            awaited = what or getattr(condition, "__qualname__", repr(condition))
            message = f"waited {timeout:g} s for: {awaited} (last answer: {value!r})"
            raise AssertionError(message)
        time.sleep(INTERVAL)
    return value
