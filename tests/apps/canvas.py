"""Small durable and plain tasks to compose; bodies leave notes under the root's id."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

from celery import Celery, chain, chord, group

import durable
from durable import Durable, RecoverableError, Workflow, step
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


# --- canvas of runs that do not go straight through


@step(retry_backoff=0.05)
def fails_once() -> None:
    if durable.current().step_attempt == 1:
        raise RecoverableError("not yet")


@task(base=Workflow, bind=True)
def goes(self: Any, x: int, how: str) -> int:
    """Return ``x``, in a roundabout way."""
    if how == "sleeps":
        durable.sleep(0.05)
    elif how == "backs off":
        fails_once()
    elif how == "retries":
        if self.request.retries == 0:
            raise self.retry(countdown=0.05)
    elif how == "waits":
        durable.wait_for_event("go")
    elif how == "dies":
        durable.sleep(0.05)
        first = not any(line.startswith(f'["{self.request.id}", "dies"') for line in _lines())
        note(self.request.id, "dies")
        if first:
            os.kill(os.getpid(), signal.SIGKILL)
    elif how == "fails":
        durable.sleep(0.05)
        raise ValueError(f"no: {x}")
    note(self.request.id, "end")
    return x


def _lines() -> list[str]:
    return TRACE.read_text().splitlines()


WAYS = ("sleeps", "backs off", "retries", "waits", "dies")


def _all(x: int = 1) -> list[Any]:
    return [goes.si(x, way) for way in WAYS]


#: Canvas with such runs in each position, and what comes of it.
FLOWS: dict[str, Any] = {
    "chain": (lambda: chain(goes.s(7, "sleeps"), *(goes.s(way) for way in WAYS)), 7),
    "group": (lambda: group(_all()), [1] * 5),
    "header of a chord": (lambda: chord(_all(), total.s()), 5),
    "body of a chord": (
        lambda: chord([total.si([1])], chain(goes.si(3, "dies"), total.si([4]))),
        4,
    ),
    "header and body": (lambda: chord(_all(), goes.si(9, "waits")), 9),
    "chord in a chord": (
        lambda: chord([chord(_all(), total.s()), goes.s(2, "sleeps")], total.s()),
        7,
    ),
    "chain of groups": (
        lambda: chain(group(_all()), total.s(), group(goes.s("dies"), goes.s("waits"))),
        [5, 5],
    ),
    "chain to a chord": (
        lambda: goes.s(2, "sleeps") | group(goes.s(way) for way in WAYS) | total.s(),
        10,
    ),
    "with plain members": (
        lambda: chord([goes.s(1, "dies"), plain_double.s(2), goes.s(3, "waits")], total.s()),
        8,
    ),
}


@task(base=Workflow)
def flow_in_a_body(name: str, countdown: float) -> Any:
    durable.sleep(0.01)
    return FLOWS[name][0]().apply_async(countdown=countdown).get()


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
