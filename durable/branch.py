"""Lines of steps: the body of a workflow is one, each asyncio task that it starts another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from durable.store.runs import Park
    from durable.store.sessions import StepTransaction
    from durable.store.waits import Wait

#: The line of steps that this thread, greenlet or asyncio task is executing.
current_branch: ContextVar[Branch] = ContextVar("durable_branch")


@dataclass(slots=True)
class Branch:
    """A line of steps, one after the other. The body of a workflow is branch ``""``.

    Attributes:
        path: the number of each branch from the outermost to this one.
        frame: the step whose body is running in it; None between steps.
        children: how many branches have left it so far.
        stopped: whether it goes no further in this execution; others may.
    """

    path: str = ""
    next_ordinal: int = 0
    draws: int = 0
    frame: Frame | None = None
    children: int = 0
    stopped: bool = False

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

    def fork(self) -> Branch:
        """Begin the next branch that leaves this one: ``"0"``, ``"1"``; of ``"0"``, ``"0.0"``."""
        number = self.children
        self.children += 1
        path = f"{self.path}.{number}" if self.path else str(number)
        return Branch(path, stopped=self.stopped)


@dataclass(slots=True)
class Frame:
    """The step attempt whose body is running.

    Attributes:
        once: whether no other attempt may ever be made.
        opened: whether a row of it may be there already.
        reported: JSON text of the newest details that it reported.
        handed_over: those that an earlier one reported, or this one before it was cut off.
    """

    name: str
    branch: str
    ordinal: int
    attempt: int
    kind: str = "run"
    transaction: StepTransaction | None = None
    tasks: Counter[str] | None = None
    once: bool = False
    opened: bool = False
    reported: str | None = None
    handed_over: str | None = None

    def roll_back(self) -> None:
        """Throw away what the body wrote through its session."""
        if self.transaction is not None:
            self.transaction.rollback()


@dataclass(frozen=True, slots=True)
class Suspension:
    """That, and why, this execution has stopped.

    Attributes:
        reason: ``retry``, ``fenced``, ``cancel``, ``hand-back``, ``paused``.
        due_in: seconds, if known.
        cause: the error behind it.
        park: how the run is to be parked, as soon as no branch of it works any more.
    """

    reason: str
    due_in: float | None = None
    cause: Exception | None = None
    park: Park | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Something that a run waits for.

    Attributes:
        ask: begins the wait, or looks whether it is over; None: fenced.
        status: of the run meanwhile, ``sleeping`` or ``waiting``.
        reason: likewise, for people.
        cause: the error behind it.
    """

    ask: Callable[[], Wait | None]
    status: str
    reason: str
    cause: Exception | None = None
