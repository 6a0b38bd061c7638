"""Handles of started tasks, as the history keeps them and as the body gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from celery.result import GroupResult, result_from_tuple

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import ResultBase

    from durable.execution import Execution

#: Header of a task's message: the run whose history its outcome goes into.
WAITER = "durable_waiter"


def started_once(
    execution: Execution, app: Celery, name: str, send: Callable[[], ResultBase]
) -> Any:
    """Start tasks in the body of a workflow: once, with the same handle on every replay."""
    started = execution.dispatch(name, lambda: _describe(send()))
    return result_from_tuple(started["handle"], app)


def _describe(result: Any) -> Mapping[str, Any]:
    return {"ids": sorted(set(_ids(result))), "handle": _as_lists(result.as_tuple())}


def _ids(result: Any) -> Iterator[str]:
    """Go through the tasks of a handle: a group's members, and what came before in a chain."""
    if isinstance(result, GroupResult):
        for member in result.results:
            yield from _ids(member)
    else:
        yield result.id
    if result.parent is not None:
        yield from _ids(result.parent)


def _as_lists(handle: Any) -> Any:
    return [_as_lists(part) for part in handle] if isinstance(handle, (tuple, list)) else handle
