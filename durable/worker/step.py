"""The bootstep: how the worker's own part gets into a Celery worker."""

from __future__ import annotations

from typing import Any

from celery import bootsteps, signals
from celery.utils.log import get_logger

from durable.errors import DatabaseUnavailable, DurableError, StoreError
from durable.worker import revoke
from durable.worker.keeper import Keeper, new_worker_id

logger = get_logger(__name__)


class DurableStep(bootsteps.StartStopStep):
    """On the *worker* blueprint, so that a broker reconnect does not restart it.

    Everything that children have to inherit is made in the constructor, which
    runs before any pool forks.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self.durable = parent.app.durable
        try:
            self.durable.settings.require_database_url()
        except DurableError as exc:
            raise _refusal(exc) from None
        self.durable.worker_id = new_worker_id(parent.hostname)
        self.durable.lease.reset()  # made here, before the pool forks
        self.keeper: Keeper | None = None
        revoke.install(self.durable)
        signals.worker_shutting_down.connect(self._on_shutting_down, weak=False)
        signals.worker_shutdown.connect(self._on_shutdown, weak=False)

    def start(self, parent: Any) -> None:
        """Start the duties, once the pool is there."""
        try:
            self.durable.database.connect().close()
        except DatabaseUnavailable as exc:
            logger.warning("%s. Nothing durable runs until it is there", exc)
        except StoreError as exc:
            raise _refusal(exc) from None
        self.keeper = self.durable.keeper = Keeper(self.durable, parent)
        self.keeper.start()

    def stop(self, parent: Any) -> None:
        """Ring nothing more; beats go on until the pool has drained.

        A shutdown by remote control sends no ``worker_shutting_down``.
        """
        self.durable.lease.begin_shutdown()
        if self.keeper is not None:
            self.keeper.stop_dispatching()

    def terminate(self, parent: Any) -> None:
        """As `stop`: a cold shutdown ends the threads with the process."""
        self.stop(parent)

    def _on_shutting_down(self, **_: Any) -> None:
        self.durable.lease.begin_shutdown()

    def _on_shutdown(self, **_: Any) -> None:
        if self.keeper is not None:
            self.keeper.leave()


def _refusal(exc: DurableError) -> SystemExit:
    """End the worker with one line: a setting or a right has to be mended first."""
    return SystemExit(f"celery-durable: {exc}")
