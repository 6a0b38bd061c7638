"""The one place that reads clocks and rolls dice; everything else is given a `Clock`."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


def _uuid() -> str:
    return str(uuid.uuid4())


@dataclass(frozen=True, slots=True)
class Clock:
    """Time and chance, replaceable in tests.

    Attributes:
        monotonic: seconds, the same scale in all processes of a host.
        now: aware UTC datetime. Only for what a user passes as a date: what
            is due and what is late is judged by the database's clock.
        sleep: pauses for some seconds.
        random: a float in ``[0, 1)``.
        uuid: a fresh random id, as text.
    """

    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = _utc_now
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random
    uuid: Callable[[], str] = _uuid


SYSTEM = Clock()
