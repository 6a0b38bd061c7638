"""Watches the pool's processes: what a dead child held goes on at once."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery.utils.log import get_logger

from durable.errors import StoreError
from durable.store import outcomes, runs, workers
from durable.worker.duty import Duty

if TYPE_CHECKING:
    from durable.store.connections import Connection
    from durable.store.outcomes import Outcome
    from durable.store.pool import Database
    from durable.store.workers import Recovery

logger = get_logger(__name__)


class Children(Duty):
    """Sees a child vanish from the pool, sooner than Celery tells of it, and releases its runs.

    Celery's own notice took 10 s on transports without an event loop. It is
    used too: it names the run whose child died before it had claimed it.

    Args:
        processes: gives the pool's process ids, and which of them live; empty
            where the pool has none.
        refill: has the pool replace its dead.
        accepted: gives the runs that a process had been handed.
    """

    def __init__(
        self,
        database: Database,
        worker_id: str,
        *,
        interval: float,
        processes: Callable[[], Mapping[int, bool]],
        refill: Callable[[], None],
        accepted: Callable[[int], list[str]],
        recovery: Recovery,
    ) -> None:
        super().__init__("durable-children", interval)
        self._database = database
        self._worker_id = worker_id
        self._processes = processes
        self._refill = refill
        self._accepted = accepted
        self._recovery = recovery
        self._known: set[int] = set()
        self._released: set[int] = set()
        self._jobs: queue.SimpleQueue[Callable[[Connection], object]] = queue.SimpleQueue()
        self._job: Callable[[Connection], object] | None = None

    def tick(self) -> None:
        """Look for vanished children; do what was asked for meanwhile."""
        processes = self._processes()
        living = {pid for pid, lives in processes.items() if lives}
        # A child that died before it was ever seen alive stands in the pool's
        # list still, as do those that were released here before.
        gone = (self._known | processes.keys()) - living - self._released
        for pid in gone:
            self._release(pid)
        self._known = living
        self._released = (self._released | gone) & processes.keys()
        if gone:
            self._refill()
        self._do_jobs()

    def leave(self) -> None:
        """Stop; what was asked for is done, if the database takes it."""
        self.stop()
        with suppress(StoreError):
            self._do_jobs()

    def _do_jobs(self) -> None:
        while self._job is not None or not self._jobs.empty():
            self._job = self._job or self._jobs.get()
            self._database.call(self._job)
            self._job = None  # kept until done: a database that is away comes back

    def process_lost(self, run_id: str, pid: int | None) -> None:
        """Celery says that a process died with this run."""
        if pid is not None:
            self._release(pid)
        self._jobs.put(lambda conn: runs.unring(conn, [run_id]))

    def time_limit(self, run_id: str, error: str) -> None:
        """The run's process is killed for its hard time limit: the run ends."""
        self._jobs.put(
            lambda conn: runs.fail_held(conn, run_id, self._worker_id, error, "time limit")
        )

    def tell(self, outcome: Outcome) -> None:
        """Celery has given up a plain task that a run waits for."""
        self._jobs.put(lambda conn: outcomes.deliver(conn, outcome))

    def _release(self, pid: int) -> None:
        handed = self._accepted(pid)

        def release(conn: Connection) -> None:
            released = workers.release_child(conn, self._worker_id, pid, self._recovery)
            unclaimed = [run for run in handed if run not in released]
            if unclaimed:
                runs.unring(conn, unclaimed)
            if released:
                logger.warning("child %d died; its runs go on: %s", pid, released)

        self._jobs.put(release)


def processes_of(worker: Any) -> dict[int, bool]:
    """List the processes of a prefork pool, and which of them live; other pools have none."""
    pool = getattr(getattr(worker, "pool", None), "_pool", None)
    processes = list(getattr(pool, "_pool", None) or ())
    pids = [pid for pid in (getattr(process, "pid", None) for process in processes) if pid]
    return {pid: not _has_exited(pid) for pid in pids}


def refill(worker: Any) -> None:
    """Have the pool replace its dead now: its event loop may look every five seconds only."""
    hub = getattr(worker, "hub", None)
    maintain = getattr(getattr(worker.pool, "_pool", None), "maintain_pool", None)
    if hub is not None and maintain is not None:
        hub.call_soon(maintain)


def _has_exited(pid: int) -> bool:
    """Look at a child without taking its exit status from the pool, which waits for it.

    The pool may take seconds to notice. Where the system has no ``waitid``
    its list is all there is to go by.
    """
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
