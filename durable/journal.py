"""Where an execution writes: Postgres in a worker, memory when run inline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from durable.errors import NotInWorkflow
from durable.store import long_steps, queries, runs, steps
from durable.store.steps import StepAttempt, Written

if TYPE_CHECKING:
    from datetime import datetime

    from durable.execution import Execution
    from durable.lease import Lease
    from durable.store.pool import Database
    from durable.store.runs import Park
    from durable.store.sessions import Sessions, StepTransaction
    from durable.store.waits import Wait

T = TypeVar("T")


class Parking(Enum):
    """What became of a wish to park."""

    PARKED = "parked"
    FENCED = "fenced"  # the run is another worker's by now
    SKIPPED = "skipped"  # nothing waits here: go on at once


class Journal(Protocol):
    """What an execution needs of the place it writes to.

    Attributes:
        inline: whether nothing is stored: the run is executed once, here and now.
    """

    @property
    def inline(self) -> bool:
        """See above."""

    def before_body(self, execution: Execution) -> None:
        """Raise `Suspend` if this worker may start nothing more."""

    def record(self, step: StepAttempt) -> Written:
        """Store an attempt of a step."""

    def open_step(self, step: StepAttempt, *, once: bool) -> Written:
        """Store that a step is running, and what it reports; see `store.long_steps`."""

    def park(self, how: Park, failed: StepAttempt | None = None) -> Parking:
        """Give the run back."""

    def transaction(self) -> StepTransaction:
        """Begin the transaction of a step that asked for `durable.session()`."""

    def was_recorded(self, step: StepAttempt) -> bool:
        """Tell whether a commit whose answer was lost took place."""

    def set_progress(self, progress: str) -> None:
        """Store the progress of the run."""

    def database_now(self) -> datetime:
        """Read the database's clock."""

    def wait(self, query: Callable[..., Wait | None], *args: Any, **kwargs: Any) -> Wait | None:
        """Run a query of `store.waits`. None: the run is another worker's by now."""

    def call(self, query: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run another query of the store on behalf of the run."""


@dataclass(frozen=True, slots=True)
class PostgresJournal:
    """Writes for one claim of one run, each fenced by the claim's attempt.

    Writes are patient: the work that they record has been done, so they wait
    for a database that is away. If a peer took the run over meanwhile, the
    fence says so.
    """

    database: Database
    sessions: Sessions
    lease: Lease
    claim: runs.Claim
    inline: bool = False

    def before_body(self, execution: Execution) -> None:
        """Stop at this boundary in a warm shutdown, or when the lease was missed."""
        if self.lease.open():
            return
        if self.lease.shutting_down:
            suspend = execution.park(runs.Park("pending", "hand-back"))
            assert suspend is not None
            raise suspend
        raise execution.suspend("lease missed")

    def record(self, step: StepAttempt) -> Written:
        """Store an attempt of a step: one round trip, one commit."""
        return self.database.patiently(steps.record, step)

    def open_step(self, step: StepAttempt, *, once: bool) -> Written:
        """Store that a step is running: one round trip, one commit."""
        return self.database.patiently(long_steps.open_step, step, once=once)

    def park(self, how: Park, failed: StepAttempt | None = None) -> Parking:
        """Park the run, in one statement with the failed attempt that makes it wait."""
        claim = self.claim
        ours = self.database.patiently(runs.park, claim.id, claim.attempt, claim.wake, how, failed)
        return Parking.PARKED if ours else Parking.FENCED

    def transaction(self) -> StepTransaction:
        """Begin a transaction; it ends with the step."""
        return self.sessions.open()

    def was_recorded(self, step: StepAttempt) -> bool:
        """Look for the step of a commit whose answer was lost."""
        return self.database.patiently(steps.was_recorded, step)

    def set_progress(self, progress: str) -> None:
        """Store the progress of the run, if it is still this claim's.

        Patiently: a database that is away is no failure of the step that reports.
        """
        self.database.patiently(runs.set_progress, self.claim.id, self.claim.attempt, progress)

    def database_now(self) -> datetime:
        """Read the database's clock; one that is away is no failure of the run."""
        moment: datetime = self.database.patiently(queries.now)
        return moment

    def wait(self, query: Callable[..., Wait | None], *args: Any, **kwargs: Any) -> Wait | None:
        """Begin a wait or look at it, for as long as Postgres takes to answer."""
        return self.database.patiently(query, *args, **kwargs)

    def call(self, query: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a query, for as long as Postgres takes to answer."""
        return self.database.patiently(query, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class MemoryJournal:
    """For eager mode and direct calls: nothing is stored, pauses are skipped."""

    utc_now: Callable[[], datetime]
    inline: bool = True

    def before_body(self, execution: Execution) -> None:
        """Nothing can have taken the run away."""

    def record(self, step: StepAttempt) -> Written:
        """Forget it: an inline run is never replayed."""
        return Written.RECORDED

    def open_step(self, step: StepAttempt, *, once: bool) -> Written:
        """Forget it."""
        return Written.RECORDED

    def park(self, how: Park, failed: StepAttempt | None = None) -> Parking:
        """Go on at once."""
        return Parking.SKIPPED

    def transaction(self) -> Any:
        """Refuse: there is no database behind an inline run."""
        raise NotInWorkflow(
            "durable.session() needs a run in a worker: this one runs inline (called directly, or"
            " task_always_eager), where there is no database"
        )

    def was_recorded(self, step: StepAttempt) -> bool:
        """Never asked: there are no transactions."""
        return True

    def set_progress(self, progress: str) -> None:
        """Forget it."""

    def database_now(self) -> datetime:
        """Read this process's clock."""
        return self.utc_now()

    def wait(self, query: Callable[..., Wait | None], *args: Any, **kwargs: Any) -> Wait | None:
        """Refuse: nobody could end the wait."""
        raise NotInWorkflow(
            "this run is executed inline (called directly, or task_always_eager), where nothing"
            " can be waited for: start it with .delay() and a worker, or replace the wait in a test"
        )

    def call(self, query: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Refuse: there is no database."""
        raise NotInWorkflow("this run is executed inline, without a database")
