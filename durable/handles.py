"""Handles of started tasks, as the history keeps them and as the body gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from celery.result import ResultSet, result_from_tuple

from durable import context

if TYPE_CHECKING:
    from celery import Celery

    from durable.execution import Execution

#: Header of a task's message: the run whose history its outcome goes into.
WAITER = "durable_waiter"


def send_once(
    app: Celery, name: str, options: dict[str, Any], send: Callable[[dict[str, Any]], Any]
) -> Any:
    """Start one task. In a run under an id that a repetition gives it again; in a body, once.

    Args:
        app: whose task it is.
        name: of the task.
        options: of ``send_task``.
        send: sends it, with the options as they are to be.
    """
    execution = context.stored()
    if execution is None:
        return send(options)
    options = {**options, "task_id": options.get("task_id") or execution.new_task_id(name)}
    if execution.in_step:
        return send(options)
    options["headers"] = {**(options.get("headers") or {}), WAITER: execution.id}
    return started_once(execution, app, name, lambda: send(options))


def started_once(execution: Execution, app: Celery, name: str, send: Callable[[], Any]) -> Any:
    """Start tasks in the body of a workflow: once, with the same handle on every replay."""
    started = execution.dispatch(name, lambda: _describe(send()))
    handle = result_from_tuple(started["handle"], app)
    execution.started_tasks.update(set(ids_of(handle)) - {*started.get("others", ())})
    return handle


def _describe(result: Any) -> Mapping[str, Any]:
    """What is recorded. ``others``: what was running already, started by somebody else.

    SQL looks at ``ids`` to find the outcomes of what was started.
    """
    described = {"ids": [*dict.fromkeys(ids_of(result))], "handle": _as_lists(result.as_tuple())}
    others = [task.id for task in tasks_of(result) if getattr(task, "durable_of_others", False)]
    return {**described, "others": others} if others else described


def ids_of(result: Any) -> Iterator[str]:
    """Go through the ids of a handle's tasks; see `tasks_of`."""
    for task in tasks_of(result):
        yield task.id


def tasks_of(result: Any) -> Iterator[Any]:
    """Go through the tasks of a handle, oldest first: what came before in a chain, members."""
    if getattr(result, "parent", None) is not None:
        yield from tasks_of(result.parent)
    if isinstance(result, ResultSet):
        for member in result.results:
            yield from tasks_of(member)
    else:
        yield result


def _as_lists(handle: Any) -> Any:
    return [_as_lists(part) for part in handle] if isinstance(handle, (tuple, list)) else handle
