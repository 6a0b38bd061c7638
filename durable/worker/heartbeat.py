"""The heartbeat: keeps this worker's lease, and sees who has lost theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from celery.utils.log import get_logger

from durable.store import code, workers
from durable.worker.duty import Duty
from durable.worker.reaper import Reaper

if TYPE_CHECKING:
    from durable.lease import Lease
    from durable.store.connections import Connection
    from durable.store.pool import Database
    from durable.store.workers import Beat, Peer, Pulse, Recovery

logger = get_logger(__name__)


class Heartbeat(Duty):
    """Beats on a thread and a connection of its own.

    Neither a blocked broker nor a busy pool can keep it from beating. Each
    beat is one statement; its answer shows the peers, dead ones too, and the
    runs that Postgres says this worker holds.

    Args:
        report: gives what to write with the next beat.
        active: gives the ids of the runs that this worker's requests stand for.
        recovery: what to write on runs that are taken over.
    """

    def __init__(
        self,
        database: Database,
        lease: Lease,
        *,
        interval: float,
        lease_seconds: float,
        report: Callable[[], Beat],
        active: Callable[[], set[str]],
        recovery: Recovery,
        monotonic: Callable[[], float],
    ) -> None:
        super().__init__("durable-heartbeat", interval)
        self._database = database
        self._lease = lease
        self._lease_seconds = lease_seconds
        self._report = report
        self._active = active
        self._recovery = recovery
        self._monotonic = monotonic
        self._reaper: Reaper | None = None
        self._conn: Connection | None = None
        self._swept_at = monotonic()
        self._suspects: Mapping[str, int] = {}
        self.peers: list[Peer] = []

    def tick(self) -> None:
        """Beat once and act on the answer."""
        if self._conn is None:
            self._conn = self._database.connect()
        report = self._report()
        asked_at = self._monotonic()
        pulse = workers.beat(self._conn, report)
        self._lease.renew(asked_at)
        self.peers = list(pulse.peers)
        self._release_orphans(self._conn, report.id, pulse)
        self._bury_dead(self._conn, report, asked_at)
        self._sweep(self._conn, report, asked_at)

    def leave(self) -> None:
        """Sign off."""
        self.stop()
        if self._conn is not None and not self._conn.closed:
            workers.leave(self._conn, self._report().id)
            self._conn.close()

    def recover(self) -> None:
        """Beat on a new connection next time."""
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()

    def _release_orphans(self, conn: Connection, own_id: str, pulse: Pulse) -> None:
        # The requests are looked at after the answer: one that has ended in
        # between only makes its run look like an orphan, and the attempt in
        # the statement tells. The other way round a fresh claim would.
        # Seen twice, since a request that Celery forgot with a broken broker
        # connection may be on its way to a child, which is about to claim.
        active = self._active()
        unknown = {run: attempt for run, attempt in pulse.held.items() if run not in active}
        orphans = dict(unknown.items() & self._suspects.items())
        self._suspects = unknown
        if orphans:
            released = workers.release_orphans(conn, own_id, orphans, self._recovery)
            logger.warning("released runs that no request stands for: %s", released)

    def _bury_dead(self, conn: Connection, report: Beat, now: float) -> None:
        if self._reaper is None:
            self._reaper = Reaper(self._lease_seconds, report.id)
        for peer in self._reaper.dead(self.peers, now):
            taken = workers.bury(conn, peer, report.namespace, self._recovery)
            if taken is not None:
                logger.warning("worker %s is dead; its %d runs go on", peer.id, len(taken))

    def _sweep(self, conn: Connection, report: Beat, now: float) -> None:
        if now - self._swept_at < self._lease_seconds:
            return
        self._swept_at = now
        released = workers.release_unknown(
            conn, report.namespace, self._lease_seconds, self._recovery
        )
        if released:
            logger.warning("released runs of unknown workers: %s", released)
        lacking = Counter(code.tell_lacking(conn, report.namespace).values())
        for reason, runs in lacking.items():
            logger.warning("%d runs wait: %s", runs, reason)
