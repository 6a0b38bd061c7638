"""Celery's task options and hooks, all on durable tasks; bodies and hooks leave notes.

A note is a JSON line ``[run id, what, value]``.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

import durable
from durable import Durable, RecoverableError, TransientError, Workflow, step
from tests.apps import models, settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))


def note(run_id: str | None, what: str, value: object = None) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(json.dumps([run_id, what, value], default=repr) + "\n")


class ProjectTask(Task):
    """A project's own task class: what it overrides has to go on working."""

    def __init__(self) -> None:
        super().__init__()
        self.made_by_project = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note(self.request.id, "project __call__", [args, kwargs])
        return super().__call__(*args, **kwargs)

    def apply_async(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["headers"] = {"tenant": "acme", **(kwargs.get("headers") or {})}
        return super().apply_async(*args, **kwargs)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note(task_id, "on_success", [retval, args, kwargs])

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, "on_failure", [type(exc).__name__, args, kwargs])

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, "on_retry", [type(exc).__name__, args, kwargs])

    def after_return(
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        note(task_id, "after_return", [status, args, kwargs])


app = Celery("options", task_cls=ProjectTask, set_as_current=True)
app.conf.update(settings)
app.conf.task_routes = {f"{__name__}.routed": {"queue": f"{app.conf.task_default_queue}.routed"}}
Durable(app)
#: Not registered with every other app of the test process, as Celery does by default.
task = functools.partial(app.task, shared=False)


@signals.task_success.connect
def on_task_success(sender: Any, result: Any, **_: Any) -> None:
    note(sender.request.id, "task_success", [result, sender.request.args, sender.request.kwargs])


@signals.task_failure.connect
def on_task_failure(sender: Any, task_id: str, exception: Any, args: Any, **_: Any) -> None:
    note(task_id, "task_failure", [type(exception).__name__, args])


@signals.task_retry.connect
def on_task_retry(request: Any, reason: Any, **_: Any) -> None:
    what = getattr(reason, "reason", None)
    note(request.id, "task_retry", [type(reason).__name__, what, repr(reason.exc)])


@signals.task_postrun.connect
def on_task_postrun(task_id: str, args: Any, kwargs: Any, state: str, **_: Any) -> None:
    note(task_id, "task_postrun", [state, args, kwargs])


def wait_until(path: str) -> None:
    """Wait for a test to make a file."""
    while path and not Path(path).exists():
        time.sleep(0.01)


@step
def add(x: int, y: int) -> int:
    return x + y


@task(base=Workflow)
def total(numbers: list[int]) -> int:
    result = 0
    for number in numbers:
        result = add(result, number)
    return result


def seen_by(self: Any) -> dict[str, Any]:
    """What a bound task sees of itself."""
    request = self.request
    return {
        "name": self.name,
        "made_by_project": self.made_by_project,
        "id": request.id,
        "args": list(request.args),
        "kwargs": dict(request.kwargs),
        "retries": request.retries,
        "root_id": request.root_id,
        "parent_id": request.parent_id,
        "group": request.group,
        "hostname": request.hostname,
        "queue": request.delivery_info["routing_key"],
        "priority": request.delivery_info["priority"],
        "tenant": request.headers.get("tenant"),
        "headers": dict(request.headers),
        "stamps": request.stamps,
        "directly": request.called_directly,
        "eager": request.is_eager,
    }


@task(base=Workflow, bind=True, name="custom.name")
def introspect(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return seen_by(self)


@task(base=Workflow, bind=True)
def parked_once(self: Any) -> dict[str, Any]:
    """What is left of its message after a run was parked."""
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return seen_by(self)


@task(base=Workflow, queue=f"{app.conf.task_default_queue}.own", bind=True)
def own_queue(self: Any) -> Any:
    return self.request.delivery_info["routing_key"]


@task(base=Workflow, bind=True)
def routed(self: Any) -> Any:
    return self.request.delivery_info["routing_key"]


order = task(base=Workflow, pydantic=True)(models.order)


@task(base=Workflow, rate_limit="2/s")
def limited() -> None:
    """At most two of these start in a second."""


@task(base=Workflow, acks_late=True, bind=True)
def acked_late(self: Any, path: str) -> bool:
    note(self.request.id, "waits")
    wait_until(path)
    return True


@task(base=Workflow, throws=(KeyError,))
def throws_expected() -> None:
    raise KeyError("expected")


class Hiccup(Exception):
    pass


@step(max_retries=0)
def hiccup(until: int) -> None:
    current = app.current_worker_task
    note(current.request.id, "step", current.request.retries)
    if current.request.retries < until:
        raise Hiccup(f"retry {current.request.retries}")


@task(
    base=Workflow,
    bind=True,
    autoretry_for=(Hiccup,),
    retry_backoff=True,
    retry_jitter=False,
    retry_kwargs={"max_retries": 1},
)
def autoretried(self: Any, failures: int) -> int:
    add(1, 1)
    hiccup(failures)
    return int(self.request.retries)


@step(max_retries=0)
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@task(base=Workflow, time_limit=1)
def too_long() -> None:
    time.sleep(30)


@task(base=Workflow, soft_time_limit=1)
def softly_limited(where: str) -> str:
    try:
        if where == "body":
            time.sleep(30)
        sleep(30)
    except SoftTimeLimitExceeded:
        return f"caught in the {where}"
    return "not limited"


@task(base=Workflow, bind=True, ignore_result=True)
def ignored(self: Any) -> object:
    note(self.request.id, "ran")
    return object()  # nothing could store it


@task(base=Workflow, bind=True)
def retries(self: Any, how: str) -> Any:  # noqa: C901, PLR0912 - a branch for each form
    """``self.retry`` in its forms."""
    number = self.request.retries
    note(self.request.id, "attempt", number)
    add(number, 0)
    if number >= 2 and how not in {"limit", "raw without end"}:
        return number
    if how == "countdown":
        raise self.retry(countdown=0.1)
    if how == "eta":
        raise self.retry(eta=datetime.now(timezone.utc) + timedelta(seconds=0.1))
    if how == "limit":
        raise self.retry(exc=ValueError("enough"), countdown=0, max_retries=1)
    if how == "bare limit":
        raise self.retry(countdown=0, max_retries=0)
    if how == "throw=False":
        return str(self.retry(countdown=0, throw=False))
    if how == "raw":
        raise Retry("later", when=0.1)
    if how == "raw eta":
        raise Retry("later", when=datetime.now(timezone.utc) + timedelta(seconds=0.1))
    if how == "raw without end":
        raise Retry("again", when=0)
    if how == "stray":
        raise asyncio.CancelledError
    if how == "swallowed":
        try:
            self.retry(countdown=0)
        except Exception:  # noqa: BLE001 - what users do
            return "swallowed"
    if how == "args":
        raise self.retry(args=["other"], countdown=0)
    if how == "options":
        raise self.retry(countdown=0, queue="elsewhere")
    raise AssertionError(how)


@task(base=Workflow, bind=True)
def raises(self: Any, how: str) -> Any:
    """Celery's control-flow exceptions, and refusals."""
    note(self.request.id, "attempt")
    if how == "ignore":
        raise Ignore
    if how == "reject":
        raise Reject("no good", requeue=False)
    if how == "requeue":
        if len([1 for line in TRACE.read_text().splitlines() if self.request.id in line]) < 3:
            raise Reject("not now", requeue=True)
        return "taken at last"
    if how == "replace":
        return self.replace(total.s([1]))
    if how == "add_to_chord":
        return self.add_to_chord(total.s([1]))
    if how == "value":
        raise ValueError("bad value")
    if how == "transient" and self.request.retries == 0:
        raise TransientError("once")
    if how == "recoverable" and self.request.retries == 0:
        raise RecoverableError("once", retry_after=0)
    return self.request.retries


@task(base=Workflow, bind=True)
def reports(self: Any, path: str) -> str:
    """A state of its own until the test lets it go."""
    self.update_state(state="COOKING", meta={"done": 1, "of": 3})
    note(self.request.id, "reported")
    wait_until(path)
    return "served"


@step
def gate(path: str) -> None:
    note(durable.current().id, "gate")
    wait_until(path)


@task(base=Workflow)
def gated(path: str) -> str:
    gate(path)
    add(1, 1)
    return "through"


@task(base=Workflow, bind=True)
def parked(self: Any) -> None:
    """Parked for an hour."""
    raise self.retry(countdown=3600, max_retries=None)


@task(base=Workflow, bind=True)
def suicide(self: Any, times: int) -> int:
    """Takes its process along, so many times."""
    note(self.request.id, "claim")
    lines = TRACE.read_text().splitlines()
    claims = len([1 for line in lines if self.request.id in line and '"claim"' in line])
    if claims <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return claims


@task(base=Workflow, bind=True)
def parent(self: Any, numbers: list[int]) -> list[str | None]:
    """Calls another durable task directly, and itself: plain calls."""
    if not numbers:
        return []
    return [str(total(numbers)), *parent(numbers[1:])]


@task()
def plain(value: object) -> object:
    """A task of Celery alone, beside the durable ones."""
    return value


@task(bind=True)
def plain_retries(self: Any) -> int:
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@task(bind=True)
def errback(self: Any, failed_id: str) -> None:
    """An errback of the old sort: a task of its own, given the id."""
    note(failed_id, "errback", "id")


@task()
def errback_with_error(request: Any, exc: BaseException, traceback: str) -> None:
    """An errback of the new sort: called in the worker, given request and error."""
    note(request.id, "errback", [type(exc).__name__, str(exc), list(request.args or ())])
