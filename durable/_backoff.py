"""How long to wait before the next attempt.

Full jitter (a pause anywhere up to the back-off) needs no memory of the pause
before, unlike decorrelated jitter, and spreads a herd best. Here it keeps a
floor: Celery's may come out as zero, which is no pause.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Pause before a quick try: botocore's base, doubled each time.
QUICK_PAUSE = 0.05
QUICK_PAUSE_MAX = 1.0
#: Pause where no back-off is wanted.
NO_BACKOFF = 0.1
#: Least part of a pause that jitter leaves.
FLOOR = 0.1
#: How much longer than asked for to wait at most.
HINT_SPREAD = 0.1
HINT_SPREAD_MAX = 600.0
#: Further doublings change nothing but would overflow.
MAX_DOUBLINGS = 60


def exponential(first: float, times: int, most: float) -> float:
    """``first`` seconds doubled ``times`` times, at most ``most``.

    >>> [exponential(2.0, n, 600.0) for n in (0, 1, 2, 5000)]
    [2.0, 4.0, 8.0, 600.0]
    """
    doubled: float = first * 2.0 ** min(times, MAX_DOUBLINGS)
    return min(doubled or NO_BACKOFF, most)


def spread(most: float, random: Callable[[], float] | None) -> float:
    """Somewhere in (0, most]; without ``random``, ``most`` itself."""
    if random is None:
        return most
    least = most * FLOOR
    return min(least + (most - least) * random(), most)


def quick_pause(tries: int, random: Callable[[], float]) -> float:
    """Seconds before the next quick try, after so many of them."""
    return spread(exponential(QUICK_PAUSE, tries, QUICK_PAUSE_MAX), random)


def after_hint(
    pause: float, retry_after: float | None, random: Callable[[], float] | None
) -> float:
    """The longer of a pause and what the other side asked for.

    Every caller was asked for the same, so jitter goes on top of it.
    """
    if retry_after is None or retry_after <= pause:
        return pause
    if random is None:
        return retry_after
    return retry_after + spread(min(retry_after * HINT_SPREAD, HINT_SPREAD_MAX), random)
