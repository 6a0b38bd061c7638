"""An app whose tasks are plain in one release and durable in another.

``RELEASE`` in the environment of a process says which one it has: ``bare``
(without the package), ``plain`` (with it, tasks still plain), ``durable``.
``trace`` of the test's settings is a file to which each body writes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery

import durable
from durable import Durable, Workflow, step
from tests.apps import settings_from_environment

RELEASE = os.environ.get("RELEASE", "durable")
settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("deploying")
app.conf.update(settings)
if RELEASE != "bare":
    Durable(app)

#: What the release adds to each task, or takes away.
LINE: dict[str, Any] = {"base": Workflow} if RELEASE == "durable" else {}


def trace(*words: object) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


@step
def effect(number: int) -> None:
    trace("effect", number)


@app.task(name="deploying.bill", bind=True, **LINE)
def bill(self: Any, number: int) -> str:
    """Come back once, as a retry, and then have an effect."""
    if self.request.retries == 0:
        raise self.retry(countdown=0.1)
    effect(number)
    return RELEASE


@app.task(name="deploying.beat", **LINE)
def beat() -> str:
    """No arguments: a message of a run would run it as a plain task as well."""
    trace("beat", RELEASE)
    return RELEASE


@app.task(name="deploying.waits", **LINE)
def waits() -> str:
    if LINE:
        durable.wait_for_event("go")
    trace("waits", RELEASE)
    return RELEASE


def start_plainly(name: str) -> str:
    """Start a task as a producer whose code has it as a plain one."""
    return str(app.durable.starter._send_task(name).id)
