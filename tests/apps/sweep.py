"""A workload of everything that a crash may hit, whose effects can be counted.

Settings of the test that it needs besides Celery's: ``durable_database_url``
and ``effects``, a directory. Each step returns the number of its execution
beside its value, and a step that runs again after its commit is thereby seen:
the number in the history is then not the last one.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import sqlalchemy
from celery import Celery, chain, chord, current_task, group

import durable
from durable import Durable, RecoverableError, Workflow, step
from durable.testing import crashes
from tests.apps import settings_from_environment

crashes.install_from_environment()
settings = settings_from_environment()
EFFECTS = Path(settings.pop("effects", os.devnull))

app = Celery("sweep")
app.conf.update(settings)
Durable(app)


def executed(what: str, whose: str = "") -> int:
    """Count an execution for a run (or task), the one at hand; return its number, from 1."""
    path = EFFECTS / f"{whose or current_task.request.id}.{what}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, b".")
        return os.lseek(descriptor, 0, os.SEEK_CUR)
    finally:
        os.close(descriptor)


@step
def plus(x: int, y: int) -> dict[str, int]:
    return {"value": x + y, "execution": executed("plus")}


@step
def ten_more(x: int) -> dict[str, int]:
    """One item; the next execution of one that was committed would be of another run."""
    return {"value": x + 10, "execution": executed("ten_more")}


@step
def double(x: int) -> dict[str, int]:
    return {"value": 2 * x, "execution": executed("double")}


@step(retry_backoff=0.05)
def flaky(x: int) -> dict[str, int]:
    """Fail recoverably at the first attempt."""
    execution = executed("flaky")
    if durable.current().step_attempt == 1:
        raise RecoverableError("the first attempt fails")
    return {"value": x, "execution": execution}


@step
def store(x: int) -> dict[str, int]:
    statement = sqlalchemy.text("INSERT INTO sweep_rows (run_id, x) VALUES (:run, :x)")
    durable.session().execute(statement, {"run": current_task.request.id, "x": x})
    return {"value": x, "execution": executed("store")}


@step
def refuse() -> None:
    executed("refuse")
    raise ValueError("refused")


@step
def lose_child() -> dict[str, int]:
    """Take the process down, once."""
    execution = executed("lose_child")
    if execution == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": 1, "execution": execution}


@step
def lose_worker() -> dict[str, int]:
    """Take the worker's main process down, once, in the middle of the step."""
    execution = executed("lose_worker")
    if execution == 1:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # the test ends this process too
    return {"value": 1, "execution": execution}


@step
def linger(seconds: float) -> dict[str, int]:
    execution = executed("linger")
    time.sleep(seconds)
    return {"value": 1, "execution": execution}


@app.task(name="sweep.order", base=Workflow)
def order(x: int) -> int:
    total = plus(x, 1)["value"]
    total = flaky(total)["value"]
    total = store(total)["value"]
    return double(total)["value"]


@app.task(name="sweep.follow", base=Workflow)
def follow(x: int) -> int:
    return plus(x, 10)["value"]


@app.task(name="sweep.doomed", base=Workflow)
def doomed(x: int) -> None:
    plus(x, 1)
    refuse()


@app.task(name="sweep.loses_child", base=Workflow)
def loses_child(x: int) -> int:
    plus(x, 1)
    return lose_child()["value"]


@app.task(name="sweep.loses_worker", base=Workflow)
def loses_worker(x: int) -> int:
    plus(x, 1)
    return lose_worker()["value"]


@app.task(name="sweep.lingers", base=Workflow)
def lingers(seconds: float) -> int:
    return linger(seconds)["value"] + plus(0, 1)["value"]


@app.task(name="sweep.parent", base=Workflow)
def parent(x: int, child: str, member: str, plain: str) -> int:
    """Start tasks under these ids, and wait for them."""
    durable.sleep(0.02)
    started = follow.apply_async((x,), task_id=child), note.apply_async((x,), task_id=plain)
    both = group(follow.s(x).set(task_id=member), note.s(x))()
    return sum(result.get() for result in started) + sum(both.get())


@app.task(name="sweep.waits_for", base=Workflow)
def waits_for(seconds: float, child: str) -> int:
    """Wait for a run that takes so long."""
    value: int = lingers.apply_async((seconds,), task_id=child).get()
    return value


@step
def ask(sender: str) -> dict[str, int]:
    """Start the run that sends the event; in a step, so that nobody waits for its outcome."""
    tells.apply_async((current_task.request.id,), task_id=sender)
    return {"value": 1, "execution": executed("ask")}


@app.task(name="sweep.waits", base=Workflow)
def waits(x: int, sender: str) -> int:
    """Wait for a time, for an event, and for one that never comes."""
    durable.sleep(0.02)
    ask(sender)
    total = double(durable.wait_for_event("go", schema=int) + x)["value"]
    try:
        durable.wait_for_event("never", timeout=0.02)
    except durable.EventTimeout:
        total += 1
    return total


@app.task(name="sweep.spreads", base=Workflow)
def spreads(x: int) -> int:
    """Have items executed all over the cluster, two at a time."""
    return sum(
        item["value"] for item in durable.fan_out(ten_more, [x, x + 1, x + 2], max_concurrency=2)
    )


@app.task(name="sweep.tells", base=Workflow)
def tells(run_id: str) -> int:
    """Send an event that does not fit, and one that does."""
    durable.send_event(run_id, "go", "no number")
    durable.sleep(0.02)
    durable.send_event(run_id, "go", 4)
    return plus(1, 1)["value"]


# Plain tasks are as safe as their broker lets them be.
LATE = {"acks_late": True, "reject_on_worker_lost": True}


@app.task(name="sweep.note", **LATE)
def note(x: Any) -> Any:
    """A plain task: next in a chain, or body of a chord."""
    executed("note")
    return x


@app.task(name="sweep.blame", **LATE)
def blame(failed_id: str) -> str:
    """A plain task: an errback."""
    executed("blame", failed_id)
    return failed_id


# --- what a client does


def start(kind: str, ids: list[str]) -> None:
    """Start a workload under these task ids, in the order of its members."""
    first = ids[0]
    if kind == "chain":
        members = order.s(1), follow.s(), note.s()
        members[0].set(link_error=blame.si(first))
        chain(*(each.set(task_id=each_id) for each, each_id in zip(members, ids, strict=True)))()
    elif kind == "failure":
        doomed.apply_async((1,), task_id=first, link_error=blame.s())
    elif kind == "chord":
        *header, body = ids
        chord(
            [follow.s(1).set(task_id=each_id) for each_id in header], note.s().set(task_id=body)
        )()
    elif kind == "waits":
        waits.apply_async((1, ids[1]), task_id=first)
    elif kind == "parent":
        parent.apply_async((1, *ids[1:]), task_id=first)
    elif kind == "message":  # of somebody who does not have the package
        Celery(broker=app.conf.broker_url, set_as_current=False, **_BROKER).send_task(
            "sweep.order", (1,), task_id=first
        )
    else:
        app.tasks[f"sweep.{kind}"].apply_async((1,), task_id=first)


_BROKER = {
    "changes": {
        key: settings[key]
        for key in ("broker_transport_options", "task_default_queue")
        if key in settings
    }
}
