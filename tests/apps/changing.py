"""An app whose code is another one in each release, for fleets that are being deployed.

``RELEASE`` in the environment of a process says which one it has; ``trace``
of the test's settings is a file to which each body writes what it does and in
which release.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery

import durable
from durable import Durable, Workflow, run_step, step
from durable.testing import crashes
from tests.apps import settings_from_environment

crashes.install_from_environment()
RELEASE = os.environ.get("RELEASE", "1")
settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("changing")
app.conf.update(settings)
Durable(app)


def trace(*words: object) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


@step
def did(what: str) -> str:
    trace(RELEASE, what)
    return what


@step
def gate(path: str) -> None:
    """Tell the test that it runs, and go on when the test says so."""
    trace(RELEASE, "gate")
    while not Path(path).exists():
        time.sleep(0.01)


# --- versions

_VERSIONS: dict[str, dict[str, Any]] = {
    "1": {"version": "1"},
    "2": {"version": "2"},
    "3": {"version": "3", "accepts": ["1", "2"]},
}

if RELEASE != "lacks":

    @app.task(name="changing.versioned", base=Workflow, **_VERSIONS.get(RELEASE, {}))
    def versioned() -> list[str | None]:
        """Wait for an event; tell what executed it, and which version the run has."""
        run_step("begin", lambda: trace(RELEASE, "begin"))
        durable.wait_for_event("go")
        return [RELEASE, durable.current().version]

    @app.task(name="changing.quick", base=Workflow, **_VERSIONS.get(RELEASE, {}))
    def quick(number: int) -> str:
        run_step("effect", lambda: trace("effect", number))
        return RELEASE


# --- patches


@app.task(name="changing.order", base=Workflow)
def order(name: str) -> list[str]:
    """Release 2 puts a step before the wait, and one after it."""
    new = RELEASE == "2"
    done = [did(f"{name} load")]
    if new and durable.patched("early"):
        done.append(did(f"{name} check"))
    done.append(durable.wait_for_event("go"))
    if new and durable.patched("late"):
        done.append(did(f"{name} mail"))
    done.append(did(f"{name} ship"))
    return done


@app.task(name="changing.broken", base=Workflow)
def broken(mistake: str) -> list[str]:
    """In release 2 a mistake makes it leave the recorded way."""
    wrong = mistake if RELEASE == "2" else ""
    if wrong == "raises":
        raise ValueError("a mistake in the new code")
    if wrong == "ends":
        return []
    first = "refund" if wrong == "other step" else "charge"
    run_step(first, lambda: trace(RELEASE, first))
    if wrong == "other event":
        durable.wait_for_event("stop")
    elif wrong == "other kind":
        durable.sleep("1h")
    durable.wait_for_event("go")
    return [first, did("ship")]


# --- endless ones


@app.task(name="changing.counting", base=Workflow, **_VERSIONS.get(RELEASE, {}))
def counting(done: int, of: int) -> list[Any]:
    number = did_number(done + 1)
    if number < of:
        durable.continue_as_new(number, of=of)
    where = durable.current()
    return [number, where.passes, where.version, str(durable.uuid4())]


@step
def did_number(number: int) -> int:
    trace("number", number, durable.idempotency_key())
    return number


@app.task(name="changing.mailbox", base=Workflow)
def mailbox(got: list[str], of: int) -> list[str]:
    """Take one event a pass."""
    got = [*got, durable.wait_for_event("mail")]
    if len(got) < of:
        durable.continue_as_new(got, of=of)
    return got


@app.task(name="changing.follower", base=Workflow)
def follower(numbers: object) -> object:
    trace("follower", numbers)
    return numbers


@app.task(name="changing.parent", base=Workflow)
def parent(of: int) -> object:
    return counting.delay(0, of).get()[:2]
