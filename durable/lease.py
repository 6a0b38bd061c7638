"""The lease word: how a worker's children learn whether it still holds its runs."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

_WORD = struct.Struct("dd")


class Lease:
    """A few bytes of memory shared by a worker's main process and its children.

    The heartbeat thread of the main process renews it after each beat that
    Postgres confirmed; children look before every step, at the price of a
    memory read. It has to be made before the pool forks.

    Example:
        >>> now = 100.0
        >>> lease = Lease(duration=10.0, monotonic=lambda: now)
        >>> lease.held()
        False
        >>> lease.renew(100.0); lease.held()
        True
        >>> now = 110.5
        >>> lease.held()
        False
    """

    def __init__(self, duration: float, monotonic: Callable[[], float]) -> None:
        self._duration = duration
        self._monotonic = monotonic
        self._memory = mmap.mmap(-1, _WORD.size)
        self.reset()

    def reset(self) -> None:
        """A worker begins: nothing is held, and no shutdown has begun."""
        _WORD.pack_into(self._memory, 0, 0.0, 0.0)

    def renew(self, asked_at: float) -> None:
        """Extend the lease: a beat was asked for at ``asked_at`` and confirmed since.

        Counted from the asking. A peer sees the beat later than that, and
        waits for a whole lease from then on: it cannot be early.
        """
        struct.pack_into("d", self._memory, 0, asked_at + self._duration)

    def open(self) -> bool:
        """Tell whether another step may begin: the lease is held, and no shutdown has begun."""
        until, shutting_down = _WORD.unpack_from(self._memory, 0)
        return not shutting_down and self._monotonic() < until

    def held(self) -> bool:
        """Tell whether no peer can have taken over this worker's runs."""
        until: float = _WORD.unpack_from(self._memory, 0)[0]
        return self._monotonic() < until

    def begin_shutdown(self) -> None:
        """Tell the children to hand their runs back at the next step."""
        struct.pack_into("d", self._memory, 8, 1.0)

    @property
    def shutting_down(self) -> bool:
        """Whether a warm shutdown has begun."""
        return bool(_WORD.unpack_from(self._memory, 0)[1])
