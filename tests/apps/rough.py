"""Durable tasks for rough times: each body that runs writes its label into the trace.

Settings of the test that it needs besides Celery's: ``durable_database_url``
and ``trace``, the file.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from celery import Celery

import durable
from durable import Durable, RecoverableError, Workflow, step
from tests.apps import settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("rough")
app.conf.update(settings)
Durable(app)


def trace(line: object) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(f"{line}\n")


@step
def mark(label: str, seconds: float = 0.0, gate: str = "") -> str:
    """Leave the label, take some time, wait for the test to make the file ``gate``."""
    trace(label)
    time.sleep(seconds)
    while gate and not Path(gate).exists():
        time.sleep(0.01)
    return label


@step(retry_backoff=1, retry_jitter=False)
def stumble(label: str) -> str:
    """Fail once, then succeed."""
    attempt = durable.current().step_attempt
    trace(f"{label} attempt {attempt}")
    if attempt == 1:
        raise RecoverableError("the first attempt fails")
    return label


@step
def die(label: str, times: int) -> str:
    """Take the process down so many times, then succeed."""
    trace(label)
    if TRACE.read_text().splitlines().count(label) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return label


@step
def burn(label: str, seconds: float) -> str:
    """Keep a processor busy."""
    trace(label)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
    return label


@step
def hold_session(label: str, gate: str) -> str:
    """Use `durable.session()` until the test makes the file ``gate``."""
    from sqlalchemy import text

    durable.session().execute(text("SELECT 1"))
    trace(label)
    while not Path(gate).exists():
        time.sleep(0.01)
    return label


@app.task(name="rough.walk", base=Workflow)
def walk(label: str, count: int, seconds: float = 0.0, gate: str = "", at: int = 0) -> int:
    """Steps ``<label>.<number>``, the one at ``at`` of which waits for the gate."""
    for number in range(count):
        mark(f"{label}.{number}", seconds, gate if number == at else "")
    return count


@app.task(name="rough.backs_off", base=Workflow)
def backs_off(label: str) -> str:
    mark(f"{label}.0")
    return stumble(f"{label}.1")


@app.task(name="rough.dies", base=Workflow)
def dies(label: str, times: int, steps: int = 1) -> int:
    for number in range(steps):
        die(f"{label}.{number}", times)
    return steps


@app.task(name="rough.burns", base=Workflow)
def burns(label: str, count: int, seconds: float) -> int:
    for number in range(count):
        burn(f"{label}.{number}", seconds)
    return count


@app.task(name="rough.holds_session", base=Workflow)
def holds_session(label: str, gate: str) -> str:
    return hold_session(label, gate)


if not os.environ.get("WITHOUT_RARE"):

    @app.task(name="rough.rare", base=Workflow)
    def rare(label: str) -> str:
        """What only some workers have."""
        return mark(label)
