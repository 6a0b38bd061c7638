"""Tells a run how the plain tasks have ended that its body has started.

A message of such a task carries the run's id in a header. Whichever worker
executes it writes the outcome into the run's history, so nobody has to poll
a result backend, or to have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import signals, states
from celery.utils.log import get_logger

from durable.errors import PayloadError, StoreError
from durable.failures import encode_failure
from durable.handles import WAITER
from durable.store import outcomes
from durable.store.outcomes import Outcome

if TYPE_CHECKING:
    from durable.app import Durable

logger = get_logger(__name__)

_STATUSES = {states.SUCCESS: "succeeded", states.FAILURE: "failed", states.REVOKED: "canceled"}


def install(durable: Durable) -> None:
    """Listen to the ends of tasks in this process."""

    def on_postrun(
        task: Any = None, state: str | None = None, retval: Any = None, **_: Any
    ) -> None:
        if task is not None and task.app is durable.app and state is not None:
            _tell(durable, task.name, task.request, state, retval)

    def on_revoked(sender: Any = None, request: Any = None, **_: Any) -> None:
        if sender is not None and request is not None and sender.app is durable.app:
            _tell(durable, sender.name, request, states.REVOKED, None)

    signals.task_postrun.connect(on_postrun, weak=False)
    signals.task_revoked.connect(on_revoked, weak=False)


def _tell(durable: Durable, name: str, request: Any, state: str, value: Any) -> None:
    waiter = _waiter(request)
    if waiter is None or state not in _STATUSES:
        return
    outcome = _outcome(durable, waiter, request.id, name, _STATUSES[state], value)
    try:
        durable.database.patiently(outcomes.deliver, outcome)
    except StoreError:
        logger.exception("run %s will not learn the outcome of %s[%s]", waiter, name, request.id)


def _waiter(request: Any) -> str | None:
    """Return the run that the message names. A run's own end is told by the database."""
    if getattr(request, "durable_claim", None) is not None:
        return None
    waiter: str | None = getattr(request, WAITER, None)
    return waiter


def _outcome(
    durable: Durable, waiter: str, task_id: str, name: str, status: str, value: Any
) -> Outcome:
    output = error = None
    try:
        if status == "succeeded":
            output = durable.codec.encode(value, f"the result of task {name!r}")
        elif status == "failed":
            error = _failure(durable, value)
    except PayloadError as exc:
        status, error = "failed", _failure(durable, exc)
    reason = "revoked" if status == "canceled" else None
    return Outcome(waiter, task_id, name, status, output, error, reason)


def _failure(durable: Durable, exc: Any) -> str:
    error = exc if isinstance(exc, BaseException) else RuntimeError(str(exc))
    return encode_failure(error, durable.codec, trusted_packages=durable.services.trusted_packages)
