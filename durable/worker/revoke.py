"""``revoke`` of a run is its cancellation, wherever it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.platforms import signals as _signals
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from celery.worker.control import Panel

from durable.errors import StoreError
from durable.store import queries

if TYPE_CHECKING:
    from durable.app import Durable

logger = get_logger(__name__)


def install(durable: Durable) -> None:
    """Put a `revoke` that knows runs in front of Celery's, in this worker."""
    celery_revoke = Panel.data["revoke"]

    def revoke(
        state: Any, task_id: Any, terminate: bool = False, signal: str | None = None, **kwargs: Any
    ) -> Any:
        """Revoke task by task id (or list of ids); of a run: cancel it."""
        given = task_id if isinstance(task_id, (list, tuple, set)) else [task_id]
        ids = {str(each) for each in given if each}
        found = _cancel(durable, ids)
        for run_id in found:
            worker_state.revoked.discard(run_id)
        if terminate:
            _kill(state, found, signal)
        rest = ids - found
        if rest:
            return celery_revoke(state, list(rest), terminate=terminate, signal=signal, **kwargs)
        return {"ok": f"runs {sorted(found)} canceled"}

    def terminate(state: Any, signal: str, task_id: Any, **_: Any) -> Any:
        """Terminate task by task id (or list of ids)."""
        return revoke(state, task_id, terminate=True, signal=signal)

    Panel.data["revoke"] = revoke
    Panel.data["terminate"] = terminate


def _cancel(durable: Durable, ids: set[str]) -> set[str]:
    """Cancel those that are runs; return which are."""
    possible = [each for each in ids if queries.is_run_id(each)]
    namespace = durable.settings.namespace
    try:
        durable.control.cancel_unfinished(possible, "revoked")
        return durable.database.call(queries.known, possible, namespace)
    except StoreError as exc:
        logger.warning("revoke could not reach the runs: %s", exc)
        return set()


def _kill(state: Any, ids: set[str], signal: str | None) -> None:
    """Kill the processes that execute these runs; their release then ends them."""
    signum = _signals.signum(signal or "TERM")
    for request in list(worker_state.active_requests):
        if request.id in ids and request.worker_pid:
            try:
                state.consumer.pool.terminate_job(request.worker_pid, signum)
            except NotImplementedError:
                logger.warning(
                    "this pool cannot terminate run %s; it ends at its next step", request.id
                )
