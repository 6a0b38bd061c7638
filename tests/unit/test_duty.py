"""A background duty outlives its errors, says them once at length, and ends when asked."""

from __future__ import annotations

import logging
import threading

import pytest

from durable.errors import DatabaseUnavailable
from durable.worker.duty import Duty
from tests.harness import wait_for


class Chore(Duty):
    def __init__(self, *errors: Exception, recover_fails: bool = False) -> None:
        super().__init__("chore", 0.001)
        self.errors = list(errors)
        self.ticks = 0
        self.recoveries = 0
        self.recover_fails = recover_fails

    def tick(self) -> None:
        self.ticks += 1
        if self.errors:
            raise self.errors.pop(0)

    def recover(self) -> None:
        self.recoveries += 1
        if self.recover_fails:
            raise OSError("the connection could not even be closed")


def done(chore: Chore) -> None:
    chore.start()
    wait_for(lambda: not chore.errors and chore.ticks > 3, what="the chore to go on")
    chore.stop()


def test_it_ticks_until_it_is_stopped() -> None:
    chore = Chore()
    done(chore)
    assert chore.stopping
    assert not any(thread.name == "chore" for thread in threading.enumerate())
    ticks = chore.ticks
    assert chore.ticks == ticks


def test_an_error_is_logged_and_the_next_tick_starts_afresh(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chore = Chore(ValueError("one"), ValueError("two"))
    with caplog.at_level(logging.WARNING):
        done(chore)
    assert [record.getMessage() for record in caplog.records] == [
        "chore: one",
        "chore: two",
        "chore: works again",
    ]
    assert [bool(record.exc_info) for record in caplog.records] == [True, False, False]
    assert chore.recoveries == 2


def test_a_database_that_is_away_is_one_line_without_a_traceback_however_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        done(Chore(*[DatabaseUnavailable("no connection")] * 5))
    assert [record.getMessage() for record in caplog.records] == [
        "chore: no connection",
        "chore: works again",
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_a_recovery_that_fails_does_not_end_it() -> None:
    done(Chore(ValueError("one"), recover_fails=True))


def test_it_can_be_stopped_by_itself_and_before_it_started() -> None:
    class Once(Chore):
        def tick(self) -> None:
            super().tick()
            self.stop()

    once = Once()
    once.start()
    wait_for(lambda: once.stopping and not once._thread.is_alive(), what="its end")  # type: ignore[union-attr]
    assert once.ticks == 1
    Chore().stop()
