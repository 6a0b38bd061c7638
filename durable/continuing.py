"""``continue_as_new``: the next pass of an endless workflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from durable.compensation import undo_inline
from durable.context import active
from durable.errors import NonDeterministicWorkflow, NotInWorkflow, Suspend

if TYPE_CHECKING:
    from durable.execution import Execution

#: Why an execution that comes to it is suspended.
CONTINUED = "continue-as-new"


class ContinueInline(Suspend):
    """Unwinds the body of a run without a database; whoever called it calls it again."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__(CONTINUED)
        self.given = (args, kwargs)


def continue_as_new(*args: Any, **kwargs: Any) -> NoReturn:
    """End this pass of the run, and begin its body anew with other arguments and no history.

    For workflows without an end: a run replays all that it has recorded each
    time it wakes, so one that polls for a year has to forget. The id stays, and
    with it the handle, the parent, the chord and the callbacks: they are told
    at the real end, when a pass returns or raises. Events that nobody has
    taken stay for the next pass. `result.run().passes` counts the passes.

    What the body left undone is unwound first, as by an exception: ``finally``
    blocks run, and cannot start anything more. Then the next pass takes the
    place of this one in one commit: a crash before it repeats the end of this
    pass, one after it loses nothing. The recorded steps are deleted, not set
    aside. The deadline of the run stays. Tasks that this pass has started go
    on, but the next pass cannot wait for them: wait for those that matter
    first.

    A run that has a version is from then on of the version of the code that
    calls this: here endless workflows get to newer code.

    Args:
        *args: for the next pass, checked and encoded as at a start.
        **kwargs: likewise.

    Raises:
        NotInWorkflow: outside the body of a workflow.
        TypeError: the arguments do not fit the workflow.
        PayloadError: they cannot be stored.

    Example:
        >>> @workflow
        ... def count(done: int, of: int) -> int:
        ...     done = run_step("work", lambda: done + 1)
        ...     if done < of:
        ...         durable.continue_as_new(done, of=of)
        ...     return done
        >>> result = count.delay(0, of=3)
        >>> result.get(timeout=30)
        3
        >>> result.run().passes, len(result.steps())
        (2, 1)
    """
    execution = active("continue_as_new")
    execution.check()
    if execution.in_step:
        raise NotInWorkflow(
            "durable.continue_as_new() belongs in the body of a workflow: a step has to end before"
            " the run can begin anew"
        )
    if execution.encode_arguments is None:
        raise NotInWorkflow(f"run {execution.id} cannot begin anew here")
    given = execution.encode_arguments(args, kwargs)
    if execution.journal.inline:
        raise ContinueInline(args, kwargs)
    try:
        execution.check_complete()
    except NonDeterministicWorkflow as exc:
        raise execution.pause(exc) from exc
    execution.next_input = given
    raise execution.suspend(CONTINUED, 0.0)


def run_passes(
    begin: Callable[[], Execution], body: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Run a body inline, again and again while it continues as new."""
    while True:
        execution = begin()
        try:
            with execution.active():
                return body(*args, **kwargs)
        except ContinueInline as again:
            args, kwargs = again.given
        except Exception as exc:
            undo_inline(execution, exc)
            raise
