"""Every exception of the package, in one tree.

::

    DurableError
    ├── ConfigurationError        a setting is missing, unknown or ill-typed
    ├── OptionError               an option of a workflow, step or call is wrong
    ├── IdempotencyConflict       the key stands for a run with another input
    ├── PayloadError              a value cannot be stored as it is
    ├── EncryptionError           a stored value cannot be decrypted here
    ├── NotInWorkflow             a verb was called outside a run
    ├── RunNotFound               no such run in this namespace
    ├── RunEnded                  the run has ended, it takes no more events
    ├── NotAllowed                the run's state does not allow this action
    ├── RunErased                 the data of the run was erased
    ├── EventTimeout              no event came in time
    ├── NonDeterministicWorkflow  the code asks for another step than the recorded one
    ├── UnsupportedByDurable      a Celery feature that has no durable meaning
    ├── StepError                 stands for a stored exception that is not rebuilt
    ├── StepTimeout               a step took longer than its timeout
    ├── RunLost                   the run took its worker down too often
    ├── DeadlineExceeded          the run did not end in time
    ├── StoreError
    │   ├── DatabaseUnavailable   no connection to Postgres
    │   ├── DatabaseReadOnly      a standby, or default_transaction_read_only
    │   ├── MissingRights         the role may not do it
    │   ├── PartlyStarted         start_many was interrupted between two chunks
    │   ├── SchemaTooOld          the schema is missing or older than this code
    │   └── SchemaTooNew          the schema asks for newer code than this
    └── retry classes, for user code to raise
        ├── TransientError        try again at once
        ├── RecoverableError      try again later
        │   └── CircuitOpen       a circuit breaker refuses the call
        └── PermanentError        do not try again

    Parked(celery.exceptions.Retry)   what Celery is told when a run waits
    Suspend(BaseException)            unwinds user code; never seen by it
"""

from __future__ import annotations

from collections.abc import Sequence

from celery.exceptions import ImproperlyConfigured, Retry


class DurableError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(DurableError, ImproperlyConfigured):
    """A ``durable_*`` setting is missing, unknown or of the wrong type."""


class OptionError(DurableError, TypeError):
    """An option of a workflow, a step or a call is unknown or has a wrong value."""


class IdempotencyConflict(DurableError):
    """The idempotency key stands for a run that was started with another input.

    Attributes:
        run_id: id of that run.

    Example:
        >>> @durable.workflow
        ... def fulfil(order_id: str, cents: int) -> str:
        ...     return f"{order_id} for {cents}"
        >>> first = fulfil.apply_async(("o-42", 990), idempotency_key="o-42")
        >>> fulfil.apply_async(("o-42", 990), idempotency_key="o-42").id == first.id
        True
        >>> try:
        ...     fulfil.apply_async(("o-42", 880), idempotency_key="o-42")
        ... except durable.IdempotencyConflict as conflict:
        ...     conflict.run_id == first.id
        True
    """

    def __init__(self, message: str, run_id: str = "") -> None:
        super().__init__(message)
        self.run_id = run_id

    def __reduce__(self) -> tuple[object, ...]:
        return IdempotencyConflict, (str(self), self.run_id)


class PayloadError(DurableError, ValueError):
    """A value cannot be stored without changing it."""


class EncryptionError(DurableError):
    """A stored value cannot be decrypted: this process lacks the key, or the value was changed."""


class NotInWorkflow(DurableError, RuntimeError):
    """A verb that needs a run was called outside one."""


class RunNotFound(DurableError, LookupError):
    """There is no run of that id in this namespace."""


class RunEnded(DurableError):
    """The run has ended: nothing more can be sent to it."""


class NotAllowed(DurableError):
    """The state of the run does not allow this action."""


class RunErased(DurableError):
    """The run's arguments, result and steps were erased; that it took place is still known."""


class EventTimeout(DurableError, TimeoutError):
    """No event of the awaited type came in time.

    Attributes:
        event_type: the type that `durable.wait_for_event` waited for.

    Example:
        >>> @durable.workflow
        ... def approve(order_id: str) -> str:
        ...     try:
        ...         durable.wait_for_event("approval", timeout=0.1)
        ...     except durable.EventTimeout:
        ...         return f"{order_id} is refused"
        ...     return f"{order_id} is approved"
        >>> approve.delay("o-42").get(timeout=30)
        'o-42 is refused'
    """

    def __init__(self, message: str, event_type: str = "") -> None:
        super().__init__(message)
        self.event_type = event_type

    def __reduce__(self) -> tuple[object, ...]:
        return EventTimeout, (str(self), self.event_type)


class NonDeterministicWorkflow(DurableError):
    """On replay the workflow asked for another step than the one recorded."""


class UnsupportedByDurable(DurableError):
    """A Celery feature was used that has no meaning for a durable run."""


class StepError(DurableError):
    """A stored exception whose class is not rebuilt by import.

    Attributes:
        type_name: qualified name of the original class, such as
            ``"stripe.error.CardError"``.
    """

    def __init__(self, message: str, type_name: str = "") -> None:
        super().__init__(message, type_name)
        self.type_name = type_name

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{self.type_name}: {message}" if self.type_name else message


class StepTimeout(DurableError, TimeoutError):
    """A step took longer than its ``timeout=``; tried again like any time-out."""


class RunLost(DurableError):
    """The run took its worker down ``durable_max_recoveries`` times without a step between."""


class DeadlineExceeded(DurableError, TimeoutError):
    """The run did not end before its deadline."""


class StoreError(DurableError):
    """Postgres could not do what was asked."""


class DatabaseUnavailable(StoreError, ConnectionError):
    """There is no connection to Postgres."""


class DatabaseReadOnly(StoreError):
    """Postgres accepts no writes: a standby, or ``default_transaction_read_only``."""


class MissingRights(StoreError, PermissionError):
    """The database role lacks a right that the package needs."""


class PartlyStarted(StoreError):
    """`durable.start_many` was interrupted: whole chunks of runs are started, the rest is not.

    Attributes:
        started: handles of the runs that are, in the order of the items.
    """

    def __init__(self, message: str, started: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.started = started


class SchemaTooOld(StoreError):
    """The schema ``durable`` is missing or older than this code, and may not be migrated here."""


class SchemaTooNew(StoreError):
    """The schema ``durable`` asks for newer code than this."""


class TransientError(DurableError):
    """Raise it in a step to have it tried again at once, a few times.

    Example:
        >>> @durable.step
        ... def ask(attempts: list[int]) -> int:
        ...     attempts.append(1)
        ...     if len(attempts) < 2:
        ...         raise durable.TransientError("the line is noisy")
        ...     return len(attempts)
        >>> @durable.workflow
        ... def question() -> int:
        ...     return ask([])
        >>> question()
        2
    """


class RecoverableError(DurableError):
    """Raise it in a step to have it tried again later, with back-off.

    Args:
        message: what happened.
        retry_after: least pause before the next attempt, as a duration
            (timedelta, seconds, or text such as ``"90s"``).

    Example:
        >>> raise durable.RecoverableError("closed until nine", retry_after="2h")
        Traceback (most recent call last):
            ...
        durable.errors.RecoverableError: closed until nine
    """

    def __init__(self, message: str = "", *, retry_after: object = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CircuitOpen(RecoverableError):
    """A circuit breaker refuses the call; in a step it is tried again when a probe is due.

    Attributes:
        breaker: name of the `CircuitBreaker`.
        retry_after: seconds until it lets a call through again, if the service is back.

    Example:
        >>> try:
        ...     raise durable.CircuitOpen("down", breaker="carrier", retry_after=12.5)
        ... except durable.RecoverableError as exc:
        ...     print(exc.breaker, exc.retry_after)
        carrier 12.5
    """

    def __init__(self, message: str = "", *, breaker: str = "", retry_after: object = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.breaker = breaker


class PermanentError(DurableError):
    """Raise it in a step to fail at once, without another attempt.

    Example:
        >>> @durable.step
        ... def charge(cents: int) -> None:
        ...     raise durable.PermanentError("the card is gone")
        >>> @durable.workflow
        ... def pay(cents: int) -> None:
        ...     charge(cents)
        >>> try:
        ...     pay(100)
        ... except durable.PermanentError as exc:
        ...     print(exc)
        the card is gone
    """


class Parked(Retry):
    """What Celery is told when a run waits in Postgres: acknowledge, re-send nothing.

    ``on_retry`` and the ``task_retry`` signal get it, so that an alert can
    tell a sleep from an error: ``reason`` is ``"sleep"``, ``"retry"``,
    ``"hand-back"`` and so on.
    """

    def __init__(self, reason: str, *, exc: Exception | None = None, when: float | None = None):
        super().__init__(reason, exc, when)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_parked, (self.reason, self.exc, self.when)

    def __str__(self) -> str:
        due = "" if self.when is None else f", due in {self.when:.3g} s"
        cause = "" if self.exc is None else f": {self.exc!r}"
        return f"Parked ({self.reason}{due}){cause}"


def _rebuild_parked(reason: str, exc: Exception | None, when: float | None) -> Parked:
    return Parked(reason, exc=exc, when=when)


class Suspend(BaseException):
    """Unwinds the body of a workflow that gives its slot back.

    It is a ``BaseException`` so that a user's ``except Exception`` cannot
    swallow it; should a bare ``except`` do so, the run remembers, and the
    next verb raises it again.
    """
