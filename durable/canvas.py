"""Celery's canvas in the body of a workflow: started once, under the same ids on each replay.

Groups, chains and chords make new ids whenever they are built, and send
several messages from places that no subclass of ours is asked at. So the
three ``apply_async`` and the module's source of ids are replaced, for calls
that come out of a workflow; all others go straight on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from celery import canvas
from kombu.utils.uuid import uuid as random_id

from durable import context
from durable.handles import WAITER, started_once

_COMPOSITES = (canvas._chain, canvas.group, canvas._chord)  # noqa: SLF001 - there is no other seam


def install() -> None:
    """Replace what has to be, once in a process."""
    if canvas.uuid is _new_id:
        return
    canvas.uuid = _new_id
    for composite in _COMPOSITES:
        composite.apply_async = _remembered(composite.apply_async)


def _new_id() -> str:
    execution = context.running.get()
    if execution is None or execution.journal.inline:
        return str(random_id())
    return execution.new_task_id()


def _remembered(apply_async: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(apply_async)
    def start(signature: Any, *args: Any, **kwargs: Any) -> Any:
        execution = context.running.get()
        if execution is None or execution.in_step or execution.journal.inline:
            return apply_async(signature, *args, **kwargs)
        marked = signature.clone()
        _mark(marked, execution.id)
        return started_once(
            execution, marked.app, marked.task, lambda: apply_async(marked, *args, **kwargs)
        )

    return start


def _mark(signature: Any, run_id: str) -> None:
    """Have each member's outcome sent to the run: also of those that a worker starts later."""
    parts: Mapping[str, Any] = signature.get("kwargs") or {}
    kind = signature.get("subtask_type")
    if kind in {"chain", "group"}:
        for member in parts["tasks"]:
            _mark(member, run_id)
    elif kind == "chord":
        header = parts["header"]
        for member in (
            header.get("kwargs", {}).get("tasks", ()) if isinstance(header, dict) else header
        ):
            _mark(member, run_id)
        _mark(parts["body"], run_id)
    else:
        options = signature["options"]
        options["headers"] = {**(options.get("headers") or {}), WAITER: run_id}
