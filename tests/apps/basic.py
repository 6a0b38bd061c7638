"""Durable tasks that leave a trace: each body that runs writes a line to a file.

Settings of the test that it needs besides Celery's: ``durable_database_url``
and ``trace``, the file.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

import durable
from durable import Durable, RecoverableError, Workflow, step
from tests.apps import settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("basic")
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
def add(x: int, y: int) -> int:
    trace("add", x, y)
    return x + y


@step
def pause(number: int, seconds: float) -> int:
    trace("pause", number)
    time.sleep(seconds)
    return number


@step
def gate(number: int, path: str) -> int:
    """Tell the test that it runs, and go on when the test says so."""
    trace("gate", number)
    wait_until(path)
    return number


@step(retry_backoff=0.1)
def flaky(failures: int) -> int:
    """Fail so many times, then tell the number of the attempt."""
    attempt = durable.current().step_attempt or 0
    trace("flaky", attempt)
    if attempt <= failures:
        raise RecoverableError(f"attempt {attempt} fails")
    return attempt


@step(timeout="200ms", retry_backoff=0.1)
def hang_once() -> int:
    """Take for ever the first time, then tell the number of the attempt."""
    attempt = durable.current().step_attempt or 0
    trace("hang", attempt)
    if attempt == 1:
        time.sleep(600)
    return attempt


@step
def refuse(message: str) -> None:
    trace("refuse")
    raise ValueError(message)


@app.task(name="basic.total", base=Workflow)
def total(numbers: list[int]) -> int:
    result = 0
    for number in numbers:
        result = add(result, number)
    return result


@app.task(name="basic.pauses", base=Workflow)
def pauses(count: int, seconds: float) -> list[int]:
    return [pause(number, seconds) for number in range(count)]


@app.task(name="basic.gates", base=Workflow)
def gates(count: int, path: str, at: int = 0) -> list[int]:
    """Steps, the one at ``at`` of which waits for the test."""
    return [gate(number, path if number == at else "") for number in range(count)]


@app.task(name="basic.retries", base=Workflow)
def retries(failures: int) -> int:
    add(0, 0)
    return flaky(failures)


@app.task(name="basic.hangs", base=Workflow)
def hangs() -> int:
    return hang_once()


@app.task(name="basic.fails", base=Workflow)
def fails(message: str) -> None:
    refuse(message)


@app.task(name="basic.noop", base=Workflow)
def noop() -> None:
    """Nothing: the price of a run."""


@app.task(name="basic.echo", base=Workflow)
def echo(value: object) -> object:
    trace("echo", value)
    return value


@app.task(name="basic.plain")
def plain(value: object) -> object:
    """A task of Celery alone, beside the durable ones."""
    trace("plain", value)
    return value


@step
def pay(amount: int, account: str) -> int:
    """Fail for good until the test has made the account."""
    trace("pay", amount)
    if not Path(account).exists():
        raise durable.PermanentError("the account is gone")
    return amount


@app.task(name="basic.pays", base=Workflow)
def pays(amount: int, account: str) -> int:
    return add(pay(add(amount, 1), account), 1)


@app.task(name="basic.naps", base=Workflow)
def naps(seconds: float) -> int:
    first = add(1, 1)
    durable.sleep(seconds)
    return add(first, 1)


@app.task(name="basic.asks", base=Workflow)
def asks(account: str) -> int:
    """Have a child pay."""
    return add(pays.delay(1, account).get(), 0)
