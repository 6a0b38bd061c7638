"""``patched``: changing a workflow's code while runs of the older code go on."""

from __future__ import annotations

from durable.context import active
from durable.errors import NotInWorkflow, OptionError
from durable.history import PATCH
from durable.names import LONGEST_NAME, is_name
from durable.store.steps import StepAttempt


def patched(patch_id: str) -> bool:
    """Tell whether the run is to take the new way at this place of its body.

    False in a run whose recorded history is past this place: it went the old
    way and has to go it again on every replay. True in any other, new runs
    and those that have not come here yet; that is recorded, so it stays True.
    A wait that is going on is recorded too: a run that is parked right after
    this place is past it, one that is parked right before is not.

    The record takes no place in the history. When no run is left that went
    the old way, remove the call and the old way: recorded patches that the
    code does not ask for any more are passed over. Costs what a step costs the
    first time, nothing on replay.

    Args:
        patch_id: names the change. A later change at the same place gets
            another one; two calls at one place with the same id are one.

    Raises:
        NotInWorkflow: outside the body of a workflow.
        OptionError: no name.

    Example:
        >>> @workflow
        ... def fulfil(order_id: str) -> str:
        ...     if durable.patched("gift-wrap"):
        ...         run_step("wrap", lambda: "red paper")
        ...     return run_step("ship", lambda: f"parcel of {order_id}")
        >>> result = fulfil.delay("o-42")
        >>> result.get(timeout=30)
        'parcel of o-42'
        >>> [(step.kind, step.name) for step in result.steps()]
        [('patch', 'gift-wrap'), ('run', 'wrap'), ('run', 'ship')]
    """
    execution = active("patched")
    if not is_name(patch_id):
        raise OptionError(
            f"durable.patched({patch_id!r:.80}): give the change a name of 1 to {LONGEST_NAME}"
            " printable characters"
        )
    execution.check()
    if execution.in_step:
        raise NotInWorkflow(
            "durable.patched() belongs in the body of a workflow: a step runs once, with whatever"
            " code there is, and needs no patches"
        )
    branch, history = execution.branch, execution.history
    if history.is_patched(branch.path, branch.next_ordinal, patch_id):
        return True
    if history.covers(branch.path, branch.next_ordinal):
        return False
    execution.before_new()
    # Attempt 0, so that it stands beside a step of that name at the same place.
    execution.note(
        StepAttempt(
            execution.id,
            execution.attempt,
            branch.path,
            branch.next_ordinal,
            patch_id,
            0,
            PATCH,
            "succeeded",
            0.0,
        )
    )
    history.add_patch(branch.path, branch.next_ordinal, patch_id)
    return True
