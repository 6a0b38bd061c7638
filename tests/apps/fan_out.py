"""Workflows that fan out; each item that runs writes a line to the trace: what, number, run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, chain, group

import durable
from durable import Durable, RecoverableError, Workflow, fan_out, gather, step
from tests.apps import settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("fan_out")
app.conf.update(settings)
Durable(app)


def trace(*words: object) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def wait_until(path: str) -> None:
    """Wait for a test to make a file."""
    while path and not Path(path).exists():
        time.sleep(0.01)


@step
def double(number: int) -> int:
    trace("double", number)
    return 2 * number


@step
def brief(number: int) -> int:
    """Take a moment, and tell when it begins and ends."""
    trace("begin", number)
    time.sleep(0.02)
    trace("end", number)
    return number


@step
def gated(item: list[Any]) -> int:
    """Go on when the test says so; number 1 fails."""
    number, path = item
    trace("gated", number)
    if number == 1:
        raise LookupError("number 1 is not there")
    wait_until(path)
    return number


@step(retry_backoff=0.1, max_retries=2)
def flaky(number: int) -> int:
    """Fail the first time; number 2 always does."""
    attempt = durable.current().step_attempt or 0
    trace("flaky", number, attempt)
    if attempt == 1 or number == 2:
        raise RecoverableError(f"attempt {attempt} of {number} fails")
    return attempt


@step
def add(x: int, y: int = 0) -> int:
    return x + y


@step
def reserve(number: int) -> int:
    """Write a row in the step's own commit."""
    from sqlalchemy import text

    durable.session().execute(text("INSERT INTO done VALUES (:n)"), {"n": number})
    return number


@app.task(name="fan_out.all", base=Workflow)
def fan_out_all(name: str, items: list[Any], **options: Any) -> Any:
    """Fan out over a step or task of this module."""
    results = fan_out(globals()[name], items, **options)
    return [repr(each) if isinstance(each, Exception) else each for each in results]


@app.task(name="fan_out.count", base=Workflow)
def fan_out_count(count: int) -> int:
    return sum(fan_out(double, range(count)))


@app.task(name="fan_out.caught", base=Workflow)
def caught(items: list[Any]) -> list[Any]:
    """Catch the failure, go on with a step, and tell what the failure was."""
    try:
        fan_out(gated, items, max_concurrency=2)
    except LookupError as exc:
        return [add(1, 1), str(exc), [note for note in exc.__notes__ if "fan_out()" in note]]
    raise AssertionError("nothing has failed")


@app.task(name="fan_out.shrinks", base=Workflow)
def shrinks(fewer: str, go: str) -> list[Any]:
    """Fan out over something that is not the same on a replay."""
    return fan_out(gated, [[number, go] for number in ([5] if Path(fewer).exists() else [5, 6])])


@app.task(name="fan_out.naps", base=Workflow)
def naps(number: int) -> int:
    """A workflow that is parked on its way."""
    durable.sleep(0.2)
    return double(number)


@app.task(name="fan_out.plain")
def plain(number: int, more: int = 0) -> int:
    """A task of Celery alone."""
    return number + 100 + more


@app.task(name="fan_out.mixed", base=Workflow)
def mixed() -> list[Any]:
    return gather(
        add.s(1, y=2),
        naps.s(3),
        plain.s(4),
        chain(plain.s(5), plain.s(more=1000)),
        group(plain.s(6), naps.s(7)),
        max_concurrency=4,
    )


@app.task(name="fan_out.twice", base=Workflow)
def twice() -> list[Any]:
    """One fan-out inside another, and two in a row."""
    outer = fan_out(fan_out_count.s(), [2, 3])
    return [outer, fan_out(double, outer), fan_out(double, [])]
