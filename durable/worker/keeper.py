"""Puts a worker's duties together: heartbeat, reaper, children, dispatcher."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

from celery.utils.log import get_logger
from celery.worker import state

from durable.errors import DeadlineExceeded, RunLost, StoreError
from durable.failures import encode_failure
from durable.store.dispatch import Code
from durable.store.errors import translated
from durable.store.outcomes import Outcome
from durable.store.workers import Beat, Recovery
from durable.task import Workflow
from durable.worker.children import Children, processes_of, refill
from durable.worker.dispatcher import Dispatcher
from durable.worker.heartbeat import Heartbeat
from durable.worker.own_queue import OwnQueue

if TYPE_CHECKING:
    from durable.app import Durable

logger = get_logger(__name__)

_CHILD_INTERVAL = 0.2


def new_worker_id(hostname: str) -> str:
    """Name an incarnation: a restarted worker is another one, and its old runs are dead."""
    return f"{hostname}#{secrets.token_hex(4)}"


class Keeper:
    """What a worker runs beside its pool.

    Args:
        durable: settings and store.
        worker: Celery's ``WorkController``.
    """

    def __init__(self, durable: Durable, worker: Any) -> None:
        self._durable = durable
        self._worker = worker
        self._idle_beats = 0
        own = {name: task for name, task in durable.app.tasks.items() if isinstance(task, Workflow)}
        self._code = Code(
            sorted(own),
            sorted(f"{name}@{each}" for name, task in own.items() for each in task.runs_versions()),
        )
        settings, database = durable.settings, durable.database
        recovery = Recovery(settings.max_recoveries, self._stored(_lost(settings.max_recoveries)))
        self.heartbeat = Heartbeat(
            database,
            durable.lease,
            interval=settings.heartbeat_interval,
            lease_seconds=settings.lease,
            report=self._report,
            active=_requested,
            recovery=recovery,
            monotonic=durable.clock.monotonic,
        )
        self.children = Children(
            database,
            durable.worker_id,
            interval=_CHILD_INTERVAL,
            processes=lambda: processes_of(worker),
            refill=lambda: refill(worker),
            accepted=_handed_to,
            recovery=recovery,
        )
        self.dispatcher = Dispatcher(
            database,
            durable.starter,
            namespace=settings.namespace,
            interval=settings.poll_interval,
            listen=settings.listen,
            batch=settings.dispatch_batch,
            ring_again=settings.ring_interval,
            directory=lambda: self.heartbeat.peers,
            own=self._code,
            own_id=durable.worker_id,
            own_queue=OwnQueue(durable.app, worker, settings.publish_timeout),
            direct=settings.accept_only,
            late_error=self._stored(DeadlineExceeded("the run did not end before its deadline")),
        )

    def start(self) -> None:
        """Beat once, so that the lease is held before a message comes; then start all duties."""
        try:
            with translated():
                self.heartbeat.tick()
        except StoreError as exc:
            logger.warning("no first beat: %s", exc)
            self.heartbeat.recover()
        self.heartbeat.start()
        self.children.start()
        self.dispatcher.start()

    def stop_dispatching(self) -> None:
        """Ring nothing more: a warm shutdown has begun."""
        self.dispatcher.stop()

    def leave(self) -> None:
        """End everything after the pool has drained, and sign off."""
        self.dispatcher.stop()
        self.children.leave()
        self.heartbeat.leave()

    def process_lost(self, run_id: str, pid: int | None) -> None:
        """A process died with this run."""
        self.children.process_lost(run_id, pid)

    def time_limit(self, run_id: str, seconds: float) -> None:
        """The run met its hard time limit."""
        from celery.exceptions import TimeLimitExceeded

        self.children.time_limit(run_id, self._stored(TimeLimitExceeded(seconds)))

    def tell(self, outcome: Outcome) -> None:
        """A plain task that a run waits for has ended without its process telling."""
        self.children.tell(outcome)

    def _report(self) -> Beat:
        worker, durable = self._worker, self._durable
        concurrency = _concurrency(worker)
        free = max(0, concurrency - len(_requests()))
        self._idle_beats = self._idle_beats + 1 if free else 0
        return Beat(
            id=durable.worker_id,
            namespace=durable.settings.namespace,
            hostname=worker.hostname,
            pid=os.getpid(),
            pool=type(worker.pool).__module__.rpartition(".")[2],
            concurrency=concurrency,
            queues=sorted(durable.app.amqp.queues.consume_from),
            workflows=self._code.names,
            free_slots=free,
            idle_beats=self._idle_beats,
            versions=self._code.versions,
        )

    def _stored(self, exc: Exception) -> str:
        durable = self._durable
        return encode_failure(
            exc, durable.codec, trusted_packages=durable.services.trusted_packages
        )


def _lost(most: int) -> RunLost:
    return RunLost(
        f"the run took its worker down {most} times without completing a step in between"
        " (durable_max_recoveries): look for a crash, an out-of-memory kill or a too short"
        " terminationGracePeriod in the step after the last recorded one"
    )


def _concurrency(worker: Any) -> int:
    name = type(worker.pool).__module__
    return (
        1 if name.endswith(".solo") else int(getattr(worker.pool, "limit", 0) or worker.concurrency)
    )


def _requests() -> set[Any]:
    """Copy Celery's sets of requests, which other threads change.

    Both: when the broker's connection is lost, Celery forgets what it had
    reserved, also (up to 5.5) what is being executed.
    """
    while True:
        try:
            return {*state.reserved_requests, *state.active_requests}
        except RuntimeError:
            continue


def _requested() -> set[str]:
    return {request.id for request in _requests()}


def _handed_to(pid: int) -> list[str]:
    return [
        request.id
        for request in _requests()
        if request.worker_pid == pid and isinstance(request.task, Workflow)
    ]
