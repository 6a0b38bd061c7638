"""The dispatcher: rings what has come due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from celery.exceptions import OperationalError
from celery.utils.log import get_logger

from durable.store import dispatch, outbox, runs
from durable.store.cascade import cascade
from durable.store.dispatch import Code
from durable.store.errors import is_disconnect
from durable.worker.duty import Duty

if TYPE_CHECKING:
    from durable.start import Starter
    from durable.store.connections import Connection
    from durable.store.dispatch import Doorbell
    from durable.store.outbox import Sent
    from durable.store.pool import Database
    from durable.store.workers import Peer
    from durable.worker.own_queue import OwnQueue

logger = get_logger(__name__)

#: Beats in a row with a free slot before a worker counts as idle: between two
#: tasks a busy one may look free for a moment.
_IDLE_BEATS = 2
#: Pause between two looks without LISTEN, at most.
_BLIND_INTERVAL = 1.0
#: Before a run whose message the broker did not take is tried again.
_BROKER_REST = 2.0
_LEAST_PAUSE = 0.01
#: How long a shutdown may have to wait for a dispatcher that listens.
_STOP_LATENCY = 0.25


class Dispatcher(Duty):
    """Takes due runs by one statement and publishes their messages.

    Sleeps until the next timer that it knows, at most ``interval``, and is
    woken by NOTIFY for what may come sooner. All workers run one; SKIP LOCKED
    shares the work out.

    Args:
        directory: gives the live workers.
        own: workflows and versions that this worker has registered.
        own_id: of this worker, to find it in the directory.
        own_queue: for runs that have to come to this worker.
        direct: whether all that this worker rings has to.
        late_error: stored failure, JSON text, of a run that missed its deadline.
    """

    def __init__(
        self,
        database: Database,
        starter: Starter,
        *,
        namespace: str,
        interval: float,
        listen: bool,
        batch: int,
        ring_again: float,
        directory: Callable[[], Sequence[Peer]],
        own: Code,
        own_id: str,
        own_queue: OwnQueue,
        direct: bool,
        late_error: str,
    ) -> None:
        super().__init__(
            "durable-dispatcher", interval if listen else min(interval, _BLIND_INTERVAL)
        )
        self._database = database
        self._starter = starter
        self._namespace = namespace
        self._listen = listen
        self._batch = batch
        self._ring_again = ring_again
        self._directory = directory
        self._own = own
        self._own_id = own_id
        self._own_queue = own_queue
        self._direct = direct
        self._late_error = late_error
        self._conn: Connection | None = None
        self._next_in: float | None = None

    def tick(self) -> None:
        """Ring everything that is due, deliver the outbox, cancel what canceled runs take along."""
        if self._conn is None:
            self._conn = self._database.connect()
            if self._listen:
                self._conn.execute(f"LISTEN {runs.CHANNEL}")
            # First: an event of the time without a worker is to be there when its run is rung.
            while self._deliver():
                pass
        more = True
        while more and not self.stopping:
            peers = self._directory()
            idle = [peer for peer in peers if peer.idle_beats >= _IDLE_BEATS]
            due = dispatch.due(
                self._conn,
                self._namespace,
                names=sorted({*self._own.names, *(n for p in peers for n in p.workflows)}),
                versions=sorted({*self._own.versions, *(v for p in peers for v in p.versions)}),
                idle_queues=sorted({q for p in idle for q in p.queues}),
                own=self._own,
                own_idle=self._own_id in {p.id for p in idle},
                direct=self._direct,
                batch=self._batch,
                ring_again=self._ring_again,
                late_error=self._late_error,
            )
            self._ring(due.doorbells)
            if due.cascades:
                cascade(self._conn, due.cascades)
            more, self._next_in = due.more, due.next_in
            if due.outbox:
                more = self._deliver() or more  # it has woken runs

    def pause(self) -> None:
        """Sleep until a timer, a notification or the end of the interval."""
        pause = self.interval
        if self._next_in is not None:
            pause = min(pause, max(self._next_in, _LEAST_PAUSE))
        if not self._listen or self._conn is None:
            self._stopping.wait(pause)
            return
        try:
            while pause > 0 and not self.stopping:
                for note in self._conn.notifies(timeout=min(pause, _STOP_LATENCY), stop_after=1):
                    logger.debug("woken for namespace %s", note.payload)
                    return
                pause -= _STOP_LATENCY
        except Exception:  # noqa: BLE001 - the next tick makes a new connection
            self.recover()

    def recover(self) -> None:
        """Look with a new connection next time."""
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()

    def _routed(self, doorbell: Doorbell) -> Doorbell:
        if doorbell.message is not None or self._conn is None:
            return doorbell
        return self._starter.routed(self._conn, doorbell)

    def _deliver(self) -> bool:
        """Deliver what is in the outbox, a batch at most; whether something was.

        What cannot be delivered stays, and keeps nothing behind it waiting.
        """
        assert self._conn is not None
        delivered, after = False, 0
        while not (delivered or self.stopping):
            found = outbox.pending(self._conn, self._namespace, after=after, most=self._batch)
            for sent in found:
                delivered = self._deliver_one(self._conn, sent) or delivered
                after = sent.seq
            if len(found) < self._batch:
                break
        return delivered

    def _deliver_one(self, conn: Connection, sent: Sent) -> bool:
        try:
            outbox.deliver(conn, sent, self._namespace)
        except Exception as exc:
            if is_disconnect(exc):
                raise
            logger.warning("%s for run %s is not delivered: %r", sent.kind, sent.run_id, exc)
            return False
        return True

    def _may_ring_all(self) -> bool:
        """Tell whether a run that is for this worker may go to any worker of its queue.

        Only where all know what to do with it. Not while this worker is starting.
        """
        return self._own_queue.refused and not self._direct

    def _ring(self, doorbells: Sequence[Doorbell]) -> None:
        unrung: list[str] = []
        away = False
        for doorbell in doorbells:
            if away:  # do not let each one wait for the broker
                unrung.append(doorbell.id)
                continue
            try:
                queue = self._own_queue.open() if doorbell.direct else None
                if doorbell.direct and queue is None and not self._may_ring_all():
                    unrung.append(doorbell.id)
                    continue
                self._starter.ring(self._routed(doorbell), queue)
            except Exception as exc:  # noqa: BLE001 - transports raise what they like
                logger.warning("run %s could not be rung: %r", doorbell.id, exc)
                unrung.append(doorbell.id)
                # Anything else is about this one message, such as a queue that
                # nobody knows: it must not keep those behind it waiting.
                away = isinstance(exc, (OperationalError, OSError))
        if unrung and self._conn is not None:
            runs.unring(self._conn, unrung, delay=_BROKER_REST)
