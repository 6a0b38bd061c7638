"""Where a run writes: patiently to Postgres, or nowhere when it runs inline."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, cast

import pytest

from durable.errors import DatabaseUnavailable, NotInWorkflow, Suspend
from durable.journal import MemoryJournal, Parking, PostgresJournal
from durable.lease import Lease
from durable.store import queries, runs, steps
from durable.store.pool import Database
from durable.store.runs import Park
from tests.harness.ledger import Ledger


class Recorder(Database):
    """Notes which query is called how, and answers with ``answer``."""

    def __init__(self, answer: object = None) -> None:
        super().__init__(lambda: "")
        self.calls: list[tuple[str, object]] = []
        self.answer = answer

    def call(self, query: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(("call", query))
        raise DatabaseUnavailable("away")

    def patiently(self, query: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(("patiently", query))
        return self.answer


class Claim:
    id = "run"
    attempt = 1
    wake = 0


def journal(answer: object = None, lease: Lease | None = None) -> tuple[PostgresJournal, Recorder]:
    database = Recorder(answer)
    held = lease or Lease(10.0, lambda: 0.0)
    return PostgresJournal(database, cast("Any", None), held, cast("runs.Claim", Claim())), database


@pytest.mark.parametrize(
    ("ask", "query"),
    [
        (lambda journal: journal.record(None), steps.record),
        (lambda journal: journal.park(Park("sleeping", "retry")), runs.park),
        (lambda journal: journal.was_recorded(None), steps.was_recorded),
        (lambda journal: journal.set_progress("{}"), runs.set_progress),
        (lambda journal: journal.database_now(), queries.now),
    ],
)
def test_a_database_that_is_away_is_waited_for_and_no_failure_of_the_run(
    ask: Callable[[PostgresJournal], object], query: object
) -> None:
    written, database = journal()
    ask(written)
    assert database.calls == [("patiently", query)]


@pytest.mark.parametrize(("ours", "parking"), [(True, Parking.PARKED), (False, Parking.FENCED)])
def test_a_park_of_somebody_elses_run_is_told_apart(ours: bool, parking: Parking) -> None:
    assert journal(ours)[0].park(Park("sleeping", "retry")) is parking


def test_a_missed_lease_starts_no_further_body() -> None:
    now = [0.0]
    lease = Lease(10.0, lambda: now[0])
    lease.renew(0.0)
    written, database = journal(True, lease)
    execution = Ledger().execution()
    written.before_body(execution)
    now[0] = 10.0
    with pytest.raises(Suspend):
        written.before_body(execution)
    assert execution.suspension is not None
    assert execution.suspension.reason == "lease missed"
    assert database.calls == []


@pytest.mark.parametrize(("ours", "reason"), [(True, "hand-back"), (False, "fenced")])
def test_a_warm_shutdown_gives_the_run_back_at_the_next_step(ours: bool, reason: str) -> None:
    lease = Lease(10.0, lambda: 0.0)
    lease.renew(0.0)
    lease.begin_shutdown()
    written, _ = journal(ours, lease)
    ledger = Ledger(parking=Parking.PARKED if ours else Parking.FENCED)
    execution = ledger.execution()
    with pytest.raises(Suspend):
        written.before_body(execution)
    assert execution.suspension is not None
    assert execution.suspension.reason == reason


# --- inline


MOMENT = datetime(2030, 1, 1, tzinfo=timezone.utc)


def test_inline_nothing_waits_and_nothing_is_kept() -> None:
    inline = MemoryJournal(lambda: MOMENT)
    assert inline.park(Park("sleeping", "retry", delay=3600.0)) is Parking.SKIPPED
    assert inline.database_now() == MOMENT


def test_inline_there_is_no_session_and_the_error_says_why() -> None:
    with pytest.raises(NotInWorkflow) as caught:
        MemoryJournal(lambda: MOMENT).transaction()
    assert str(caught.value) == (
        "durable.session() needs a run in a worker: this one runs inline (called directly, or"
        " task_always_eager), where there is no database"
    )
