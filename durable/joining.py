"""Waiting for Celery's results in the body of a workflow: any sort of handle parks the run."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from celery.exceptions import ChordError, TaskRevokedError
from celery.result import AsyncResult, EagerResult, ResultSet

from durable.context import of_body
from durable.execution import settled
from durable.failures import decode_failure
from durable.handles import ids_of
from durable.waiting import Verb, awaiting_results, drive

if TYPE_CHECKING:
    from durable.execution import Execution
    from durable.history import Recorded
    from durable.store.waits import Wait

_METHODS = ((AsyncResult, "get"), (AsyncResult, "wait"), (ResultSet, "join"))
_NATIVE = (ResultSet, "join_native")


def install() -> None:
    """Replace Celery's ways to wait, once in a process; outside a body they are as ever."""
    if hasattr(AsyncResult.get, "__wrapped__"):
        return
    for owner, name in (*_METHODS, _NATIVE):
        setattr(owner, name, _parking(getattr(owner, name)))


def _parking(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wait(result: Any, *args: Any, **kwargs: Any) -> Any:
        execution = of_body()
        if execution is None:
            return method(result, *args, **kwargs)
        return join(execution, result, signature.bind(result, *args, **kwargs).arguments)

    return wait


def join(execution: Execution, result: Any, options: Mapping[str, Any]) -> Any:
    """Wait in a plain body; see `joining`."""
    return drive(execution, joining(execution, result, options), "get")


def joining(execution: Execution, result: Any, options: Mapping[str, Any]) -> Verb[Any]:
    """Wait for a task, or for the members of a group; see Celery's ``get``.

    A chain's failure is raised at whichever of its members is waited for: those
    after it never start. A chord's body likewise, with the error of a member of
    the header, or with Celery's `ChordError` if ``follow_parents`` is false.

    Args:
        execution: the run.
        result: the handle.
        options: ``timeout``, ``propagate``, ``follow_parents`` and ``callback`` count.
    """
    propagate = options.get("propagate", True)
    before = dict(_leaves(result, ()))
    found = yield from awaiting_results(
        execution, list(before), options.get("timeout"), before=before, to_failure=propagate
    )
    outcomes = dict(zip(before, found, strict=False))
    follow, callback = options.get("follow_parents", True), options.get("callback")

    def value_of(node: Any) -> Any:
        if isinstance(node, ResultSet):
            return [value_of(member) for member in node.results]
        if isinstance(node, EagerResult):
            return node.get(propagate=propagate)
        value = _value(execution, outcomes[node.id], follow)
        if propagate and isinstance(value, _Failed):
            raise value.error
        return value.error if isinstance(value, _Failed) else value

    if not isinstance(result, ResultSet):
        value = value_of(result)
        if callback is not None:
            callback(result.id, value)
        return value
    if callback is None:
        return value_of(result)
    for member in result.results:
        callback(member.id, value_of(member))
    return []


def _leaves(result: Any, before: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Go through the tasks to wait for, each with those whose failure keeps it from starting."""
    if isinstance(result, EagerResult):
        return
    if getattr(result, "parent", None) is not None:
        before = (*before, *ids_of(result.parent))
    if isinstance(result, ResultSet):
        for member in result.results:
            yield from _leaves(member, before)
    else:
        yield result.id, before


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _value(execution: Execution, outcome: Recorded | Wait, follow_parents: bool) -> Any:
    """Read the recorded outcome of a task."""
    codec = execution.services.codec
    if outcome.status == "succeeded":
        return codec.decode(outcome.output or "null")
    about = json.loads(outcome.context or "{}")
    error: BaseException
    if about.get("outcome") == "canceled":
        error = TaskRevokedError(about.get("reason") or "canceled")
    else:
        error = decode_failure(outcome.error or "null", codec)
    if "by" in about and not follow_parents:
        error = ChordError(f"Dependency {about['by']} raised {error!r}")
    return _Failed(settled(error))
