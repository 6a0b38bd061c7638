"""``durable.compensate``: what a run undoes, last things first, if it fails or is canceled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

from celery import Task
from celery.exceptions import Ignore, Reject, Retry

from durable import loop
from durable.context import active
from durable.coroutines import run_inline_step
from durable.errors import NotInWorkflow, OptionError
from durable.retry import RetryPolicy
from durable.steps import Step, StepSignature, check_step_name, refuse_suspending
from durable.store.compensation import BRANCH, NAME

if TYPE_CHECKING:
    from durable.execution import Execution
    from durable.history import History

P = ParamSpec("P")


class Ending(NamedTuple):
    """What a run ends as once all is undone."""

    status: str
    reason: str | None = None
    error: str | None = None


class Failed(NamedTuple):
    """An undo step that has failed for good."""

    name: str
    ordinal: int
    error: Exception


def compensate(fn: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
    """Register what undoes what was just done, in case the run fails or is canceled.

    Then ``fn(*args, **kwargs)`` is executed as a step: remembered, tried again
    by its retry options, gone on with after a crash. What was registered last
    is undone first. If the body returns, nothing is undone. A cancel of a run
    that has something to undo goes to a worker, also if it was parked.

    Call it right after the step that it undoes; before that step if the step may
    have taken effect although it failed. It costs one statement the first
    time in a run, else nothing.

    Args:
        fn: a step, or a plain function, which becomes a step with the default
            options, named by module and function. An ``async def`` only in
            an ``async def`` workflow.
        *args: for it.
        **kwargs: likewise.

    Raises:
        NotInWorkflow: outside the body of a workflow.
        OptionError: ``fn`` is nothing that can be a step here.

    Example:
        >>> @step
        ... def reserve(seat: str) -> None:
        ...     print("reserved", seat)
        >>> @step
        ... def release(seat: str) -> None:
        ...     print("released", seat)
        >>> @workflow
        ... def book(seats: list[str]) -> None:
        ...     for seat in seats:
        ...         reserve(seat)
        ...         durable.compensate(release, seat)
        ...     raise durable.PermanentError("the card is gone")
        >>> try:
        ...     book(["7A", "7B"])
        ... except durable.PermanentError as exc:
        ...     print(exc)
        reserved 7A
        reserved 7B
        released 7B
        released 7A
        the card is gone
    """
    execution = active("compensate")
    if execution.in_step:
        raise NotInWorkflow(
            "durable.compensate() belongs in the body of a workflow: a step that fails has to clean"
            " up after itself"
        )
    execution.compensate(StepSignature(_step_of(fn, execution), args, kwargs))


def _step_of(fn: Any, execution: Execution) -> Step[..., Any]:
    if isinstance(fn, Step):
        made = fn
    else:
        if not callable(fn) or isinstance(fn, Task):
            raise OptionError(
                f"durable.compensate() takes a step or a function, not {fn!r:.200}: start a task"
                " in a step"
            )
        refuse_suspending(fn, "durable.compensate()")
        if not hasattr(fn, "__qualname__"):
            raise OptionError(
                f"durable.compensate() got a function without a name, {fn!r:.200}: make a step of"
                " it, durable.step(name=...)(function)"
            )
        name = f"{fn.__module__}.{fn.__qualname__}"
        check_step_name(name, "durable.compensate()")
        made = Step(fn, name, RetryPolicy())
    if made.is_async and execution.driver is None:
        raise OptionError(
            f"the async step {made.name!r} can undo nothing in workflow {execution.name!r}, which"
            " has no event loop: make the workflow an `async def`, or the step a plain `def`"
        )
    return made


def decided(history: History) -> Ending | None:
    """Look up what the run is to end as. None: nothing is being undone."""
    found = history.attempts(BRANCH, 0, NAME, "undo")
    if not found:
        return None
    said = json.loads(found[-1].output or "{}")
    return Ending(said["status"], said["reason"], found[-1].error)


def undo(execution: Execution, *, on_loop: bool) -> Failed | None:
    """Undo what is registered; what could not be undone, if there is something."""
    if on_loop:
        failed: Failed | None = loop.run(execution, undo_async(execution))
        return failed
    for each in execution.to_undo():
        try:
            execution.step(each.step, each.args, each.kwargs)
        except Exception as exc:  # noqa: BLE001 - whatever it is, a person has to see to it
            return _failed(execution, each, exc)
    return None


async def undo_async(execution: Execution) -> Failed | None:
    """Undo in an event loop, one thing after the other."""
    for each in execution.to_undo():
        try:
            if each.step.is_async:
                await execution.async_step(each.step, each.args, each.kwargs)
            else:
                execution.step(each.step, each.args, each.kwargs)
        except Exception as exc:  # noqa: BLE001 - see above
            return _failed(execution, each, exc)
    return None


def _failed(execution: Execution, undo: StepSignature[Any], error: Exception) -> Failed:
    return Failed(undo.step.name, execution.branch.next_ordinal - 1, error)


def undo_inline(execution: Execution, exc: Exception) -> None:
    """Undo what a run without a database has done that fails with ``exc``."""
    if not execution.compensations or isinstance(exc, (Ignore, Reject, Retry)):
        return
    execution.begin_undo()
    with execution.active():
        for each in execution.to_undo():
            if each.step.is_async:
                run_inline_step(execution, each.step, each.args, each.kwargs)
            else:
                execution.step(each.step, each.args, each.kwargs)
