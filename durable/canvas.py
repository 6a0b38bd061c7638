"""Celery's canvas in the body of a workflow: started once, under the same ids on each replay.

Groups, chains and chords make new ids whenever they are built, and send
several messages from places that no subclass of ours is asked at. So the
three ``apply_async`` and the module's source of ids are replaced, for calls
that come out of a workflow; all others go straight on. So is the
``send_task`` of apps that have no `Durable`, and the hook by which a task
replaces itself, which a task's waiting run has to learn of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from celery import Celery, Task, canvas
from kombu.utils.uuid import uuid as random_id

from durable import context
from durable.context import of_body
from durable.handles import WAITER, send_once, started_once
from durable.keys import refuse_in_chord

_COMPOSITES = (canvas._chain, canvas.group, canvas._chord)  # noqa: SLF001 - there is no other seam


def install() -> None:
    """Replace what has to be, once in a process."""
    if canvas.uuid is _new_id:
        return
    canvas.uuid = _new_id
    for composite in _COMPOSITES:
        composite.apply_async = _remembered(composite.apply_async)
    Celery.send_task = _sent_once(Celery.send_task)
    Task.on_replace = _handed_on(Task.on_replace)


def _new_id() -> str:
    execution = context.stored()
    return str(random_id()) if execution is None else execution.new_task_id()


def _remembered(apply_async: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(apply_async)
    def start(signature: Any, *args: Any, **kwargs: Any) -> Any:
        if signature.get("subtask_type") == "chord":
            refuse_in_chord({**signature.options, **kwargs})
        execution = of_body()
        if execution is None:
            return apply_async(signature, *args, **kwargs)
        marked = signature.clone()
        given = _with_own_body(marked, *args, **kwargs)
        for member in _members(marked):
            _mark(member, execution.id)
        return started_once(
            execution, marked.app, marked.task, lambda: apply_async(marked, **given)
        )

    return start


def _with_own_body(signature: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
    """Put the body that a chord is called with into the chord; return the rest of the call."""
    if signature.get("subtask_type") == "chord" and kwargs and kwargs.get("body"):
        kwargs = dict(kwargs)
        signature.kwargs["body"] = canvas.maybe_signature(kwargs.pop("body"), signature.app).clone()
    return {"args": args, "kwargs": kwargs, **options}


def _sent_once(send_task: Callable[..., Any]) -> Callable[..., Any]:
    """Remember tasks of another app in the process; an app with `Durable` has a `Starter`."""

    @functools.wraps(send_task)
    def send(app: Any, name: str, args: Any = None, kwargs: Any = None, *rest: Any, **options: Any):  # type: ignore[no-untyped-def]  # noqa: ANN202
        if rest or of_body() is None:
            return send_task(app, name, args, kwargs, *rest, **options)
        return send_once(
            app, name, options, lambda more: send_task(app, name, args, kwargs, **more)
        )

    return send


def _handed_on(on_replace: Callable[..., Any]) -> Callable[..., Any]:
    """Have the outcome of what replaces a task, under the task's id, sent to the run that waits."""

    @functools.wraps(on_replace)
    def replace(task: Any, signature: Any) -> Any:
        request = task.request
        waiter = getattr(request, WAITER, None)
        if waiter is not None:
            request.durable_replaced = True
            for member in _members(signature):
                if member["options"].get("task_id") == request.id:
                    _mark(member, waiter)
        return on_replace(task, signature)

    return replace


def _members(signature: Any) -> Iterator[Any]:
    """Go through the tasks that a signature starts, also those that a worker starts later."""
    parts: Any = signature.get("kwargs") or {}
    kind = signature.get("subtask_type")
    if kind in {"chain", "group"}:
        for member in parts["tasks"]:
            yield from _members(member)
    elif kind == "chord":
        header = parts["header"]
        members = header.get("kwargs", {}).get("tasks", ()) if isinstance(header, dict) else header
        for member in members:
            yield from _members(member)
        yield from _members(parts["body"])
    elif "task" in signature:
        yield signature


def _mark(member: Any, run_id: str) -> None:
    options = member["options"]
    options["headers"] = {**(options.get("headers") or {}), WAITER: run_id}
