"""A service that is up, down, or holds its callers, behind a circuit breaker.

Its word is the content of the file next to the trace: ``up``, ``hold``, or
``down`` if there is none. Each call that gets to it leaves a line in the trace.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from celery import Celery

import durable
from durable import Durable, Workflow, step
from tests.apps import settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))
WORD = TRACE.with_name("service")

app = Celery("breaker")
app.conf.update(settings)
Durable(app)

breaker = durable.CircuitBreaker("service", failure_threshold=2, reset_timeout="60s")


def leave(line: str) -> None:
    with TRACE.open("a") as file:
        file.write(f"{line}\n")


def word() -> str:
    return WORD.read_text() if WORD.exists() else "down"


@step(max_retries=None, retry_backoff=0.05, retry_jitter=False)
@breaker
def ask(caller: str) -> str:
    leave(caller)
    while word() == "hold":
        time.sleep(0.01)
    if word() == "down":
        raise ConnectionError("the service is down")
    return f"an answer for {caller}"


@app.task(base=Workflow, shared=False)
def asks(caller: str) -> str:
    return ask(caller)


fragile = durable.CircuitBreaker("fragile", failure_threshold=1)


@step(max_retries=0)
@fragile
async def knock(caller: str) -> str:
    await asyncio.sleep(0)
    leave(caller)
    raise ConnectionError("nobody is in")


@app.task(base=Workflow, shared=False)
async def knocks(callers: list[str]) -> list[str]:
    heard = []
    for caller in callers:
        try:
            await knock(caller)
        except (ConnectionError, durable.CircuitOpen) as exc:
            heard.append(type(exc).__name__)
    return heard
