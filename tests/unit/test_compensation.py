"""What can be registered to undo, and that a run without a database undoes too."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from celery import Celery

import durable
from durable import Durable, PermanentError, run_step
from durable.errors import NotInWorkflow, OptionError, Suspend
from durable.retry import RetryPolicy
from durable.steps import Step
from durable.store.steps import Written
from tests.harness.ledger import Ledger

app = Celery("unit_compensation")
Durable(app)
DONE: list[str] = []


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    DONE.clear()


@durable.step
def release(what: str) -> None:
    DONE.append(what)


@durable.step
async def arelease(what: str) -> None:
    await asyncio.sleep(0)
    DONE.append(what)


@app.task(name="unit_compensation.book", base=durable.Workflow)
def book(fails: bool) -> str:
    for what in ("hotel", "car"):
        run_step("reserve", DONE.append, f"+{what}")
        durable.compensate(release, what)
    if fails:
        raise PermanentError("no")
    return "booked"


@app.task(name="unit_compensation.abook", base=durable.Workflow)
async def abook() -> None:
    durable.compensate(release, "hotel")
    durable.compensate(arelease, what="car")
    raise PermanentError("no")


def test_a_direct_call_that_fails_undoes_what_it_has_done() -> None:
    assert book(False) == "booked"
    assert DONE == ["+hotel", "+car"]
    DONE.clear()
    with pytest.raises(PermanentError):
        book(True)
    assert DONE == ["+hotel", "+car", "car", "hotel"]


@pytest.mark.parametrize("eager", [False, True])
def test_so_does_an_async_one(eager: bool) -> None:
    with pytest.raises(PermanentError):
        abook.apply().get() if eager else asyncio.run(abook())
    assert DONE == ["car", "hotel"]


def test_it_belongs_in_a_body() -> None:
    with pytest.raises(NotInWorkflow):
        durable.compensate(release, "hotel")
    inside = Step(lambda: durable.compensate(release, "hotel"), "inside", RetryPolicy())
    assert isinstance(Ledger().run(inside).error, NotInWorkflow)


@pytest.mark.parametrize(
    ("fn", "problem"),
    [
        ("release", "takes a step or a function"),
        (book, "start a task in a step"),
        (arelease, "no event loop"),
        (partial(print, "released"), "without a name"),
    ],
)
def test_what_cannot_be_a_step_here_is_refused(fn: Any, problem: str) -> None:
    error = Ledger().run(lambda: durable.compensate(fn)).error
    assert isinstance(error, OptionError)
    assert problem in str(error)


def test_it_is_registered_although_the_step_before_was_told_of_a_cancel() -> None:
    ledger = Ledger(answers=[Written.CANCEL])

    def body() -> None:
        run_step("reserve", str)
        durable.compensate(release, "hotel")
        run_step("not begun", str)

    attempt = ledger.run(body)
    assert attempt.stopped == "cancel"
    assert [each.args for each in attempt.execution.compensations] == [("hotel",)]
    assert ledger.names() == [("reserve", 1, "succeeded")]


def test_a_replay_that_is_halted_begins_nothing_new() -> None:
    ledger = Ledger()

    def body() -> None:
        run_step("reserve", str)
        durable.compensate(release, "hotel")
        durable.now()

    ledger.run(body)
    ledger.rows.pop()
    execution = ledger.execution()
    execution.halt = "undo"
    with execution.active(), pytest.raises(Suspend):
        body()
    assert len(execution.compensations) == 1
    assert ledger.names() == [("reserve", 1, "succeeded")]
