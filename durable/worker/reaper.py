"""Who is dead: workers whose beat counter stood still for a lease."""

from __future__ import annotations

from collections.abc import Sequence

from durable.store.workers import Peer


class Reaper:
    """Judges by its own monotonic clock, over an unbroken row of looks.

    Clocks of other hosts do not matter, nor does the database's. After a gap,
    when the database was away or this process was stopped, every count starts
    anew: the others could not beat either.

    Args:
        lease: seconds without a beat after which a worker is dead.
        own_id: the worker that looks; it never buries itself.

    Example:
        >>> reaper = Reaper(lease=10.0, own_id="me")
        >>> peer = Peer("other", 7, [], [], 0)
        >>> [reaper.dead([peer], at) for at in (0.0, 4.0, 8.0)]
        [[], [], []]
        >>> [each.id for each in reaper.dead([peer], 10.5)]
        ['other']
        >>> reaper.dead([peer], 100.0)  # after a gap
        []
    """

    def __init__(self, lease: float, own_id: str) -> None:
        self._lease = lease
        self._own_id = own_id
        self._seen: dict[str, tuple[int, float]] = {}
        self._looked_at: float | None = None

    def dead(self, peers: Sequence[Peer], now: float) -> list[Peer]:
        """Look at the workers of the namespace at ``now``; return the dead ones."""
        if self._looked_at is None or now - self._looked_at > self._lease / 2:
            self._seen.clear()
        self._looked_at = now
        before, self._seen = self._seen, {}
        dead = []
        for peer in peers:
            if peer.id == self._own_id:
                continue
            beat, since = before.get(peer.id, (None, now))
            if beat != peer.beat:
                since = now
            self._seen[peer.id] = (peer.beat, since)
            if now - since >= self._lease:
                dead.append(peer)
        return dead
