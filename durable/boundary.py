"""Where Celery calls a workflow: claim, run, and end in a way that Celery understands."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import (
    Ignore,
    MaxRetriesExceededError,
    Reject,
    Retry,
    SoftTimeLimitExceeded,
)
from celery.result import allow_join_result
from celery.utils.log import get_logger

from durable import compensation, loop, stored_message
from durable._codec_types import TYPE
from durable.call import encode_arguments
from durable.compensation import Ending, Failed
from durable.continuing import CONTINUED, run_passes
from durable.coroutines import enter_directly, enter_eagerly
from durable.encryption import LOCKED_OUT, LOCKED_OUT_REST, SEALED
from durable.errors import (
    DatabaseReadOnly,
    DatabaseUnavailable,
    EncryptionError,
    NonDeterministicWorkflow,
    Parked,
    PayloadError,
    RecoverableError,
    Suspend,
    TransientError,
)
from durable.execution import Execution, is_settled
from durable.failures import decode_failure
from durable.history import History
from durable.journal import MemoryJournal, Parking, PostgresJournal
from durable.retry import RetryPolicy
from durable.start import DOORBELL
from durable.store import compensation as store
from durable.store import passes, queries, runs
from durable.store.runs import ENDED, Park

if TYPE_CHECKING:
    from celery.app.task import Context

    from durable.app import Durable
    from durable.task import Workflow

logger = get_logger(__name__)

Body = Callable[..., Any]

#: Why the body of a run is replayed no further that is being undone.
UNDO = "undo"


def run_inline(task: Workflow, durable: Durable, body: Body, args: Any, kwargs: Any) -> Any:
    """Run a workflow here and now, in memory: eager mode and direct calls."""
    run_id = task.request.id or durable.clock.uuid()
    numbers = count()

    def begin() -> Execution:
        execution = Execution(
            id=run_id,
            name=task.name,
            attempt=1,
            history=History(),
            journal=MemoryJournal(durable.clock.now),
            services=durable.services,
            passes=next(numbers),
            version=task.version,
            encode_arguments=partial(encode_arguments, durable, task),
        )
        if task.durable_async:
            execution.enter = enter_eagerly if task.request.is_eager else enter_directly
        return execution

    # Celery refuses to wait in a task. A workflow may, and here nothing is left to wait for.
    with allow_join_result() if task.app.conf.task_always_eager else nullcontext():
        return run_passes(begin, body, args, kwargs)


def run_in_worker(task: Workflow, durable: Durable, body: Body) -> Any:
    """Run the workflow that a message rang for, if it is there for the taking."""
    request = task.request
    try:
        claimed = durable.claim(request.id, task.runs_versions())
    except (DatabaseUnavailable, DatabaseReadOnly) as exc:
        logger.warning("run %s is not begun, it will be rung again: %s", request.id, exc)
        raise Ignore(str(exc)) from exc
    if claimed is None:
        raise Ignore("the run is another worker's, parked, or over")
    claim, history = claimed
    return _Attempt(task, durable, claim, history).run(body)


class _Attempt:
    """One claim of one run, from the claim to what Celery is told."""

    def __init__(
        self,
        task: Workflow,
        durable: Durable,
        claim: runs.Claim,
        history: Sequence[runs.StepRecord],
    ) -> None:
        self.task = task
        self.request: Context = task.request
        self.durable = durable
        self.claim = claim
        self.history = history
        self.journal = PostgresJournal(durable.database, durable.sessions, durable.lease, claim)
        self.execution = Execution(
            id=claim.id,
            name=claim.name,
            attempt=claim.attempt,
            history=History(),
            journal=self.journal,
            services=durable.services,
            generation=claim.generation,
            enter=loop.run if task.durable_async else None,
            compensates=claim.compensates,
            passes=claim.passes,
            version=claim.version,
            encode_arguments=partial(encode_arguments, durable, task),
        )

    def run(self, body: Body) -> Any:
        """Execute the body and end; or repeat only what Celery delivers after the end."""
        claim = self.claim
        try:
            self._decrypt()
            args, kwargs = self._fill_in_request()
        except EncryptionError as exc:
            return self._locked_out(exc)
        except PayloadError as exc:
            return self._parked(Park("paused", f"its input cannot be read: {exc}"), exc)
        if claim.status in ENDED:
            return self._repeat_outcome()
        if claim.control == "cancel" and not claim.compensates:
            return self._end_canceled()
        if compensation.decided(self.execution.history) is not None:
            self.execution.halt = UNDO
        else:
            self.execution.halt = "cancel" if claim.control == "cancel" else None
        self._tell_started()
        return self._ended(*self._executed(body, args, kwargs))

    def _executed(self, body: Body, args: Any, kwargs: Any) -> tuple[Any, Exception | None]:
        claim, value, error = self.claim, None, None
        try:
            with self.execution.active():
                value = body(*args, **kwargs)
        except Suspend:
            pass
        except Exception as exc:  # noqa: BLE001 - how the run ends
            error = exc
        except BaseException as exc:
            if _ends_the_process(exc):
                raise
            error = RuntimeError(
                f"the body of {claim.name!r} raised {exc!r}, which is no Exception"
            )
            error.__cause__ = exc
        return value, error

    def _ended(self, value: Any, error: Exception | None) -> Any:
        if self.execution.suspension is not None:  # whatever came out of the body
            return self._suspended()
        if self.execution.halt is not None:  # it had come to its end before
            return self._end_canceled()
        return self._succeeded(value) if error is None else self._failed(error)

    def _decrypt(self) -> None:
        """Decrypt all that was stored, before the body runs: a missing key is not its error."""
        codec, claim = self.durable.codec, self.claim
        if claim.status in ENDED:
            self.claim = claim._replace(
                output=claim.output and codec.open(claim.output),
                error=claim.error and codec.open(claim.error),
            )
            return
        self.execution.history = History(self._decrypted())

    def _decrypted(self) -> Iterator[Sequence[object]]:
        codec = self.durable.codec
        for record in self.history:
            output, error = record[6], record[7]
            if (output and SEALED in output) or (error and SEALED in error):
                plain = (output and codec.open(output), error and codec.open(error))
                yield (*record[:6], *plain, record[8])
            else:
                yield record

    def _locked_out(self, exc: EncryptionError) -> Any:
        """Leave the run to a worker that has the key, or until this one is given it."""
        claim = self.claim
        logger.error("run %s waits for a worker that can decrypt it: %s", claim.id, exc)
        if claim.status in ENDED:  # rung again, as its delivery stays unconfirmed
            raise Ignore(str(exc)) from exc
        return self._parked(Park("sleeping", f"{LOCKED_OUT}: {exc}", delay=LOCKED_OUT_REST), exc)

    def _fill_in_request(self) -> tuple[list[Any], dict[str, Any]]:
        """Give the request what the message did not carry, in place: hooks look at it later."""
        request, claim = self.request, self.claim
        message = stored_message.loaded(claim.message, self.durable.codec)
        given = self.durable.codec.decode(claim.input)
        args, kwargs = given["args"], given["kwargs"]
        if isinstance(request.args, list):  # else it is pickle's tuple of a message without a run
            request.args[:] = args
        request.kwargs.clear()
        request.kwargs.update(kwargs)
        request.retries = claim.retries
        request.callbacks = message.get("link")
        request.errbacks = message.get("link_error")
        request.chain = message.get("chain")
        request.chord = message.get("chord")
        if request.delivery_info:  # of a woken run's message, not what its children inherit
            request.delivery_info["priority"] = message.get("priority")
        request.durable_claim = claim
        (request.headers or {}).pop(DOORBELL, None)  # the rest are the user's, to pass on
        return args, kwargs

    # --- ends

    def _succeeded(self, value: Any) -> Any:
        try:
            self.execution.check_complete()
        except NonDeterministicWorkflow as exc:
            return self._parked(Park("paused", str(exc)), exc)
        output = None
        request = self.request
        followed = request.callbacks or request.chain or request.chord
        ignored = ignores_result(self.task, request)
        if followed or not ignored or self.task.durable_keeps_output:
            codec = self.durable.codec
            try:
                output = codec.encode(value, f"the result of workflow {self.claim.name!r}")
                value = codec.decode(output)
                if TYPE in output and self.durable.has_backend and not ignored:
                    self._check_backend_takes(value)
            except PayloadError as exc:
                return self._failed(exc)
        self._finish("succeeded", output=output)
        self._expect(states.SUCCESS)
        return value

    def _check_backend_takes(self, value: Any) -> None:
        """Celery's serializers know fewer types than the codec. Told too late, it is told for ever."""
        try:
            self.task.backend.encode(value)
        except Exception as exc:
            raise PayloadError(
                f"the result of workflow {self.claim.name!r} cannot be stored in Celery's result"
                f" backend: {exc}; return plain values, or set ignore_result=True"
            ) from exc

    def _failed(self, exc: Exception) -> Any:
        if isinstance(exc, Ignore):
            self._finish("succeeded", reason="ignored")
            self._expect(states.IGNORED)
            raise exc
        if isinstance(exc, EncryptionError) and not is_settled(exc):
            return self._locked_out(exc)
        if isinstance(exc, Reject):
            return self._rejected(exc)
        if isinstance(exc, Retry):
            return self._retried(exc)
        delay = self._retry_delay(exc)
        if delay is not None:
            return self._parked(Park("sleeping", "retry", delay=delay, retry=True), exc)
        if not isinstance(exc, SoftTimeLimitExceeded) and not self.claim.retries:
            try:
                self.execution.check_complete()
            except NonDeterministicWorkflow as early:
                return self._parked(Park("paused", f"{early} It raised {exc!r:.500}"), exc)
        return self._end_failed(exc)

    def _rejected(self, exc: Reject) -> Any:
        if exc.requeue:
            return self._parked(Park("pending", "rejected"), None)
        return self._end_failed(exc, "rejected")

    def _end_failed(self, exc: BaseException, reason: str | None = None) -> Any:
        if self.execution.compensations:
            return self._undo("failed", exc, reason)
        self._finish("failed", error=self.execution.encode_error(exc), reason=reason)
        if reason == "rejected":
            return self._tell_rejected(exc)
        self._expect(states.FAILURE)
        raise exc

    def _retried(self, exc: Retry) -> Any:
        """A `Retry` that did not come from our `retry`: raised as it is, or by a task called here."""
        task = self.task
        if task.max_retries is not None and self.claim.retries >= task.max_retries:
            text = (
                f"Can't retry {task.name}[{self.claim.id}]: {task.max_retries} retries are used up"
            )
            cause = exc.exc if isinstance(exc.exc, Exception) else MaxRetriesExceededError(text)
            return self._failed(cause)
        pause = task.pause_until(task.default_retry_delay if exc.when is None else exc.when)
        return self._parked(Park("sleeping", "retry", delay=pause, retry=True), exc.exc)

    def _retry_delay(self, exc: Exception) -> float | None:
        """Judge an error of the body itself: only the retry classes repeat it."""
        if is_settled(exc) or not isinstance(exc, (TransientError, RecoverableError)):
            return None
        limit = self.task.max_retries
        if limit is not None and self.claim.retries >= limit:
            return None
        clock, classifier = self.durable.clock, self.durable.classifier
        past = [{"class": "recoverable"}] * self.claim.retries
        policy = RetryPolicy(max_retries=None, transient_tries=0)
        return policy.decide(exc, classifier, past, random=clock.random).delay

    def _end_canceled(self) -> Any:
        execution = self.execution
        if execution.halt is None and self.task.durable_async and execution.compensates:
            # Steps of other branches were recorded that these have not come to
            # hear of; a replay registers what undoes them.
            return self._parked(Park("pending", "cancel"), None)
        if execution.halt == UNDO or execution.compensations:
            return self._undo("canceled")
        return self._told_canceled("canceled")

    def _told_canceled(self, reason: str | None) -> Any:
        self._finish("canceled", reason=reason)
        durable = self.durable
        row = durable.database.patiently(queries.get, self.claim.id, durable.settings.namespace)
        return self._tell_canceled((row and row.reason) or "canceled")

    def _undo(
        self, status: str, exc: BaseException | None = None, reason: str | None = None
    ) -> Any:
        """Undo what the body has registered; then end the run."""
        execution = self.execution
        ending = compensation.decided(execution.history) or self._decide(status, exc, reason)
        execution.begin_undo()
        failed = None
        try:
            with execution.active():
                failed = compensation.undo(execution, on_loop=self.task.durable_async)
                if failed is None and execution.suspension is None:
                    execution.check_complete()
        except Suspend:
            pass
        except NonDeterministicWorkflow as stray:
            return self._parked(Park("paused", str(stray)), stray)
        if execution.suspension is not None:
            return self._suspended()
        if failed is not None:
            return self._parked(Park("paused", _cannot_undo(failed, ending)), failed.error)
        if ending.status == "canceled":
            return self._told_canceled(ending.reason)
        if exc is None:
            exc = decode_failure(ending.error or "null", self.durable.codec)
        return self._end_failed(exc, ending.reason)

    def _decide(self, status: str, exc: BaseException | None, reason: str | None) -> Ending:
        found = self.durable.database.patiently(
            store.decide,
            self.claim.id,
            self.claim.attempt,
            status,
            error=None if exc is None else self.execution.encode_error(exc),
            reason=reason,
        )
        if found is None:
            raise Ignore("fenced")
        return Ending(status, found[0])

    def _suspended(self) -> Any:
        suspension = self.execution.suspension
        assert suspension is not None
        if suspension.reason in {"cancel", UNDO}:
            return self._end_canceled()
        if suspension.reason == "pause":
            return self._parked(Park("paused", "paused"), None)
        if suspension.reason == CONTINUED:
            self._begin_anew()
        if suspension.reason == "unstorable" and self.execution.undoing:
            return self._parked(Park("paused", f"undo: {suspension.cause}"), suspension.cause)
        if suspension.reason == "unstorable" and suspension.cause is not None:
            return self._failed(suspension.cause)
        if suspension.reason in {"fenced", "lease missed"}:
            logger.warning("run %s goes on elsewhere: %s", self.claim.id, suspension.reason)
            raise Ignore(suspension.reason)
        raise self._told(suspension.reason, suspension.cause, suspension.due_in)

    def _begin_anew(self) -> None:
        """Let the next pass take the place of this one."""
        claim, given = self.claim, self.execution.next_input
        assert given is not None
        begun = self.durable.database.patiently(
            passes.begin_anew,
            claim.id,
            claim.attempt,
            claim.generation,
            given=given,
            version=self.task.version,
        )
        if not begun:
            raise Ignore("fenced")

    def _parked(self, how: Park, cause: Any) -> Any:
        if self.journal.park(how) is Parking.FENCED:
            raise Ignore("fenced")
        raise self._told("paused" if how.status == "paused" else how.reason, cause, how.delay)

    def _told(self, reason: str, cause: Any, when: float | None) -> Parked:
        """Make what Celery records as RETRY; its hooks get the cause, or a `Parked`."""
        return Parked(reason, exc=cause or Parked(reason, when=when), when=when)

    def _finish(
        self,
        status: str,
        *,
        output: str | None = None,
        error: str | None = None,
        reason: str | None = None,
    ) -> None:
        ours = self.durable.database.patiently(
            runs.finish,
            self.claim.id,
            self.claim.attempt,
            status,
            tail_timeout=self.durable.settings.tail_timeout,
            output=output,
            error=error,
            reason=reason,
        )
        if not ours:
            logger.warning("run %s was taken over: its end here counts for nothing", self.claim.id)
            raise Ignore("fenced")

    def _tell_started(self) -> None:
        task, request = self.task, self.request
        if task.durable_track_started and not ignores_result(task, request):
            meta = {"pid": this_pid(), "hostname": request.hostname}
            task.backend.mark_as_started(request.id, request, **meta)

    # --- what Celery delivers after the end

    def _repeat_outcome(self) -> Any:
        """Go through Celery's own path again, from the stored outcome."""
        claim = self.claim
        if claim.status == "succeeded":
            if claim.reason == "ignored":
                self._expect(states.IGNORED)
                raise Ignore("ignored")
            self._expect(states.SUCCESS)
            return self.durable.codec.decode(claim.output or "null")
        if claim.status == "canceled":
            return self._tell_canceled(claim.reason or "canceled")
        error = decode_failure(claim.error or "null", self.durable.codec)
        if claim.reason == "rejected":
            return self._tell_rejected(error)
        self._expect(states.FAILURE)
        raise error

    def _tell_rejected(self, exc: BaseException) -> Any:
        """Fail the task here: the main process, which does it in Celery, has not the errbacks."""
        store = not ignores_result(self.task, self.request)
        self._expect(states.REJECTED)
        self.task.backend.mark_as_failure(
            self.claim.id, exc, request=self.request, store_result=store
        )
        raise exc if isinstance(exc, Reject) else Reject(str(exc), requeue=False)

    def _tell_canceled(self, reason: str) -> Any:
        """Answer results and chords as Celery does for a revoked task."""
        store = not ignores_result(self.task, self.request)
        self.task.backend.mark_as_revoked(
            self.claim.id, reason, request=self.request, store_result=store
        )
        self._expect(states.IGNORED)
        raise Ignore(reason)

    def _expect(self, state: str) -> None:
        """Note the outcome as Celery's state: what it may tell, and whose delivery counts."""
        self.request.durable_outcome = state


def _cannot_undo(failed: Failed, ending: Ending) -> str:
    named = f"{failed.name!r}, ordinal={failed.ordinal}"
    return (
        f"undo step {failed.name!r} (position {failed.ordinal} of branch undo) has failed:"
        f" {failed.error!r:.500}. Undo it by hand, result.settle({failed.name!r}, None,"
        f" ordinal={failed.ordinal}) and result.resume(); or repair the code and"
        f" result.restart(from_step={named}). The run then ends {ending.status}"
    )


def ignores_result(task: Workflow, request: Context) -> bool:
    """Tell whether nobody wants the result: the call's word goes before the task's."""
    asked = request.__dict__.get("ignore_result")
    return bool(task.ignore_result if asked is None else asked)


def confirm_tail(durable: Durable, request: Context, state: str | None) -> None:
    """Note that Celery has delivered callbacks, chain, chord count and result of a run."""
    claim: runs.Claim | None = request.__dict__.get("durable_claim")
    outcome = request.__dict__.get("durable_outcome")
    if claim is None or not claim.tail or outcome is None:
        return
    # Celery says SUCCESS also when the backend did not take the result, and nothing
    # at all when a hook failed, after all was delivered.
    told = request.__dict__.get("durable_done", False)
    if not (state == outcome if outcome == states.IGNORED else told):
        return
    try:
        durable.database.call(runs.tail_done, claim.id, claim.attempt)
    except Exception:
        logger.warning(
            "run %s: what follows its end may be delivered twice", claim.id, exc_info=True
        )


def _ends_the_process(exc: BaseException) -> bool:
    """Tell what the pool has to see, such as an exit asked for by a signal, from a stray one.

    Signals reach the main thread only. Out of another one nothing but an
    Exception gets to Celery (seen): the request, and the run, would hang.
    """
    if isinstance(exc, getattr(sys.modules.get("greenlet"), "GreenletExit", ())):
        return True
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and isinstance(exc, (SystemExit, KeyboardInterrupt))


def this_pid() -> int:
    """The process that claims: a child in prefork, else the worker itself."""
    return os.getpid()
