"""A journal in memory that remembers, so that a run can be tried again without a Postgres."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from durable.classify import Classifier
from durable.clock import Clock
from durable.codec import Codec
from durable.errors import Suspend
from durable.execution import Execution, Services
from durable.history import History
from durable.journal import Parking
from durable.store.runs import Park
from durable.store.steps import StepAttempt, Written


class Time:
    """A clock that stands still until somebody sleeps; its dice always show a half."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.clock = Clock(
            monotonic=lambda: sum(self.slept), sleep=self.slept.append, random=lambda: 0.5
        )


class Transaction:
    """Stands for a SQLAlchemy session with its commit; ``answers`` are given one by one."""

    def __init__(self, ledger: Ledger) -> None:
        self.session = self
        self.ledger = ledger
        self.rolled_back = 0

    def commit(self, step: StepAttempt) -> Written | None:
        answer = self.ledger.commits.pop(0) if self.ledger.commits else Written.RECORDED
        if isinstance(answer, Exception):
            raise answer
        if answer in {Written.RECORDED, Written.CANCEL, Written.PAUSE}:
            self.ledger.end(step)
        return answer

    def rollback(self) -> None:
        self.rolled_back += 1


@dataclass
class Ledger:
    """What a run has written so far, and how its next writes are answered."""

    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    rows: list[StepAttempt] = field(default_factory=list)
    parks: list[Park] = field(default_factory=list)
    answers: list[Written | Exception] = field(default_factory=list)
    commits: list[Written | Exception | None] = field(default_factory=list)
    parking: Parking = Parking.PARKED
    was_committed: bool = False
    may_start: Callable[[Execution], None] = lambda _: None
    progress: list[str] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    time: Time = field(default_factory=Time)
    moment: datetime = datetime(2030, 1, 1, tzinfo=timezone.utc)
    claims: int = 0
    inline: bool = False

    # --- what an execution asks of a journal

    def before_body(self, execution: Execution) -> None:
        self.may_start(execution)

    def record(self, step: StepAttempt) -> Written:
        answer = self.answers.pop(0) if self.answers else Written.RECORDED
        if isinstance(answer, Exception):
            raise answer
        if answer in {Written.RECORDED, Written.CANCEL, Written.PAUSE}:
            self.end(step)
        return answer

    def open_step(self, step: StepAttempt, *, once: bool) -> Written:
        answer = self.answers.pop(0) if self.answers else Written.RECORDED
        if isinstance(answer, Exception):
            raise answer
        if answer is Written.RECORDED or (answer is not Written.FENCED and not once):
            self.end(step)
        return answer

    def end(self, step: StepAttempt) -> None:
        """Put a row into the place of the open one, whose details stay, or add it."""
        key = (step.branch, step.ordinal, step.name, step.attempt)
        for index, row in enumerate(self.rows):
            if (row.branch, row.ordinal, row.name, row.attempt) == key and row.status == "running":
                assert step.opened
                self.rows.pop(index)
                step = step._replace(output=step.output or row.output)
                break
        self.rows.append(step)

    def park(self, how: Park, failed: StepAttempt | None = None) -> Parking:
        if self.parking is Parking.PARKED:
            self.parks.append(how)
            if failed is not None:
                self.end(failed)
        return self.parking

    def transaction(self) -> Any:
        self.transactions.append(Transaction(self))
        return self.transactions[-1]

    def was_recorded(self, step: StepAttempt) -> bool:
        return self.was_committed

    def call(self, query: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Say that the run is still this claim's."""
        return True

    def set_progress(self, progress: str) -> None:
        self.progress.append(progress)

    def database_now(self) -> datetime:
        self.moment += timedelta(seconds=1)
        return self.moment

    # --- what tests do

    def execution(self) -> Execution:
        """Claim the run once more, with all that it has written."""
        self.claims += 1
        rows = [
            (s.branch, s.ordinal, s.name, s.attempt, s.kind, s.status, s.output, s.error, s.context)
            for s in self.rows
        ]
        services = Services(Codec(), Classifier(), self.time.clock, (__name__, "tests"))
        return Execution(
            id=self.id,
            name="shop.order",
            attempt=self.claims,
            history=History(rows),
            journal=self,
            services=services,
        )

    def run(self, body: Callable[[], Any]) -> Attempt:
        """Execute a workflow's body once, as a worker does."""
        return self.run_as(Attempt(self.execution()), body)

    def run_as(self, attempt: Attempt, body: Callable[[], Any]) -> Attempt:
        """Execute the body as this claim of the run."""
        with attempt.execution.active():
            try:
                attempt.value = body()
            except Suspend:
                pass
            except Exception as exc:  # noqa: BLE001 - how the run ends
                attempt.error = exc
        return attempt

    def names(self) -> list[tuple[str, int, str]]:
        return [(row.name, row.attempt, row.status) for row in self.rows]


@dataclass
class Attempt:
    """How one execution of the body came out."""

    execution: Execution
    value: Any = None
    error: Exception | None = None

    @property
    def stopped(self) -> str | None:
        suspension = self.execution.suspension
        return None if suspension is None else suspension.reason
