"""``durable.CircuitBreaker``: spares a service that is down, and the workers that call it.

The state is one row in Postgres, shared by all workers::

    closed ── failure_threshold failures in a row ──> open
    open ── after reset_timeout, one call is let through ──> half_open
    half_open ── it succeeds ──> closed
    half_open ── it fails ──> open
    half_open ── nothing is heard of it for reset_timeout ──> the next call is let through
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import timedelta
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, overload

from celery import current_app

from durable._retry_options import as_tuple, check_classes, check_count, refusal
from durable.classify import RetryClass
from durable.context import running
from durable.durations import parse_seconds
from durable.errors import CircuitOpen, ConfigurationError, NotInWorkflow, OptionError, StoreError
from durable.names import LONGEST_NAME, is_name
from durable.steps import Step, is_async
from durable.store import circuit_breakers
from durable.store.circuit_breakers import Admission, Key

if TYPE_CHECKING:
    from durable.app import Durable

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


#: One for each ``with`` that the calling thread, greenlet or task is in.
_calls: ContextVar[tuple[_Call, ...]] = ContextVar("durable_breaker_calls", default=())


class _Call(NamedTuple):
    """A call that is under way; without a generation nothing of it is reported."""

    durable: Durable | None
    admission: Admission


class _Outcome(Enum):
    SUCCESS = "the service has answered"
    FAILURE = "it has not"
    UNKNOWN = "the call tells nothing about it"


class CircuitBreaker:
    """Stops calls to a service that fails, for all workers at once, until it is back.

    After ``failure_threshold`` failures in a row it opens: calls are refused
    with `CircuitOpen`, which parks the step, without a worker, until the
    service may be tried again. Then exactly one call of all workers is let
    through; its success closes the breaker.

    Use it in steps: as a decorator (under or above ``@step``), or as ``with
    breaker:`` around the call itself; both also for ``async def``, there with
    ``async with``. One object may be shared by threads and tasks. It works
    outside runs too, in a web process for one.

    The state is a row in Postgres. A call costs one read of it, by primary
    key, while all is well; one write more when it fails, or succeeds after a
    failure. If the row cannot be read or written, the call is let through and a
    warning logged: a breaker is not to cause an outage of its own. Runs that
    are executed inline (eager mode, direct calls) have no breaker.

    Args:
        name: of the service; breakers of one name in a namespace are one.
        failure_threshold: failures in a row that open it.
        reset_timeout: duration from there to the probe, and from a probe of
            which nothing is heard to the next one. Longer than a call takes.
        expected: exceptions that count as failures; any other means that the
            service has answered. By default those count that are worth a retry:
            a time-out or HTTP 503 does, a declined card or HTTP 404 does not.
        ignore: exceptions that count neither as failure nor as success.

    Raises:
        OptionError: a value is not accepted.

    Example:
        >>> carrier = durable.CircuitBreaker("carrier", failure_threshold=1, reset_timeout="30s")
        >>> @step(max_retries=0)
        ... @carrier
        ... def book(parcel: str) -> str:
        ...     raise ConnectionError("the carrier does not answer")
        >>> @workflow
        ... def ship(parcel: str) -> str:
        ...     try:
        ...         return book(parcel)
        ...     except (ConnectionError, durable.CircuitOpen) as exc:
        ...         return type(exc).__name__
        >>> ship.delay("p-1").get(timeout=30)
        'ConnectionError'
        >>> ship.delay("p-2").get(timeout=30)
        'CircuitOpen'
        >>> carrier.state
        'open'
    """

    def __init__(
        self,
        name: str,
        *,
        failure_threshold: int = 5,
        reset_timeout: timedelta | float | str = "30s",
        expected: type[BaseException] | Iterable[type[BaseException]] | None = None,
        ignore: type[BaseException] | Iterable[type[BaseException]] = (),
    ) -> None:
        if not is_name(name):
            raise OptionError(
                f"CircuitBreaker(name) takes 1 to {LONGEST_NAME} printable characters, not {name!r:.80}"
            )
        accepted = "a whole number from 1"
        check_count("failure_threshold", failure_threshold, accepted)
        if failure_threshold == 0:
            raise refusal("failure_threshold", 0, accepted)
        seconds = parse_seconds(reset_timeout, name="reset_timeout")
        if not seconds:
            raise OptionError("reset_timeout=0 would never refuse a call: give a duration")
        self.name = name
        self.failure_threshold = failure_threshold
        self.reset_timeout = seconds
        self.expected = None if expected is None else _classes("expected", expected)
        self.ignore = _classes("ignore", ignore)

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.name}>"

    # --- for people

    @property
    def state(self) -> str:
        """The state now: ``"closed"``, ``"open"`` or ``"half_open"``. One query."""
        durable = _durable()
        return durable.database.call(circuit_breakers.state, self._key(durable))

    def reset(self) -> None:
        """Close it by hand, when you know that the service is back."""
        durable = _durable()
        durable.database.call(circuit_breakers.reset, self._key(durable))

    # --- around calls

    @overload
    def __call__(self, function: Step[P, R]) -> Step[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R]) -> Callable[P, R]: ...

    def __call__(self, function: Any) -> Any:
        """Decorate a function, or a step, which is the same step then.

        Raises:
            OptionError: it is no function, or a generator function.
        """
        if isinstance(function, Step):
            # Around the body: a replay, which only reads the result, is no call. In
            # the step itself: other workers find it by its name, and have to be guarded too.
            function.function = self(function.function)
            return function
        if not callable(function):
            raise OptionError(f"a CircuitBreaker goes on a function, not on {function!r}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise OptionError(
                f"a CircuitBreaker does not take the generator function {function!r}: calling it"
                " runs nothing yet. Use `with breaker:` in it, around the call to the service"
            )
        return self._around_async(function) if is_async(function) else self._around(function)

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return guarded

    def _around_async(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            async with self:
                return await function(*args, **kwargs)

        return guarded

    def __enter__(self) -> None:
        _push(self._admit(self._watching()))

    def __exit__(
        self,
        _type: type[BaseException] | None,
        exc: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._report(_pop(), exc)

    async def __aenter__(self) -> None:
        # In a thread: the loop has other branches to run meanwhile. The current
        # app is known to this one.
        _push(await asyncio.to_thread(self._admit, self._watching()))

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        exc: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self._report, _pop(), exc)

    # --- before and after a call

    def _admit(self, durable: Durable | None) -> _Call:
        if durable is None:
            return _Call(None, Admission(None))
        admit = circuit_breakers.admit
        try:
            admission = durable.database.call(admit, self._key(durable), self.reset_timeout)
        except StoreError as exc:
            logger.warning("circuit breaker %r lets a call through unseen: %s", self.name, exc)
            return _Call(None, Admission(None))
        if admission.generation is None:
            raise CircuitOpen(
                f"the circuit breaker {self.name!r} is open: the service has failed"
                f" {self.failure_threshold} times or more in a row, and may be tried again in"
                f" {admission.due_in:.3g} s",
                breaker=self.name,
                retry_after=admission.due_in,
            )
        return _Call(durable, admission)

    def _report(self, call: _Call, exc: BaseException | None) -> None:
        durable, admission = call
        generation = admission.generation
        if durable is None or generation is None:
            return
        outcome = self._judge(durable, exc)
        try:
            if outcome is _Outcome.FAILURE:
                self._report_failure(durable, generation)
            elif outcome is _Outcome.SUCCESS and admission.notable:
                self._report_success(durable, generation, closes=admission.probe)
            elif outcome is _Outcome.UNKNOWN and admission.probe:
                durable.database.call(circuit_breakers.give_back, self._key(durable), generation)
        except StoreError as error:
            # The call is over: its outcome must not be lost for the breaker's sake.
            logger.warning("circuit breaker %r misses an outcome: %s", self.name, error)

    def _report_failure(self, durable: Durable, generation: int) -> None:
        failures = durable.database.call(
            circuit_breakers.failed,
            self._key(durable),
            generation,
            threshold=self.failure_threshold,
            reset_timeout=self.reset_timeout,
        )
        if failures is not None:
            logger.warning(
                "circuit breaker %r is open after %s failures in a row; the next call in %g s",
                self.name,
                failures,
                self.reset_timeout,
            )

    def _report_success(self, durable: Durable, generation: int, *, closes: bool) -> None:
        counts = durable.database.call(circuit_breakers.succeeded, self._key(durable), generation)
        if counts and closes:
            logger.info("circuit breaker %r is closed again", self.name)

    def _judge(self, durable: Durable, exc: BaseException | None) -> _Outcome:
        if exc is None:
            return _Outcome.SUCCESS
        if not isinstance(exc, Exception) or isinstance(exc, (CircuitOpen, *self.ignore)):
            return _Outcome.UNKNOWN  # a run that parks or stops; another breaker's refusal
        if self.expected is not None:
            failure = isinstance(exc, self.expected)
            return _Outcome.FAILURE if failure else _Outcome.SUCCESS
        worth = durable.classifier.classify(exc).retry_class
        if worth is RetryClass.PASS:
            return _Outcome.UNKNOWN
        return _Outcome.SUCCESS if worth is RetryClass.PERMANENT else _Outcome.FAILURE

    def _watching(self) -> Durable | None:
        """The app whose database has the state; None where no database is to be used."""
        execution = running.get()
        if execution is None:
            return _durable()
        if not execution.in_step:
            raise NotInWorkflow(
                f"the circuit breaker {self.name!r} belongs in a step: the body of a workflow runs"
                " again on every replay, and each time would count as a call. Put it on the step"
            )
        return None if execution.journal.inline else _durable()

    def _key(self, durable: Durable) -> Key:
        return Key(durable.settings.namespace, self.name)


def _push(call: _Call) -> None:
    _calls.set((*_calls.get(), call))


def _pop() -> _Call:
    *outer, call = _calls.get()
    _calls.set(tuple(outer))
    return call


def _durable() -> Durable:
    durable: Durable | None = getattr(current_app, "durable", None)
    if durable is None:
        raise ConfigurationError(
            "a CircuitBreaker needs a Celery app with Durable(app): import your app's module first"
        )
    return durable


def _classes(name: str, classes: object) -> tuple[type[BaseException], ...]:
    found: Any = as_tuple(classes)
    check_classes(name, found)
    return found  # type: ignore[no-any-return]
