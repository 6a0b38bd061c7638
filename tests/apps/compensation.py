"""Workflows that undo what they have done; each step that runs writes a line to the trace."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from celery import Celery

import durable
from durable import Durable, PermanentError, Workflow, step
from durable.testing import crashes
from tests.apps import settings_from_environment

crashes.install_from_environment()
settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("compensation")
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
def reserve(what: str, go: str = "") -> str:
    trace("reserve", what)
    wait_until(go)
    return what


@step(retry_backoff=0.1)
def release(what: str, go: str = "", repaired: str = "") -> None:
    trace("release", what, durable.current().step_attempt)
    wait_until(go)
    if repaired and not Path(repaired).exists():
        raise PermanentError(f"{what} is stuck")
    if durable.current().step_attempt == 1 and what == "flaky":
        raise durable.RecoverableError("not now")


def tell(what: str) -> None:
    """No step: it becomes one."""
    trace("tell", what)


@step
def refuse() -> None:
    trace("refuse")
    raise PermanentError("the card is gone")


@app.task(name="compensation.trip", base=Workflow)
def trip(how: str, go: str = "", undo_go: str = "", repaired: str = "") -> str:
    """Book three things and end in some way: ``fail``, ``sleep``, ``hold`` (in a step) or well."""
    reserve("hotel")
    durable.compensate(release, "hotel")
    reserve("flaky")
    durable.compensate(release, "flaky", go=undo_go, repaired=repaired)
    reserve("car", go if how == "hold" else "")
    durable.compensate(tell, "car")
    if how == "fail":
        refuse()
    if how == "raise":
        trace("raise")
        raise ValueError("no step")
    if how in {"sleep", "hold"}:
        durable.sleep("1h")
    return "booked"


@app.task(name="compensation.once", base=Workflow)
def once(go: str) -> None:
    """The first thing to undo is that of the step in flight."""
    reserve("hotel", go)
    durable.compensate(release, "hotel")
    reserve("car")


@step(name="arelease")
async def arelease(what: str) -> None:
    trace("release", what, durable.current().step_attempt)


@step(name="areserve")
async def areserve(what: str, go: str = "") -> None:
    trace("reserve", what)
    await asyncio.to_thread(wait_until, go)


@app.task(name="compensation.atrip", base=Workflow)
async def atrip(how: str, go: str = "") -> str:
    """Book three things at a time."""
    await areserve("hotel")
    durable.compensate(release, "hotel")

    async def book(what: str) -> None:
        await areserve(what, go)
        durable.compensate(arelease, what)
        await areserve(f"more {what}")
        durable.compensate(arelease, f"more {what}")
        await durable.aio.sleep(3600)

    booking = [asyncio.create_task(book(what)) for what in ("car", "bike")]
    if how == "fail":
        await durable.aio.sleep(0.3)
        refuse()
    await asyncio.gather(*booking)
    return "booked"
