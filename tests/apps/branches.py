"""Workflows that are ``async def``, with branches that leave a trace.

Settings of the test that it needs besides Celery's: ``durable_database_url``
and ``trace``, the file.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery

import durable
from durable import Durable, RecoverableError, Workflow, aio, step
from tests.apps import settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("branches")
app.conf.update(settings)
Durable(app)


def trace(line: str) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(f"{line}\n")


async def until(path: str) -> None:
    """Wait for a test to make a file."""
    while path and not Path(path).exists():  # noqa: ASYNC110, ASYNC240 - another process makes it
        await asyncio.sleep(0.01)


@step
async def mark(label: str, gate: str = "", seconds: float = 0.0) -> str:
    trace(label)
    await asyncio.sleep(seconds)
    await until(gate)
    return label


@step(retry_backoff=1, retry_jitter=False)
async def stumble(label: str) -> int:
    """Fail once, then tell the number of the attempt."""
    attempt = durable.current().step_attempt or 0
    trace(f"{label} {attempt}")
    if attempt == 1:
        raise RecoverableError("the first attempt fails")
    return attempt


@step(timeout="200ms", retry_backoff=0.1)
async def hang_once() -> int:
    """Take for ever the first time, then tell the number of the attempt."""
    attempt = durable.current().step_attempt or 0
    if attempt == 1:
        await asyncio.sleep(600)
    return attempt


@step(max_retries=0)
async def overtime(label: str) -> str:
    trace(label)
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        trace(f"{label} is interrupted")
        raise
    return label


@app.task(name="branches.race", base=Workflow)
async def race(branches: int, steps: int, gate: str) -> list[Any]:
    """Branches whose steps end in another order on each attempt, the first of them at a gate."""

    async def branch(number: int) -> list[str]:
        first = durable.current().attempt == 1
        seen = []
        for each in range(steps):
            at_gate = gate if (number, each) == (0, 2) else ""
            pause = 0.01 * (number if first else branches - number)
            seen.append(await mark(f"{number}.{each}", at_gate, pause))
        return seen

    return await asyncio.gather(*(branch(number) for number in range(branches)))


@app.task(name="branches.double", base=Workflow)
def double(number: int) -> int:
    return 2 * number


@app.task(name="branches.plain")
def plain(number: int) -> int:
    return 3 * number


@app.task(name="branches.journey", base=Workflow)
async def journey() -> dict[str, Any]:
    """Everything that a branch can wait for, at the same time."""

    async def sleeps() -> str:
        await aio.sleep("1s")
        return await mark("slept")

    async def works() -> list[str]:
        return [await mark(f"work {number}", seconds=0.05) for number in range(5)]

    async def children() -> list[Any]:
        return [await aio.get(double.delay(1)), await aio.get(plain.delay(1))]

    async def retries() -> list[int]:
        return [await stumble("stumble"), await hang_once()]

    parts = [
        sleeps(),
        works(),
        children(),
        aio.wait_for_event("go"),
        aio.fan_out(mark, ["item 0", "item 1"]),
        aio.gather(mark.s("a"), double.s(4)),
        retries(),
        aio.run_step("thread", trace, "in a thread"),
    ]
    names = ("sleep", "work", "children", "event", "items", "gathered", "retries", "thread")
    return dict(zip(names, await asyncio.gather(*parts), strict=True))


@app.task(name="branches.waits", base=Workflow)
async def waits(gate: str) -> None:
    await asyncio.gather(aio.wait_for_event("never"), mark("at the gate", gate))
    await mark("never")


@app.task(name="branches.absent", base=Workflow)
async def absent(label: str, how: str) -> None:
    """Wait for something that durable knows nothing of."""
    trace(label)
    try:
        if how == "timer":
            await asyncio.gather(asyncio.sleep(25), aio.sleep("1h"))
        else:
            await asyncio.Event().wait()
    finally:
        trace(f"{label} is left")
    await mark("never")


@app.task(name="branches.fails", base=Workflow)
async def fails() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(mark("one"))
        group.create_task(_refuse())


async def _refuse() -> None:
    raise ValueError("refused")


@app.task(
    name="branches.again",
    base=Workflow,
    bind=True,
    autoretry_for=(ConnectionError,),
    default_retry_delay=0,
)
async def again(self: Any) -> int:
    """Ask for another attempt in a branch beside a step, then fail in a way that Celery repeats."""

    async def ask() -> None:
        if self.request.retries == 0:
            await mark("before the retry")
            raise self.retry(countdown=0)

    await asyncio.gather(mark("once", seconds=0.3), ask())
    if self.request.retries == 1:
        raise ConnectionError("not yet")
    return int(self.request.retries)


@app.task(name="branches.late", base=Workflow, soft_time_limit=1)
async def late() -> str:
    try:
        await asyncio.gather(overtime("late"), aio.wait_for_event("never"))
    except SoftTimeLimitExceeded:
        return await mark("in time")
    return "never"


@app.task(name="branches.endless", base=Workflow)
async def endless(done: int, of: int) -> list[str]:
    """Begin anew out of the body while a branch is still in a step."""
    slow = asyncio.create_task(mark(f"slow {done}", seconds=0.2))
    names = await asyncio.gather(mark(f"a {done}"), mark(f"b {done}"))
    if not durable.patched("farewell") or done + 1 < of:
        durable.continue_as_new(done + 1, of)
    return [*names, await slow]
