"""``timeout=`` of a step: interrupts its body where that can be done, else judges it afterwards."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType
from typing import Any

from durable.errors import StepTimeout


@contextmanager
def limited(seconds: float, name: str, monotonic: Callable[[], float]) -> Iterator[None]:
    """Raise `StepTimeout` in the block if it takes longer than ``seconds``.

    In the main thread of a process (the pools prefork and solo) by a timer
    signal, under gevent by its own timer, both in the middle of the body. A
    thread cannot be interrupted: there the block runs to its end and fails
    then. So it is where the body has a timer of its own running.

    Raises:
        StepTimeout: it took longer.

    Example:
        >>> import time
        >>> with limited(0.01, "slow", time.monotonic):
        ...     time.sleep(5)
        Traceback (most recent call last):
            ...
        durable.errors.StepTimeout: step 'slow' took longer than its timeout of 0.01 s
    """
    error = too_slow(seconds, name)
    if not isinstance(time.sleep, BuiltinFunctionType) and "gevent" in sys.modules:
        with _by_gevent(seconds, error):
            yield
    elif _has_timer():
        with _by_signal(seconds, error):
            yield
    else:
        started = monotonic()
        yield
        if monotonic() - started > seconds:
            raise error


def too_slow(seconds: float, name: str) -> StepTimeout:
    """Make the error of a step that took longer than its timeout."""
    return StepTimeout(f"step {name!r} took longer than its timeout of {seconds:g} s")


def _has_timer() -> bool:
    return (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    )


@contextmanager
def _by_signal(seconds: float, error: StepTimeout) -> Iterator[None]:
    running = True

    def on_alarm(*_: Any) -> None:
        if running:  # else it came while the timer was being stopped
            raise error

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _by_gevent(seconds: float, error: StepTimeout) -> Iterator[None]:
    import gevent

    with gevent.Timeout(seconds, error):
        yield
