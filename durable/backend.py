"""Celery's result backend as a run sees it: it is told only what the run's row says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import states
from celery.utils.log import get_logger

if TYPE_CHECKING:
    from celery.app.task import Context

logger = get_logger(__name__)

_FAILED = frozenset({states.FAILURE, states.REJECTED})


class ConfirmedBackend:
    """Stands before the backend while Celery traces a workflow.

    Whatever goes wrong in the tracer is to Celery a failure of the task, such
    as a backend that does not take STARTED or a broker that does not take the
    next member of a chain. It then stores FAILURE, fires the errbacks and
    fails chain and chord, of a run that goes on or has succeeded (seen).

    Each request that has come to an outcome carries it as ``durable_outcome``,
    the Celery state that its row says. The tracer still asks after it has
    popped the request, hence the one that is handed over counts.

    Args:
        backend: the real one.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def mark_as_started(self, task_id: str, request: Context, **meta: Any) -> None:
        """Tell that the run has been claimed; a backend that is away is no matter."""
        try:
            self._backend.store_result(task_id, meta, states.STARTED, request=request)
        except Exception:
            logger.warning(
                "run %s: the result backend did not take STARTED", task_id, exc_info=True
            )

    def mark_as_retry(self, task_id: str, *args: Any, **kwargs: Any) -> None:
        """Tell that the run is parked; likewise."""
        try:
            self._backend.mark_as_retry(task_id, *args, **kwargs)
        except Exception:
            logger.warning("run %s: the result backend did not take RETRY", task_id, exc_info=True)

    def mark_as_done(self, task_id: str, result: Any, request: Any, *args: Any, **kw: Any) -> None:
        """Store the result; that this came to its end is what confirms the delivery."""
        self._backend.mark_as_done(task_id, result, request, *args, **kw)
        request.durable_done = True

    def mark_as_failure(
        self, task_id: str, exc: BaseException, *args: Any, request: Any = None, **kwargs: Any
    ) -> None:
        """Store a failure if it is the run's; the run's next message tells what else it is."""
        if getattr(request, "durable_outcome", None) in _FAILED:
            self._backend.mark_as_failure(task_id, exc, *args, request=request, **kwargs)
            request.durable_done = True
        else:
            logger.warning("run %s has not failed, though Celery did: %r", task_id, exc)
