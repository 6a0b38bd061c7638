"""One attempt of one run: replay what is recorded, run what is not, record it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from durable import context
from durable.errors import (
    NonDeterministicWorkflow,
    NotInWorkflow,
    PayloadError,
    StoreError,
    Suspend,
)
from durable.failures import decode_failure, encode_failure
from durable.history import History, Recorded
from durable.journal import Parking
from durable.retry import RetryPolicy
from durable.steps import Step
from durable.store.runs import Park
from durable.store.steps import StepAttempt, Written
from durable.store.waits import Place
from durable.timeouts import limited

if TYPE_CHECKING:
    from durable.classify import Classifier
    from durable.clock import Clock
    from durable.codec import Codec
    from durable.journal import Journal
    from durable.retry import Decision
    from durable.store.sessions import StepTransaction
    from durable.store.waits import Wait


#: The line of steps that this thread, greenlet or asyncio task is executing.
_branch: ContextVar[Branch] = ContextVar("durable_branch")

#: How often the broker or the database is asked to take what the body sends.
SENDING = RetryPolicy(max_retries=None)

#: Before a step runs again whose session could not be committed, in seconds.
_COMMIT_PAUSE = 0.2


@dataclass(frozen=True, slots=True)
class Services:
    """What every execution of an app shares."""

    codec: Codec
    classifier: Classifier
    clock: Clock
    trusted_packages: Sequence[str]


@dataclass(slots=True)
class Branch:
    """A line of steps, one after the other. The body of a workflow is branch ``""``.

    Attributes:
        path: the number of each branch from the outermost to this one.
        frame: the step whose body is running in it; None between steps.
    """

    path: str = ""
    next_ordinal: int = 0
    draws: int = 0
    frame: Frame | None = None

    def take(self) -> int:
        """Take the next place in the line."""
        ordinal = self.next_ordinal
        self.next_ordinal += 1
        self.draws = 0
        return ordinal

    def draw(self) -> str:
        """Name this draw between two places. It takes none: nothing of it is recorded."""
        self.draws += 1
        return f"{self.next_ordinal}.{self.draws}"


@dataclass(slots=True)
class Frame:
    """The step attempt whose body is running."""

    name: str
    branch: str
    ordinal: int
    attempt: int
    kind: str = "run"
    transaction: StepTransaction | None = None
    tasks: int = 0


@dataclass(frozen=True, slots=True)
class Suspension:
    """That, and why, this execution has stopped.

    Attributes:
        reason: ``retry``, ``fenced``, ``cancel``, ``hand-back``, ``paused``.
        due_in: seconds, if known.
        cause: the error behind it.
    """

    reason: str
    due_in: float | None = None
    cause: Exception | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Something that a run waits for.

    Attributes:
        ask: begins the wait, or looks whether it is over; None: fenced.
        status: of the run meanwhile, ``sleeping`` or ``waiting``.
        reason: likewise, for people.
    """

    ask: Callable[[], Wait | None]
    status: str
    reason: str


class _Success(NamedTuple):
    output: str
    seconds: float


class _Failure(NamedTuple):
    error: Exception
    seconds: float
    not_stored: bool = False


@dataclass
class Execution:
    """The run whose body is being executed here and now.

    `suspension` is sticky: a ``finally`` or a bare ``except`` of the user's
    may get in the way of `Suspend`, so the next verb raises it again, and the
    boundary with Celery trusts the mark and not what comes out of the body.
    """

    id: str
    name: str
    attempt: int
    history: History
    journal: Journal
    services: Services
    generation: int = 0
    root: Branch = field(default_factory=Branch)
    suspension: Suspension | None = None
    started_tasks: set[str] = field(default_factory=set)
    passes: int = 0
    version: str | None = None
    encode_arguments: Callable[[Sequence[Any], Mapping[str, Any]], str] | None = None
    next_input: str | None = None

    @property
    def branch(self) -> Branch:
        """The line of steps that the calling code belongs to."""
        return _branch.get(None) or self.root

    @property
    def frame(self) -> Frame | None:
        """The step whose body the calling code belongs to."""
        return self.branch.frame

    @property
    def in_step(self) -> bool:
        """Whether a step's body is running, in which everything is a plain call."""
        return self.branch.frame is not None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the run that `durable.*` verbs speak of."""
        branch = _branch.set(self.root)
        token = context.running.set(self)
        try:
            yield
        finally:
            context.running.reset(token)
            _branch.reset(branch)

    def check(self) -> None:
        """Raise `Suspend` again if this execution has stopped already."""
        if self.suspension is not None:
            raise Suspend(self.suspension.reason)

    def suspend(
        self, reason: str, due_in: float | None = None, cause: Exception | None = None
    ) -> Suspend:
        """Note that this execution stops here; the caller raises what is returned."""
        self.suspension = Suspension(reason, due_in, cause)
        return Suspend(reason)

    def park(
        self, how: Park, failed: StepAttempt | None = None, cause: Exception | None = None
    ) -> Suspend | None:
        """Give the run back; the caller raises what is returned. None: waiting is skipped here."""
        parking = self.journal.park(how, failed)
        if parking is Parking.SKIPPED:
            return None
        if parking is Parking.FENCED:
            return self.suspend("fenced")
        return self.suspend("paused" if how.status == "paused" else how.reason, how.delay, cause)

    # --- steps

    def step(
        self,
        step: Step[Any, Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        kind: str = "run",
    ) -> Any:
        """Return the recorded outcome of the step at this place, or produce it."""
        self.check()
        ordinal = self.branch.take()
        past = self._past(ordinal, step.name, kind)
        if past and past[-1].settled:
            return self._replayed(past[-1])
        body = lambda: self._call(step, args, kwargs)  # noqa: E731
        return self._perform(step, kind, ordinal, list(past), body)

    def _call(self, step: Step[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if step.timeout is None:
            return step.function(*args, **kwargs)
        with limited(step.timeout, step.name, self.services.clock.monotonic):
            return step.function(*args, **kwargs)

    def _past(self, ordinal: int, name: str, kind: str) -> tuple[Recorded, ...]:
        try:
            return self.history.attempts(self.branch.path, ordinal, name, kind)
        except NonDeterministicWorkflow as exc:
            raise self.pause(exc) from exc

    def pause(self, exc: NonDeterministicWorkflow) -> BaseException:
        """Stop the run for a person; the caller raises what is returned."""
        return self.park(Park("paused", str(exc)), cause=exc) or exc

    def _replayed(self, step: Recorded) -> Any:
        if step.status == "succeeded":
            return self.services.codec.decode(step.output or "null")
        raise settled(decode_failure(step.error or "null", self.services.codec))

    def _perform(
        self,
        step: Step[Any, Any],
        kind: str,
        ordinal: int,
        past: list[Recorded],
        body: Callable[[], Any],
    ) -> Any:
        while True:
            self.journal.before_body(self)
            number = past[-1].attempt + 1 if past else 1
            frame = Frame(step.name, self.branch.path, ordinal, number, kind)
            outcome = self._attempt(frame, body)
            if isinstance(outcome, _Success):
                return self.services.codec.decode(outcome.output)
            if isinstance(outcome, _Failure):
                past.append(self._settle(step, frame, outcome, past))
            else:  # the commit of its session came to nothing: the same attempt again
                self.services.clock.sleep(_COMMIT_PAUSE)

    def _attempt(self, frame: Frame, body: Callable[[], Any]) -> _Success | _Failure | None:
        clock = self.services.clock.monotonic
        started = clock()
        branch = self.branch
        branch.frame = frame
        try:
            value = body()
        except Exception as exc:  # noqa: BLE001 - whatever a step raises is its outcome
            self._roll_back(frame)
            return _Failure(exc, clock() - started)
        except BaseException:
            self._roll_back(frame)
            raise
        finally:
            branch.frame = None
        try:
            output = self.services.codec.encode(value, f"the result of step {frame.name!r}")
            success = _Success(output, clock() - started)
            return success if self._commit(frame, success) else None
        except PayloadError as exc:
            self._roll_back(frame)
            return _Failure(exc, clock() - started, not_stored=True)
        except Exception as exc:
            if frame.transaction is None:
                raise
            return _Failure(exc, clock() - started)

    def _roll_back(self, frame: Frame) -> None:
        if frame.transaction is not None:
            frame.transaction.rollback()

    def _commit(self, frame: Frame, success: _Success) -> bool:
        """Store a result. False: nothing was stored, the body has to run again."""
        record = self._record(frame, "succeeded", success.seconds, output=success.output)
        if frame.transaction is None:
            self._write(record)
            return True
        written = frame.transaction.commit(record)
        if written is None:
            return self.journal.was_recorded(record)
        self._obey(written)
        return True

    def _write(self, record: StepAttempt) -> None:
        """Store an attempt. What Postgres can never take ends the run, whoever swallows it."""
        try:
            written = self.journal.record(record)
        except StoreError as exc:
            raise self.suspend("unstorable", cause=exc) from exc
        self._obey(written)

    def _obey(self, written: Written) -> None:
        if written is Written.FENCED:
            raise self.suspend("fenced")
        if written is Written.CONTROLLED:
            self.suspend("cancel")  # the next verb, or the end of the body, acts on it

    def _record(
        self,
        frame: Frame,
        status: str,
        seconds: float,
        *,
        output: str | None = None,
        error: str | None = None,
        verdict: str | None = None,
    ) -> StepAttempt:
        return StepAttempt(
            self.id,
            self.attempt,
            frame.branch,
            frame.ordinal,
            frame.name,
            frame.attempt,
            frame.kind,
            status,
            seconds,
            output,
            error,
            verdict,
        )

    # --- failed attempts

    def _settle(
        self, step: Step[Any, Any], frame: Frame, failure: _Failure, past: Sequence[Recorded]
    ) -> Recorded:
        """Record a failed attempt. Returns if the next one is due here; else raises."""
        exc = failure.error
        decision = self._judge(step, failure, past)
        if decision.passes:
            raise exc
        error = self.encode_error(exc)
        record = self._record(
            frame, "failed", failure.seconds, error=error, verdict=_as_context(decision)
        )
        if decision.parks:
            how = Park("sleeping", "retry", delay=decision.delay)
            if suspend := self.park(how, record, exc):
                raise suspend
        else:
            self._write(record)
            if decision.final:
                raise settled(decode_failure(error, self.services.codec)) from exc
            self.services.clock.sleep(decision.delay)
        return Recorded(
            frame.branch,
            frame.ordinal,
            frame.name,
            frame.attempt,
            frame.kind,
            "failed",
            None,
            error,
            record.context,
        )

    def _judge(self, step: Step[Any, Any], failure: _Failure, past: Sequence[Recorded]) -> Decision:
        if failure.not_stored:  # another attempt would do it all again, for the same result
            return step.policy.give_up("the step has run, but its result cannot be stored")
        return step.policy.decide(
            failure.error,
            self.services.classifier,
            [each.verdict for each in past],
            random=self.services.clock.random,
        )

    def check_complete(self) -> None:
        """Raise if the body has ended before it came to a step that it once took.

        Raises:
            NonDeterministicWorkflow: the next recorded step was not asked for.
        """
        self.history.check_end(self.branch.path, self.branch.next_ordinal)

    def encode_error(self, exc: BaseException) -> str:
        """Turn an exception into what is stored of it."""
        services = self.services
        return encode_failure(exc, services.codec, trusted_packages=services.trusted_packages)

    # --- what `durable.*` verbs ask for

    def value(self, name: str) -> Any:
        """Return a recorded reading of the database's clock."""
        self.check()
        if self.frame is not None:
            return self.journal.database_now()
        ordinal = self.branch.take()
        past = self._past(ordinal, name, "value")
        if past:
            return self._replayed(past[-1])
        self.journal.before_body(self)
        output = self.services.codec.encode(self.journal.database_now(), name)
        frame = Frame(name, self.branch.path, ordinal, 1, "value")
        self._write(self._record(frame, "succeeded", 0.0, output=output))
        return self.services.codec.decode(output)

    def derived_key(self) -> str:
        """Return text that is the same at this place of the run on every replay."""
        self.check()
        if self.frame is not None:
            raise NotInWorkflow(
                "durable.uuid4() and durable.random() belong in the body of a workflow; in a step"
                " use the standard library: the step's result is recorded anyway"
            )
        return f"{self._pass}/{self.branch.path}/{self.branch.draw()}"

    # --- what waits

    def place(self, verb: str, name: str, kind: str) -> tuple[Place, Recorded | None]:
        """Take the next place, for something to wait for; and what is recorded there, if it is over.

        Raises:
            NotInWorkflow: in a step.
        """
        self.check()
        self.refuse_in_step(verb)
        branch = self.branch
        ordinal = branch.take()
        past = self._past(ordinal, name, kind)
        over = past[-1] if past and past[-1].settled else None
        return Place(self.id, self.attempt, branch.path, ordinal, name), over

    def refuse_in_step(self, verb: str) -> None:
        """Raise `NotInWorkflow` in a step, which cannot give the worker back."""
        if self.in_step:
            raise NotInWorkflow(
                f"durable.{verb}() belongs in the body of a workflow: a step keeps its worker, it"
                " cannot wait for hours. Wait between two steps"
            )

    def ask(self, ask: Callable[[], Wait | None]) -> Wait:
        """Look whether a wait is over."""
        self.journal.before_body(self)
        wait = ask()
        if wait is None:
            raise self.suspend("fenced")
        return wait

    def wait(self, waiting: Waiting) -> Wait:
        """Look whether a wait is over; park until it may be."""
        wait = self.ask(waiting.ask)
        if wait.over:
            return wait
        suspend = self.park(Park(waiting.status, waiting.reason, delay=wait.due_in))
        assert suspend is not None  # what is executed inline has not got here
        raise suspend

    # --- other tasks

    def new_task_id(self) -> str:
        """Return an id for a task to be started here: the same on every replay."""
        frame = self.frame
        if frame is None:
            seed = f"{self.branch.path}/{self.branch.draw()}"
        else:
            frame.tasks += 1
            seed = f"{frame.branch}/{frame.ordinal}/{frame.name}/{frame.tasks}"
        return str(uuid.uuid5(uuid.UUID(self.id), f"task/{self.generation}/{seed}"))

    def dispatch(self, name: str, send: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Start tasks once, however often the body replays.

        Args:
            name: of the task or canvas.
            send: starts it; returns what the handle is made of, and under
                ``ids`` the ids of the tasks whose outcome can be waited for.
        """
        started: Mapping[str, Any] = self.step(Step(send, name, SENDING), (), {}, "dispatch")
        self.started_tasks.update(started["ids"])
        return started

    @property
    def _pass(self) -> str:
        """Name this pass: its first step is another one than that of the pass before."""
        return f"{self.id}/{self.passes}" if self.passes else self.id

    def note(self, record: StepAttempt) -> None:
        """Store what is no step: that something was decided at a place."""
        self._write(record)

    def idempotency_key(self) -> str:
        """Return the running step's key for outside calls."""
        frame = self._current_frame("idempotency_key")
        seed = f"{frame.branch}/{frame.ordinal}/{frame.name}"
        return str(uuid.uuid5(uuid.UUID(self.id), f"{seed}/{self.passes}" if self.passes else seed))

    def session(self) -> Any:
        """Return the running step's SQLAlchemy session."""
        frame = self._current_frame("session")
        if frame.transaction is None:
            frame.transaction = self.journal.transaction()
        return frame.transaction.session

    def set_progress(self, state: str, meta: object) -> None:
        """Store progress under a Celery state."""
        self.check()
        text = self.services.codec.encode({"state": state, "meta": meta}, "the progress")
        self.journal.set_progress(text)

    def where(self) -> context.Current:
        """Describe the calling code's place."""
        if self.frame is None:
            step, number = None, None
        else:
            step, number = self.frame.name, self.frame.attempt
        return context.Current(
            self.id, self.name, self.attempt, step, number, self.version, self.passes
        )

    def is_replaying(self) -> bool:
        """Whether something is recorded at the next place or after it."""
        branch = self.branch
        return self.frame is None and self.history.covers(branch.path, branch.next_ordinal)

    def _current_frame(self, verb: str) -> Frame:
        if self.frame is None:
            raise NotInWorkflow(
                f"durable.{verb}() belongs in a step: what the body of a workflow does outside"
                " its steps is done again on every replay"
            )
        return self.frame


def is_settled(exc: BaseException) -> bool:
    """Tell whether an exception is a step's recorded, final one."""
    return getattr(exc, "durable_settled", False) is True


def settled(exc: BaseException) -> BaseException:
    """Mark an exception as one that was recorded as final: the body is not repeated for it."""
    exc.__dict__["durable_settled"] = True  # a frozen dataclass takes no attributes
    return exc


def _as_context(decision: Decision) -> str:
    verdict: dict[str, object] = {"class": decision.retry_class.value, "reason": decision.reason}
    if decision.final:
        verdict["final"] = True
    else:
        verdict["retry_in"] = round(decision.delay, 3)
    if decision.limited:
        verdict["limited"] = True
    return json.dumps(verdict)
