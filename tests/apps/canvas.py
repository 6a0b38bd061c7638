"""Small durable and plain tasks to compose; bodies leave notes under the root's id."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

from celery import Celery

from durable import Durable, Workflow
from tests.apps import settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("canvas")
app.conf.update(settings)
Durable(app)
#: Not registered with every other app of the test process, as Celery does by default.
task = functools.partial(app.task, shared=False)


def note(run_id: str | None, what: str, value: object = None) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(json.dumps([run_id, what, value], default=repr) + "\n")


@task(base=Workflow)
def add(x: int, y: int) -> int:
    return x + y


@task(base=Workflow, bind=True)
def double(self: Any, x: int) -> int:
    request = self.request
    note(request.root_id, "double", 2 * x)
    note(request.id, "from", [request.parent_id, request.group, request.group_index])
    return 2 * x


@task(base=Workflow)
def unique(numbers: list[int]) -> set[int]:
    return set(numbers)


class FailingHook(Workflow):
    abstract = True

    def on_failure(self, exc: Any, task_id: str, *args: Any) -> None:
        raise LookupError("the hook itself fails")


@task(base=FailingHook)
def fails_with_its_hook() -> None:
    raise ValueError("no")


@task(base=Workflow)
def total(numbers: list[int]) -> int:
    return sum(numbers)


@task(base=Workflow)
def fails(x: int) -> None:
    raise ValueError(f"no: {x}")


@task(base=Workflow, bind=True)
def retried(self: Any, x: int) -> int:
    """Parked once."""
    if self.request.retries == 0:
        raise self.retry(countdown=0.1)
    return x


@task(base=Workflow, bind=True)
def parked(self: Any) -> None:
    """Parked for an hour."""
    raise self.retry(countdown=3600)


@task(base=Workflow, bind=True)
def dies_once(self: Any, x: int) -> int:
    """Takes its process along the first time."""
    first = self.request.id not in TRACE.read_text() if TRACE.exists() else True
    note(self.request.id, "claim")
    if first:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@task(base=Workflow, bind=True, track_started=True)
def tracked(self: Any) -> None:
    """Notes what Celery's backend says of it while it runs."""
    note(self.request.id, "state", self.backend.get_state(self.request.id))
    raise ValueError("tracked")


@task(base=Workflow)
def durable_errback(failed_id: str) -> None:
    """An errback of the old sort, a run of its own."""
    note(failed_id, "durable_errback")


@task(bind=True)
def plain_double(self: Any, x: int) -> int:
    note(self.request.root_id, "plain_double", 2 * x)
    return 2 * x


@task()
def plain_fails() -> None:
    raise KeyError("plain")


@task()
def errback(request: Any, exc: BaseException, traceback: str) -> None:
    note(request.id, "errback", str(exc))
