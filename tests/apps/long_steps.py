"""Workflows with long steps, and with steps that may run at most once."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from celery import Celery

import durable
from durable import Durable, Workflow, gather, step
from durable.testing import crashes
from tests.apps import settings_from_environment

crashes.install_from_environment()
settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("long_steps")
app.conf.update(settings)
Durable(app)


def trace(*words: object) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def is_held(path: str) -> bool:
    return not path or not Path(path).exists()


def wait_until(path: str) -> None:
    while path and not Path(path).exists():
        time.sleep(0.01)


@step
def load(rows: int, hold_at: int, go: str) -> int:
    """Load rows one by one; wait for the test at one of them, with heartbeats if it has no file."""
    for number in range(durable.heartbeat_details() or 0, rows):
        trace("row", number, durable.current().step_attempt)
        durable.heartbeat(number + 1)
        while number == hold_at and is_held(go):
            time.sleep(0.01)
            if not go:
                durable.heartbeat()
    return rows


@app.task(name="long_steps.loads", base=Workflow)
def loads(rows: int, hold_at: int, go: str) -> int:
    return load(rows, hold_at, go)


@app.task(name="long_steps.loads_many", base=Workflow)
def loads_many(rows: int, go: str) -> list[int]:
    return list(gather(load.s(rows, 1, go)))


@step(name="aload")
async def aload(rows: int, hold_at: int, go: str) -> int:
    for number in range(durable.heartbeat_details() or 0, rows):
        trace("row", number, durable.current().step_attempt)
        durable.heartbeat(number + 1)
        while number == hold_at and is_held(go):
            await asyncio.sleep(0.01)
            if not go:
                durable.heartbeat()
    return rows


@app.task(name="long_steps.aloads", base=Workflow)
async def aloads(rows: int, hold_at: int, go: str) -> int:
    return await aload(rows, hold_at, go)


@step(at_most_once=True)
def charge(cents: int, go: str = "") -> int:
    trace("charge", cents)
    wait_until(go)
    return cents


@step(at_most_once=True, name="acharge")
async def acharge(cents: int, go: str = "") -> int:
    trace("charge", cents)
    await asyncio.to_thread(wait_until, go)
    return cents


@app.task(name="long_steps.pays", base=Workflow)
def pays(cents: int, go: str = "") -> int:
    return charge(cents, go) + 1


@app.task(name="long_steps.apays", base=Workflow)
async def apays(cents: int, go: str = "") -> int:
    return await acharge(cents, go) + 1


@app.task(name="long_steps.pays_many", base=Workflow)
def pays_many(cents: int, go: str) -> list[int]:
    return list(gather(charge.s(cents, go)))
