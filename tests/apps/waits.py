"""Durable tasks that wait: for a time, for events. Bodies leave notes under their run's id.

Settings of the test that it needs besides Celery's: ``durable_database_url``,
``trace``, a file, and perhaps ``clock_skew``, seconds by which this process's
clock is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pydantic
from celery import Celery, current_task

import durable
from durable import Durable, Workflow, step
from durable.clock import Clock
from durable.testing import crashes
from tests.apps import settings_from_environment

crashes.install_from_environment()
settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))
SKEW = timedelta(seconds=settings.pop("clock_skew", 0))

app = Celery("waits")
app.conf.update(settings)
Durable(app, clock=Clock(now=lambda: datetime.now(timezone.utc) + SKEW))
#: Not registered with every other app of the test process, as Celery does by default.
task = functools.partial(app.task, shared=False, base=Workflow)


class Decision(pydantic.BaseModel):
    granted: bool
    by: str = "nobody"


@dataclasses.dataclass
class Parcel:
    weight: int


def even(value: Any) -> int:
    """What a user writes: it trusts the payload to be a dict of a number."""
    number: int = value["number"]
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number // 2


SCHEMAS: dict[str, Any] = {
    "model": Decision,
    "dataclass": Parcel,
    "list": list[int],
    "function": even,
}


def note(what: str, value: object = None) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(json.dumps([current_task.request.id, what, value], default=repr) + "\n")


@step
def mark(label: str, value: object = None) -> object:
    note(label, value)
    return value


@task()
def naps(seconds: float) -> str:
    """Two steps with a pause between them."""
    note("body")
    mark("before")
    durable.sleep(seconds)
    mark("after")
    return "awake"


@task()
def naps_often(pauses: list[float]) -> int:
    for seconds in pauses:
        durable.sleep(seconds)
    return len(pauses)


@task()
def naps_until(when: str) -> str:
    durable.sleep_until(datetime.fromisoformat(when))
    return "awake"


@task(deadline=1.0)
def oversleeps() -> str:
    durable.sleep(3600)
    return "never"


@task(time_limit=3, soft_time_limit=2)
def naps_past_its_time_limit() -> str:
    """The limits count the time in a worker."""
    durable.sleep(2.5)
    return "awake"


@task()
def approves(timeout: float | None = None) -> object:
    """A step, an event, a step."""
    note("body")
    mark("before")
    payload = durable.wait_for_event("approval", timeout=timeout)
    mark("after", payload)
    return payload


@task()
def collects(count: int) -> list[object]:
    return [durable.wait_for_event("item") for _ in range(count)]


@task()
def times_out(timeout: float) -> list[object]:
    """A wait that times out, a pause, so that it is replayed, and another wait."""
    try:
        first = durable.wait_for_event("approval", timeout=timeout)
    except durable.EventTimeout as exc:
        first = [type(exc).__name__, exc.event_type, str(exc)]
        note("timeout", str(exc))
    second = durable.wait_for_event("approval")
    durable.sleep(0.05)
    return [first, second]


@task()
def checks(kind: str) -> str:
    payload = durable.wait_for_event("checked", schema=SCHEMAS[kind])
    note("payload", repr(payload))
    durable.sleep(0.05)  # and replayed
    return repr(payload)


@task()
def checks_with(schema: Any) -> None:
    """With a schema that cannot be used: a number, a name, a description in JSON."""
    durable.wait_for_event("checked", schema=schema)


@task()
def tells(run_id: str) -> list[str]:
    """Send an event from the body, and one from a step that runs again; replayed in between."""
    note("body")
    first = durable.send_event(run_id, "item", "from the body")
    durable.sleep(0.05)
    return [first, tell_in_step(run_id)]


@step(retry_backoff=0.05)
def tell_in_step(run_id: str) -> str:
    sent = durable.send_event(run_id, "item", f"attempt {durable.current().step_attempt}")
    if durable.current().step_attempt == 1:
        raise durable.RecoverableError("after the event was sent")
    return sent


@task()
def tells_itself() -> object:
    durable.send_event(current_task.request.id, "item", "mine")
    return durable.wait_for_event("item")


@task()
def quick(label: str) -> str:
    """One of a backlog."""
    note("quick", label)
    return label


@task()
def holds(path: str) -> None:
    """Keep the worker until the test makes a file."""
    wait_for_file(path)


@step
def wait_for_file(path: str) -> None:
    note("holds")
    while not Path(path).exists():
        time.sleep(0.01)


@task()
def parent(child_path: str, tied: bool) -> None:
    """Start a child that runs, one that is parked, and a grandchild; wait for ever."""
    policy = {"on_parent_cancel": "cancel"} if tied else {}
    running = holds.apply_async((child_path,), **policy)
    parked = family.apply_async(**policy)
    mark("children", [running.id, parked.id])
    durable.wait_for_event("never")


@task()
def family() -> None:
    child = approves.apply_async(on_parent_cancel="cancel")
    mark("grandchild", child.id)
    durable.wait_for_event("never")


@task()
def busy_parent(path: str) -> None:
    """Start a tied child and keep the worker."""
    child = approves.apply_async(on_parent_cancel="cancel")
    mark("child", child.id)
    wait_for_file(path)


@task()
def ties(where: str, policy: object) -> None:
    """What cannot be tied: a child of a step, a plain task, by an unknown word."""
    if where == "step":
        tie_in_step(policy)
    else:
        (plain if where == "plain" else quick).apply_async(("x",), on_parent_cancel=policy)


@step
def tie_in_step(policy: object) -> None:
    quick.apply_async(("x",), on_parent_cancel=policy)


@app.task(shared=False)
def plain(label: str) -> str:
    return label


@task()
def inherits() -> int | None:
    """What a child of a woken run is sent with."""
    durable.wait_for_event("approval")
    return quick.delay("child").get() and current_task.request.delivery_info.get("priority")
