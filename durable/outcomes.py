"""Tells a run how the plain tasks have ended that its body has started.

A message of such a task carries the run's id in a header. Whichever worker
executes it writes the outcome into the run's history, so nobody has to poll
a result backend, or to have one. Most ends are seen where the task was
executed; those of which its process cannot tell, in the worker's main process.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import WorkerLostError
from celery import signals, states
from celery.app.task import Context
from celery.exceptions import NotRegistered, Reject, SoftTimeLimitExceeded, TimeLimitExceeded
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from celery.worker.request import Request

from durable.boundary import ignores_result
from durable.errors import PayloadError, StoreError
from durable.failures import encode_failure
from durable.handles import WAITER
from durable.store import outcomes
from durable.store.outcomes import Outcome
from durable.store.queries import is_run_id

if TYPE_CHECKING:
    from durable.app import Durable

logger = get_logger(__name__)

#: The request that Celery's main process is just failing in this thread.
_failing = threading.local()


def install(durable: Durable) -> None:
    """Listen to the ends of tasks in this process."""
    teller = _Teller(durable)
    signals.task_postrun.connect(teller.on_postrun, weak=False)
    signals.task_internal_error.connect(teller.on_internal_error, weak=False)
    signals.task_revoked.connect(teller.on_revoked, weak=False)
    signals.task_failure.connect(teller.on_failure, weak=False)
    signals.task_unknown.connect(teller.on_unknown, weak=False)
    _watch_requests()


class _Teller:
    def __init__(self, durable: Durable) -> None:
        self._durable = durable

    # --- where the task was executed

    def on_postrun(
        self, task: Any = None, state: str | None = None, retval: Any = None, **_: Any
    ) -> None:
        request: Any = None if task is None else task.request
        waiter = self._waiter(task, request)
        if waiter is None:
            return
        about = (waiter, request.id, task.name)
        if state == states.SUCCESS:
            self._tell(self._success(about, None if ignores_result(task, request) else retval))
        elif state == states.FAILURE or (state == states.REJECTED and not _requeued(retval)):
            self._tell(self._failure(about, retval))
        elif state == states.IGNORED and not request.get("durable_replaced"):
            self._tell(self._success(about, None))

    def on_internal_error(
        self, sender: Any = None, request: Any = None, exception: Any = None, **_: Any
    ) -> None:
        """Celery itself failed around the task, which may not have begun."""
        waiter = self._waiter(sender, Context(request or {}))
        if waiter is not None:
            self._tell(self._failure((waiter, request["id"], sender.name), exception))

    # --- in the main process

    def on_revoked(
        self, sender: Any = None, request: Any = None, expired: bool = False, **_: Any
    ) -> None:
        waiter = self._waiter(sender, request)
        if waiter is not None:
            reason = "expired" if expired else "revoked"
            self._tell_soon(Outcome(waiter, request.id, sender.name, "canceled", reason=reason))

    def on_failure(self, sender: Any = None, exception: Any = None, **_: Any) -> None:
        """The main process gives a task up: its process died, or it took too long."""
        request = getattr(_failing, "request", None)
        if request is None:  # where it was executed, and `on_postrun` comes next
            return
        waiter = self._waiter(sender, request)
        if waiter is not None:
            self._tell_soon(self._failure((waiter, request.id, sender.name), exception))

    def on_stored(self, task: Any, value: Any) -> None:
        """The process died between storing its result in Celery's backend and telling it here."""
        request = _failing.request
        waiter = self._waiter(task, request)
        if waiter is not None:
            self._tell_soon(self._success((waiter, request.id, task.name), value))

    def on_unknown(
        self,
        sender: Any = None,
        message: Any = None,
        name: str = "",
        id: str = "",  # noqa: A002 - the signal's name for it
        **_: Any,
    ) -> None:
        """A worker has thrown the message away, as it does not know the task."""
        waiter: Any = (message.headers or {}).get(WAITER)
        if sender.app is self._durable.app and _is_id(waiter):
            self._tell_soon(self._failure((waiter, id, name), NotRegistered(name)))

    # --- telling

    def _waiter(self, task: Any, request: Any) -> str | None:
        """Return the run that the message names. A run's own end is told by the database."""
        if task is None or getattr(task, "app", None) is not self._durable.app:
            return None
        waiter: str | None = getattr(request, WAITER, None)
        return waiter if _is_id(waiter) and not hasattr(request, "durable_claim") else None

    def _success(self, about: tuple[str, str, str], value: Any) -> Outcome:
        try:
            output = self._durable.codec.encode(value, f"the result of task {about[2]!r}")
        except PayloadError as exc:
            return self._failure(about, exc)
        return Outcome(*about, "succeeded", output=output)

    def _failure(self, about: tuple[str, str, str], exc: Any) -> Outcome:
        durable = self._durable
        error = exc if isinstance(exc, BaseException) else RuntimeError(str(exc))
        text = encode_failure(
            error, durable.codec, trusted_packages=durable.services.trusted_packages
        )
        return Outcome(*about, "failed", error=text)

    def _tell_soon(self, outcome: Outcome) -> None:
        """Leave it to the keeper: the main process has a broker to serve."""
        keeper = self._durable.keeper
        if keeper is None:
            self._tell(outcome)
        else:
            keeper.tell(outcome)

    def _tell(self, outcome: Outcome) -> None:
        """Write it, for as long as it takes, before a late acknowledgement."""
        try:
            try:
                self._durable.database.patiently(outcomes.deliver, outcome)
            except SoftTimeLimitExceeded:  # of the task, which is over; it comes once
                self._durable.database.patiently(outcomes.deliver, outcome)
        except StoreError:
            logger.exception(
                "run %s will not learn the outcome of %s[%s]",
                outcome.waiter,
                outcome.task_name,
                outcome.task_id,
            )


def _is_id(waiter: Any) -> bool:
    return isinstance(waiter, str) and is_run_id(waiter)


def _requeued(rejection: Any) -> bool:
    return isinstance(rejection, Reject) and bool(rejection.requeue)


# --- what Celery's main process does not say by a signal, or not of which message


def _watch_requests() -> None:
    """Have `on_failure` know the message; once in a process. Others cost a look at a dict."""
    if hasattr(Request.on_failure, "__wrapped__"):
        return
    Request.on_failure = _known(Request.on_failure)
    Request.on_timeout = _timed_out(Request.on_timeout)


def _known(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def on_failure(self: Any, *args: Any, **kwargs: Any) -> Any:
        if WAITER not in self.request_dict:
            return method(self, *args, **kwargs)
        _failing.request = Context(self.request_dict)
        try:
            _tell_if_stored(self, *args)
            return method(self, *args, **kwargs)
        finally:
            _failing.request = None

    return on_failure


def _tell_if_stored(request: Any, exc_info: Any = None, *_: Any) -> None:
    """A process that died after its result was stored: Celery then takes the task for done."""
    exc = getattr(exc_info, "exception", None)
    exc = exc.exc if isinstance(exc, ExceptionWithTraceback) else exc
    teller = _teller_of(request.task)
    look: Callable[[], Any] = getattr(request, "_success_was_stored", lambda: None)
    if teller is None or not isinstance(exc, (WorkerLostError, SystemExit, KeyboardInterrupt)):
        return
    stored = look()
    if stored:
        teller.on_stored(request.task, stored.get("result"))


def _timed_out(method: Callable[..., Any]) -> Callable[..., Any]:
    """Not all versions and pools go on to `on_failure`, or send a signal here."""

    @functools.wraps(method)
    def on_timeout(self: Any, soft: bool, timeout: float) -> Any:
        method(self, soft, timeout)
        if soft or WAITER not in self.request_dict or worker_state.should_terminate:
            return
        task = self.task
        if task.acks_late and not _acks_on_timeout(task):
            return  # it goes back to the broker
        teller = _teller_of(task)
        if teller is None:
            return
        _failing.request = Context(self.request_dict)
        try:
            teller.on_failure(task, TimeLimitExceeded(timeout))
        finally:
            _failing.request = None

    return on_timeout


def _teller_of(task: Any) -> _Teller | None:
    durable = getattr(task.app, "durable", None)
    return None if durable is None else _Teller(durable)


def _acks_on_timeout(task: Any) -> bool:
    name = "acks_on_timeout" if hasattr(task, "acks_on_timeout") else "acks_on_failure_or_timeout"
    return bool(getattr(task, name))
