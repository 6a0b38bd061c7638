"""Workflows that start other tasks from their bodies, and wait for them.

Each task notes that it ran, under its own id; each body notes what it got on
each of its passes, so that a test can tell whether they agree.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery, chain, chord, group
from celery.canvas import StampingVisitor
from celery.exceptions import Ignore, Reject
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, ResultSet, allow_join_result

import durable
from durable import Durable, Workflow, step
from durable.handles import ids_of
from tests.apps import settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("children")
app.conf.update(settings)
Durable(app)
#: Not registered with every other app of the test process, as Celery does by default.
task = functools.partial(app.task, shared=False)
workflow = functools.partial(app.task, shared=False, base=Workflow)

#: An app without `Durable`, whose messages the same workers get.
other_app = Celery("children", set_as_current=False)
other_app.conf.update({k: v for k, v in settings.items() if not k.startswith("durable")})


def note(run_id: str | None, what: str, value: object = None) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(json.dumps([run_id, what, value], default=repr) + "\n")


def ran(self: Any, value: object = None) -> int:
    """Note an execution; tell how many there were of this task before."""
    before = sum(
        json.loads(line)[:2] == [self.request.id, "ran"] for line in TRACE.read_text().splitlines()
    )
    note(self.request.id, "ran", value)
    return before


# --- children, durable and plain


@workflow(bind=True)
def add(self: Any, x: int, y: int) -> int:
    ran(self, self.request.headers)
    return x + y


@workflow(bind=True)
def slow_add(self: Any, x: int, y: int) -> int:
    """Sleeps, and its step backs off once."""
    note(self.request.id, "pass")
    durable.sleep(0.05)
    value: int = unsteady(x, y)
    return value


@step(retry_backoff=0.05, name="unsteady")
def unsteady(x: int, y: int) -> int:
    if durable.current().step_attempt == 1:
        raise durable.RecoverableError("not yet")
    return x + y


@workflow(bind=True)
def total(self: Any, numbers: list[int]) -> int:
    ran(self)
    return sum(numbers)


@workflow()
def fails(*_: object) -> None:
    raise ValueError("a child's error")


@workflow(deadline=0.2)
def too_late() -> None:
    durable.wait_for_event("never")


@workflow(time_limit=1)
def hangs() -> None:
    time.sleep(60)


@workflow()
def waits() -> None:
    durable.wait_for_event("never")


@workflow(bind=True)
def dies_once(self: Any, x: int) -> int:
    """Sleeps, and takes its process along on its first pass after that."""
    durable.sleep(0.05)
    if ran(self) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@task(bind=True)
def plain_add(self: Any, x: int, y: int) -> int:
    request = self.request
    ran(self, [request.headers, request.stamps, (request.delivery_info or {}).get("priority")])
    return x + y


@task(bind=True)
def plain_double(self: Any, x: int) -> int:
    ran(self, 2 * x)
    return 2 * x


@task(bind=True)
def plain_total(self: Any, numbers: list[int]) -> int:
    ran(self)
    return sum(numbers)


@task(bind=True)
def called_back(self: Any, *args: object) -> None:
    """A callback: notes under the run that started it all, who called it."""
    note(self.request.root_id, "called_back", [self.request.parent_id, repr(args)])


@task()
def plain_fails(*_: object) -> None:
    raise KeyError("a plain task's error")


@task()
def plain_unstorable() -> object:
    return {1: "a dict with a key that JSON does not have"}


@task(bind=True, max_retries=3)
def plain_retries(self: Any) -> int:
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@task(bind=True)
def plain_replaced(self: Any, how: str) -> object:
    instead = {
        "durable": slow_add.si(1, 2),
        "plain": plain_add.si(1, 2),
        "chain": chain(plain_add.si(1, 1), add.s(1)),
        "group": group(plain_add.si(1, 2), add.si(3, 4)),
    }[how]
    return self.replace(instead)


@task()
def plain_ignores() -> None:
    raise Ignore


@task(bind=True)
def plain_rejects(self: Any) -> None:
    raise Reject("not for me", requeue=False)


@task()
def plain_dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@task(bind=True, acks_late=True, reject_on_worker_lost=True)
def plain_dies_once(self: Any) -> str:
    if ran(self) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@task(time_limit=1)
def plain_hangs() -> None:
    time.sleep(60)


# --- what is started in a body


class Stamps(StampingVisitor):  # type: ignore[misc]
    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"maker": "the body", "stamped_headers": ["maker"]}


def _starts(run_id: str) -> dict[str, Any]:
    """Ways to start tasks, each a function that returns a handle."""
    both = {"durable": add, "plain": plain_add}
    ways: dict[str, Any] = {}
    for sort, child in both.items():
        ways |= {
            f"{sort} delay": lambda child=child: child.delay(1, 2),
            f"{sort} countdown": lambda child=child: child.apply_async((1, 2), countdown=0.05),
            f"{sort} send_task": lambda child=child: app.send_task(child.name, (1, 2)),
            f"{sort} by another app": lambda child=child: other_app.send_task(child.name, (1, 2)),
            f"{sort} signature": lambda child=child: app.signature(child.name, (1, 2)).delay(),
            f"{sort} si": lambda child=child: child.si(1, 2).apply_async(),
            f"{sort} headers": lambda child=child: child.apply_async((1, 2), headers={"mine": 1}),
            f"{sort} priority": lambda child=child: child.apply_async((1, 2), priority=3),
            f"{sort} task_id": lambda child=child: child.apply_async(
                (1, 2), task_id=str(durable.uuid4())
            ),
            f"{sort} ignored": lambda child=child: child.apply_async((1, 2), ignore_result=True),
            f"{sort} link": lambda child=child: child.apply_async((1, 2), link=called_back.s()),
            f"{sort} stamped": lambda child=child: _stamped(child.s(1, 2)),
            f"{sort} chunks": lambda child=child: child.chunks([(1, 3), (2, 4)], 1)(),
        }
    ways |= {
        "link_error": lambda: fails.apply_async(link_error=called_back.si()),
        "plain link_error": lambda: plain_fails.apply_async(link_error=called_back.si()),
        "group": lambda: group(add.s(1, 1), plain_add.s(2, 2)).delay(),
        "generated group": lambda: group(plain_add.s(n, n) for n in range(2)).delay(),
        "group with a countdown": lambda: group(add.s(1, 1), plain_add.s(2, 2)).apply_async(
            countdown=0.05
        ),
        "group of the ignored": lambda: group(
            add.s(1, 1).set(ignore_result=True), plain_add.s(1, 1).set(ignore_result=True)
        ).delay(),
        "chain": (add.s(1, 1) | plain_double.s() | add.s(2)).delay,
        "chain by name": chain(app.signature(add.name, (1, 1)), plain_double.s()),
        "chord": lambda: chord([add.s(1, 1), plain_add.s(2, 2)])(total.s()),
        "chord of its own body": lambda: chord([add.s(1, 1)], plain_total.s()).delay(),
        "chain of groups": chain(
            group(add.s(1, 1), plain_add.s(1, 1)), group(total.s(), plain_total.s())
        ),
        "chain to a chord": add.s(1, 1)
        | group(add.s(1), plain_double.s())
        | total.s()
        | plain_double.s(),
        "nested": group(
            group(add.s(1, 1), plain_add.s(1, 1)), chain(add.s(1, 1), plain_double.s())
        ),
        "stamped group": lambda: _stamped(group(add.s(1, 1), plain_add.s(2, 2))),
        "map": lambda: plain_double.map([1, 2]).delay(),
        "starmap": lambda: plain_add.starmap([(1, 2), (3, 4)]).delay(),
        "empty group": group([]),
    }
    return ways


def _stamped(signature: Any) -> Any:
    signature.stamp(Stamps())
    return signature.apply_async()


@workflow(bind=True)
def starts_everything(self: Any) -> dict[str, list[str]]:
    """Starts tasks in every way, sleeping in between; notes the ids on each pass."""
    seen: dict[str, list[str]] = {}
    for number, (way, start) in enumerate(_starts(self.request.id).items()):
        seen[way] = [*ids_of(start())]
        if number % 8 == 0:
            note(self.request.id, "seen", seen)
            durable.sleep(0.01)
    note(self.request.id, "seen", seen)
    return seen


@workflow(bind=True)
def waits_for_everything(self: Any) -> dict[str, Any]:
    """Starts tasks in every way, and waits for each."""
    handles = {way: start() for way, start in _starts(self.request.id).items()}
    note(self.request.id, "started")
    values = {way: handle.get(propagate=False) for way, handle in handles.items()}
    return {way: _caught(v) if isinstance(v, Exception) else v for way, v in values.items()}


@workflow(bind=True)
def runs_script(self: Any, script: str, *args: Any) -> Any:
    """Execute one of `SCRIPTS`, noting each pass."""
    note(self.request.id, "pass")
    return SCRIPTS[script](*args)


def _get(name: str, *args: Any, **options: Any) -> Any:
    return app.tasks[f"tests.apps.children.{name}"].delay(*args).get(**options)


def _caught(error: BaseException) -> list[str]:
    return [type(error).__name__, str(error)]


def _outcome(name: str, *args: Any) -> Any:
    return _tried(lambda: _get(name, *args))


def _tried(get: Callable[..., Any]) -> Any:
    try:
        return get()
    except Exception as exc:  # noqa: BLE001 - what came of it is what the test looks at
        return _caught(exc)


def _times_out() -> list[Any]:
    child = waits.delay()
    passed = []
    for _ in range(2):
        try:
            child.get(timeout=0.1)
        except CeleryTimeoutError:
            passed.append("timeout")
    durable.sleep(0.01)
    return [*passed, plain_add.delay(1, 2).get(timeout=30)]


def _broken_chain(how: str) -> Any:
    first = {"durable": fails, "plain": plain_fails}[how]
    result = chain(add.s(1, 1), first.s(), add.s(1), plain_double.s())()
    return [
        _tried(result.get),
        _caught(result.parent.get(propagate=False)),
        _caught(result.parent.parent.get(propagate=False)),
        result.parent.parent.parent.get(),
    ]


def _broken_chord(how: str) -> Any:
    bad = {"durable": fails, "plain": plain_fails}[how]
    result = chord([add.s(1, 1), bad.s(), plain_add.s(1, 1)])(total.s())
    return [
        _caught(result.get(propagate=False)),
        _caught(result.get(propagate=False, follow_parents=False)),
        result.parent[0].get(),
    ]


def _broken_group() -> Any:
    """The error of a member comes before others have ended."""
    result = group(add.s(1, 1), plain_fails.s(), waits.s())()
    try:
        result.get()
    except KeyError as exc:
        caught = _caught(exc)
    result[2].revoke()
    values = result.join(propagate=False)
    return [caught, values[0], *map(_caught, values[1:])]


def _sets() -> Any:
    first, second = add.delay(1, 1), plain_add.delay(2, 2)
    pairs: list[Any] = []
    both = ResultSet([first, group(add.s(3, 3), plain_add.s(4, 4))(), second])
    with allow_join_result():
        joined = both.join()
    return [
        joined,
        both.get(disable_sync_subtasks=False),
        ResultSet([first, second]).join_native(),
        ResultSet([first, second]).get(callback=lambda _, value: pairs.append(value)),
        pairs,
        AsyncResult(second.id, app=app).get(),
        plain_add.AsyncResult(second.id).wait(timeout=30),
        app.AsyncResult(first.id).get(),
    ]


def _of_others(task_id: str) -> Any:
    result = add.apply_async((5, 5), task_id=task_id)
    return [result.id, _tried(result.get)]


def _bad_argument(how: str) -> Any:
    child = {"durable": add, "plain": plain_add}[how]
    return _tried(lambda: child.delay(object(), 1))


@step(name="starts_in_step", retry_backoff=0.01)
def _started_in_step() -> Any:
    """Start the same tasks at each attempt, the first time in another order."""
    attempt = durable.current().step_attempt
    starts = [lambda: add.delay(1, 1), lambda: total.delay([1, 2])]
    ids = sorted(start().id for start in (starts if attempt == 1 else reversed(starts)))
    ids += ids_of(group(add.s(1, 1), plain_add.s(1, 1))())
    ids += ids_of(chord([add.s(1, 1)])(plain_total.s()))
    note(None, "in step", ids)
    if attempt == 1:
        raise durable.RecoverableError("again")
    return ids


@step(name="gets_in_step")
def _got_in_step(how: str) -> Any:
    child = add.delay(1, 1)
    if how == "allowed":
        with allow_join_result():
            return child.get(timeout=30)
    return _tried(child.get)


@task()
def plain_gets(how: str) -> Any:
    child = add.delay(1, 1)
    if how == "allowed":
        return child.get(timeout=30, disable_sync_subtasks=False)
    return _tried(child.get)


def _refusing(result: Any) -> Any:
    return _caught(result.get(propagate=False))


#: Used again and again, as a signature of a module would be.
REUSED = group(add.s(1, 1), chain(plain_add.s(2, 2), plain_double.s()))


def _used_again() -> Any:
    results = [REUSED(), REUSED()]
    return [[*ids_of(result)] for result in results], [result.get() for result in results]


def _children_of(*signatures: str) -> Any:
    """Chord in a body whose members sleep, back off and are killed."""
    result = chord([slow_add.s(1, 1), dies_once.s(2), plain_add.s(3, 3)])(total.s())
    return [result.get(), [*ids_of(result)]]


def _waiting_for(name: str) -> Any:
    """Wait for a child whose id the test has to know."""
    child = app.tasks[f"tests.apps.children.{name}"].delay()
    note(current().request.id, "child", child.id)
    return _tried(child.get)


def _waiting_for_late(how: str, **options: Any) -> Any:
    """Wait for a plain task that a worker cannot start at once."""
    child = plain_add.apply_async((1, 2), **options)
    note(current().request.id, "child", child.id)
    return _tried(child.get)


def current() -> Any:
    return app.current_task


SCRIPTS: dict[str, Any] = {
    "get": _get,
    "outcome": _outcome,
    "times out": _times_out,
    "broken chain": _broken_chain,
    "broken chord": _broken_chord,
    "broken group": _broken_group,
    "sets": _sets,
    "of others": _of_others,
    "bad argument": _bad_argument,
    "starts in step": _started_in_step,
    "gets in step": _got_in_step,
    "used again": _used_again,
    "chord of the unsteady": _children_of,
    "waiting for": _waiting_for,
    "waiting for a revoked one": lambda: _waiting_for_late("revoked", countdown=2),
    "waiting for an expired one": lambda: _waiting_for_late("expired", countdown=0.3, expires=0.1),
    "unknown": lambda: _refusing(app.send_task("tests.apps.children.nobody_has_this")),
}
