"""One attempt of one run: replay what is recorded, run what is not, record it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from durable import context
from durable.attempts import Ended, Outcome, attempts, is_settled, replayed, settled
from durable.branch import Branch, Frame, Suspension, Waiting, current_branch
from durable.encryption import LOCKED_OUT, LOCKED_OUT_REST
from durable.errors import (
    EncryptionError,
    NonDeterministicWorkflow,
    NotInWorkflow,
    StoreError,
    Suspend,
    UnsupportedByDurable,
)
from durable.failures import encode_failure
from durable.history import History, Recorded
from durable.journal import Parking
from durable.masking import Mask
from durable.retry import RetryPolicy
from durable.steps import Step, StepSignature
from durable.store import compensation
from durable.store.runs import Park
from durable.store.steps import StepAttempt, Written
from durable.store.waits import Place, Wait, decrypted
from durable.timeouts import limited

if TYPE_CHECKING:
    from durable.classify import Classifier
    from durable.clock import Clock
    from durable.codec import Codec
    from durable.journal import Journal


__all__ = [
    "SENDING",
    "Branch",
    "Driver",
    "Execution",
    "Frame",
    "Services",
    "Suspension",
    "Waiting",
    "is_settled",
    "settled",
]

#: How often the broker or the database is asked to take what the body sends.
SENDING = RetryPolicy(max_retries=None)


@dataclass(frozen=True, slots=True)
class Services:
    """What every execution of an app shares."""

    codec: Codec
    classifier: Classifier
    clock: Clock
    trusted_packages: Sequence[str]
    mask: Mask = field(default_factory=Mask)


class Driver(Protocol):
    """The event loop that drives the body of an ``async def`` workflow."""

    def step(
        self, step: Step[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Return the recorded outcome of an async step, or produce it."""

    def wait(self, waiting: Waiting) -> Coroutine[Any, Any, Wait]:
        """Let the calling branch wait; the others go on."""

    def stop(self, waiting: Waiting, wait: Wait) -> Suspend:
        """Stop the calling branch, which cannot wait; the others go on."""

    def check(self) -> None:
        """Raise `Suspend` again if the calling branch has stopped already."""

    async def deliver(self, rank: int | None) -> None:
        """Wait until it is the turn of an outcome with this rank; None: a new one."""


#: What makes the outcome of a run of the coroutine of its body.
Enter = Callable[["Execution", Coroutine[Any, Any, Any]], Any]


@dataclass
class Execution:
    """The run whose body is being executed here and now.

    `suspension` is sticky: a ``finally`` or a bare ``except`` of the user's
    may get in the way of `Suspend`, so the next verb raises it again, and the
    boundary with Celery trusts the mark and not what comes out of the body.

    `driver` is None for a plain body. `enter`, taken by the first ``async def``
    body that is called, runs it.

    `sole_step`: the run is one step and nothing else, so its result is not
    recorded twice; a crash before the run's end has the step in flight.

    `compensates`: that it has something to undo is stored. `halt`: why nothing
    may begin that is not recorded: the body is replayed for what it registers.
    `undoing`: the body is over, and undo steps are executed.
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
    sole_step: bool = False
    driver: Driver | None = None
    enter: Enter | None = None
    passes: int = 0
    version: str | None = None
    encode_arguments: Callable[[Sequence[Any], Mapping[str, Any]], str] | None = None
    next_input: str | None = None
    compensates: bool = False
    compensations: list[StepSignature[Any]] = field(default_factory=list)
    halt: str | None = None
    undoing: bool = False

    @property
    def branch(self) -> Branch:
        """The line of steps that the calling code belongs to."""
        return current_branch.get(None) or self.root

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
        branch = current_branch.set(self.root)
        token = context.running.set(self)
        try:
            yield
        finally:
            context.running.reset(token)
            current_branch.reset(branch)

    def check(self) -> None:
        """Raise `Suspend` again if this execution has stopped already."""
        if self.driver is not None:
            self.driver.check()
        elif self.suspension is not None:
            raise Suspend(self.suspension.reason)

    def suspend(
        self,
        reason: str,
        due_in: float | None = None,
        cause: Exception | None = None,
        park: Park | None = None,
    ) -> Suspend:
        """Note that this execution stops here; the caller raises what is returned."""
        self.suspension = Suspension(reason, due_in, cause, park)
        return Suspend(reason)

    def park(
        self, how: Park, failed: StepAttempt | None = None, cause: Exception | None = None
    ) -> Suspend | None:
        """Give the run back; the caller raises what is returned. None: waiting is skipped here.

        With branches beside this one it is given back when their steps have ended.
        """
        reason = "paused" if how.status == "paused" else how.reason
        if self.driver is not None and not self.journal.inline:
            if self.suspension is not None:
                return Suspend(self.suspension.reason)
            return self.suspend(reason, how.delay, cause, how)
        parking = self.journal.park(how, failed)
        if parking is Parking.SKIPPED:
            return None
        if parking is Parking.FENCED:
            return self.suspend("fenced")
        return self.suspend(reason, how.delay, cause)

    def settle(self) -> None:
        """Park as a branch has asked for, now that no other works."""
        how = self.suspension.park if self.suspension is not None else None
        if how is not None and self.journal.park(how) is Parking.FENCED:
            self.suspend("fenced")

    def before_new(self) -> None:
        """Raise `Suspend` if nothing more may begin here that is not recorded.

        In a body with branches this one stands still then: the others come to the end
        of what is recorded too, and register on the way what undoes it.
        """
        if self.halt is None:
            self.journal.before_body(self)
        elif self.driver is None:
            raise self.suspend(self.halt)
        else:
            halted = Wait("running")
            raise self.driver.stop(Waiting(lambda: halted, "sleeping", self.halt), halted)

    # --- what undoes

    def compensate(self, undo: StepSignature[Any]) -> None:
        """Register what undoes something: also in an execution that has stopped.

        The step before may be the one whose record said so.
        """
        if not (self.compensates or self.journal.inline):
            if not self.journal.call(compensation.mark, self.id, self.attempt):
                raise self.suspend("fenced")
            self.compensates = True
        self.compensations.append(undo)

    def begin_undo(self) -> None:
        """Go on with the line of undo steps, whatever has stopped the body."""
        self.suspension, self.halt, self.undoing = None, None, True
        self.root = Branch(compensation.BRANCH, next_ordinal=1)

    def to_undo(self) -> Iterator[StepSignature[Any]]:
        """Give out what is registered, the newest first."""
        while self.compensations:
            yield self.compensations.pop()

    # --- steps

    def step(
        self,
        step: Step[Any, Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        kind: str = "run",
    ) -> Any:
        """Return the recorded outcome of the step at this place, or produce it."""
        core = attempts(self, step, kind)
        answer: Any = None
        try:
            while True:
                todo = core.send(answer)
                if isinstance(todo, Frame):
                    if todo.once:
                        self.intend(todo)
                    answer = self._run(todo, step, args, kwargs)
                elif isinstance(todo, Waiting):
                    answer = self.wait(todo)
                else:
                    self.services.clock.sleep(todo)
                    answer = None
        except StopIteration as end:
            outcome: Outcome = end.value
        return outcome.told()

    def _run(
        self, frame: Frame, step: Step[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Ended:
        clock = self.services.clock.monotonic
        branch = self.branch
        started = clock()
        branch.frame = frame
        try:
            if step.timeout is None:
                value = step.function(*args, **kwargs)
            else:
                with limited(step.timeout, step.name, clock):
                    value = step.function(*args, **kwargs)
        except Exception as exc:  # noqa: BLE001 - whatever a step raises is its outcome
            return Ended(None, exc, clock() - started)
        except BaseException:
            frame.roll_back()
            raise
        finally:
            branch.frame = None
        return Ended(value, None, clock() - started)

    def async_step(
        self, step: Step[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Like `step`, for an async function: to be awaited.

        Raises:
            UnsupportedByDurable: the workflow is no ``async def``.
        """
        if self.driver is None:
            raise UnsupportedByDurable(
                f"the async step {step.name!r} was called in workflow {self.name!r}, which has no"
                " event loop: make the workflow an `async def` and await the step, or make the"
                " step a plain `def`"
            )
        return self.driver.step(step, args, kwargs)

    def past(self, branch: Branch, ordinal: int, name: str, kind: str) -> tuple[Recorded, ...]:
        """Look up the attempts at a place; something else recorded there pauses the run."""
        try:
            return self.history.attempts(branch.path, ordinal, name, kind)
        except NonDeterministicWorkflow as exc:
            raise self.pause(exc) from exc

    def pause(self, exc: NonDeterministicWorkflow) -> BaseException:
        """Stop the run for a person; the caller raises what is returned."""
        return self.park(Park("paused", str(exc)), cause=exc) or exc

    def record(
        self,
        frame: Frame,
        status: str,
        seconds: float,
        *,
        output: str | None = None,
        error: str | None = None,
        verdict: str | None = None,
    ) -> StepAttempt:
        """Make the record of an attempt."""
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
            frame.opened,
        )

    def write(self, record: StepAttempt) -> None:
        """Store an attempt. What Postgres can never take ends the run, whoever swallows it."""
        try:
            written = self.journal.record(record)
        except StoreError as exc:
            raise self.suspend("unstorable", cause=exc) from exc
        self.obey(written)

    def obey(self, written: Written) -> None:
        """Act on how a write was answered."""
        if written is Written.RECORDED:
            return
        if written is Written.FENCED:
            raise self.suspend("fenced")
        if self._stops(written):
            self.suspend(written.value)  # the next verb, or the end of the body, acts on it

    def _stops(self, written: Written) -> bool:
        """Tell whether this execution ends; a cancel does not keep a run from undoing."""
        return written is not Written.RECORDED and not (written is Written.CANCEL and self.undoing)

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

    # --- long steps

    def intend(self, frame: Frame) -> None:
        """Store, before its body, that a step which may run only once is about to.

        Raises:
            Suspend: it is not.
        """
        frame.opened = True
        written = self._open(frame, None)
        if self._stops(written):
            raise self.suspend(written.value)

    def heartbeat(self, details: object) -> None:
        """Store what the running step reports.

        Raises:
            Suspend: the run is another worker's, or is to stop.
        """
        frame = self._current_frame("heartbeat")
        if not frame.once:  # that is better left to end
            self.check()
        what = f"the heartbeat details of step {frame.name!r}"
        text = None if details is None else self.services.codec.encode(details, what)
        frame.opened = True
        written = self._open(frame, text)
        frame.reported = text or frame.reported
        if written is Written.FENCED or (self._stops(written) and not frame.once):
            raise self.suspend(written.value)

    def heartbeat_details(self) -> Any:
        """Return what the attempt before the running one has reported last."""
        text = self._current_frame("heartbeat_details").handed_over
        return None if text is None else self.services.codec.decode(text)

    def _open(self, frame: Frame, details: str | None) -> Written:
        row = self.record(frame, "running", 0.0, output=details)
        try:
            return self.journal.open_step(row, once=frame.once)
        except StoreError as exc:
            raise self.suspend("unstorable", cause=exc) from exc

    # --- what `durable.*` verbs ask for

    def value(self, name: str) -> Any:
        """Return a recorded reading of the database's clock."""
        self.check()
        if self.frame is not None:
            return self.journal.database_now()
        ordinal = self.branch.take()
        past = self.past(self.branch, ordinal, name, "value")
        if past:
            return replayed(self, past[-1]).told()
        self.before_new()
        output = self.services.codec.encode(self.journal.database_now(), name)
        frame = Frame(name, self.branch.path, ordinal, 1, "value")
        self.write(self.record(frame, "succeeded", 0.0, output=output))
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
        past = self.past(branch, ordinal, name, kind)
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
        self.before_new()
        try:
            wait = ask()
            if wait is None:
                raise self.suspend("fenced")
            return decrypted(wait, self.services.codec)
        except EncryptionError as exc:
            how = Park("sleeping", f"{LOCKED_OUT}: {exc}", delay=LOCKED_OUT_REST)
            raise self.park(how, cause=exc) or exc from exc

    def wait(self, waiting: Waiting) -> Wait:
        """Look whether a wait is over; park until it may be."""
        wait = self.ask(waiting.ask)
        if wait.over:
            return wait
        if self.driver is not None:
            raise self.driver.stop(waiting, wait)
        suspend = self.park(
            Park(waiting.status, waiting.reason, delay=wait.due_in), cause=waiting.cause
        )
        assert suspend is not None  # what is executed inline has not got here
        raise suspend

    # --- other tasks

    def new_task_id(self, name: str = "") -> str:
        """Return an id for a task to be started here: the same on every replay.

        In a step those of one ``name`` are counted, so that an attempt which
        starts other tasks than the last one does not give them each other's ids.
        """
        frame = self.frame
        if frame is None:
            seed = f"{self.branch.path}/{self.branch.draw()}"
        else:
            counted = frame.tasks = frame.tasks or Counter()  # made here: most steps start nothing
            counted[name] += 1
            seed = f"{frame.branch}/{frame.ordinal}/{frame.name}/{name}/{counted[name]}"
        return str(uuid.uuid5(uuid.UUID(self.id), f"task/{self.generation}/{seed}"))

    def dispatch(self, name: str, send: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Start tasks once, however often the body replays.

        Args:
            name: of the task or canvas.
            send: starts it; returns what is recorded, of which a handle is made.
        """
        started: Mapping[str, Any] = self.step(Step(send, name, SENDING), (), {}, "dispatch")
        return started

    @property
    def _pass(self) -> str:
        """Name this pass: its first step is another one than that of the pass before."""
        return f"{self.id}/{self.passes}" if self.passes else self.id

    def note(self, record: StepAttempt) -> None:
        """Store what is no step: that something was decided at a place."""
        self.write(record)

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
