"""The items of a fan-out: what each is, and the run that it becomes.

A workflow is a run already. A step gets one around it, ``durable.step``, and
whatever else Celery can start one that starts it and waits, ``durable.signature``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from celery import Task, signature
from celery.canvas import Signature
from celery.result import allow_join_result

from durable import context, loop, stored_message
from durable.context import active
from durable.coroutines import run_inline_step
from durable.errors import OptionError
from durable.masking import HIDDEN, Mask
from durable.steps import Step, StepSignature, find_step, place_of
from durable.store.runs import NewRun, Park
from durable.task import Workflow

if TYPE_CHECKING:
    from celery import Celery

    from durable.execution import Execution

STEP = "durable.step"
SIGNATURE = "durable.signature"

#: Which of the parent's publish options its items get: they go the same way.
_ROUTE = ("queue", "exchange", "routing_key", "priority")
#: Characters of an item's arguments in logs, events and Flower, as Celery's own.
_REPR = 1024
#: Before a worker looks for an unknown step again, in seconds: another one may have it.
_UNKNOWN_REST = 5.0


class _Around(Workflow):
    """A run that its parent wants the result of, and nobody else."""

    abstract = True
    durable_keeps_output = True


def install(app: Celery) -> None:
    """Register the runs around items on an app."""
    options = {"bind": True, "base": _Around, "shared": False}
    app.task(name=STEP, **options)(_run_step)
    app.task(name=SIGNATURE, **options)(_run_signature)


def _run_step(self: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
    execution = active("fan_out")
    place = json.loads(self.request.durable_claim.message).get("durable_place", "")
    step = find_step(name, place)
    if step is None:
        reason = f"step {name!r} ({place}) is not known to the worker that took it"
        suspend = execution.park(Park("sleeping", reason, delay=_UNKNOWN_REST))
        assert suspend is not None
        raise suspend
    execution.sole_step = True
    if step.is_async:
        return loop.run_step(execution, step, args, kwargs)
    return execution.step(step, args, kwargs)


def _run_signature(self: Any, given: Mapping[str, Any], /, *args: Any) -> Any:
    return signature(given, app=self.app).apply_async(args).get()


# --- what is given to fan_out() and gather()


@dataclass(frozen=True, slots=True)
class Item:
    """One call of a fan-out: a step, or a signature of Celery's with arguments to come first."""

    target: Step[..., Any] | Signature
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the step or task."""
        return name_of(self.target)

    def shown(self, mask: Mask) -> str:
        """Describe the call for people."""
        if mask.hides_all:
            return f"{self.name}({HIDDEN})"
        args, kwargs = mask.arguments(self._function, self.args, self.kwargs)
        given = [mask.shown(value, _REPR) for value in args]
        given += [f"{key}={mask.shown(value, _REPR)}" for key, value in kwargs.items()]
        return f"{self.name}({', '.join(given)})"[:_REPR]

    @property
    def _function(self) -> Callable[..., Any] | None:
        """What has names for the arguments, if it is known."""
        if isinstance(self.target, Step):
            return self.target.function
        task = self.target.app.tasks.get(self.target.task)
        return None if task is None else cast("Callable[..., Any]", task.run)

    def run_inline(self, execution: Execution) -> Any:
        """Execute it here and now."""
        if isinstance(self.target, Step):
            if self.target.is_async:
                return run_inline_step(execution, self.target, self.args, self.kwargs)
            return execution.step(self.target, self.args, self.kwargs)
        token = context.running.set(None)  # a workflow is a run of its own
        try:
            with allow_join_result():  # a chain and a chord wait for their parts
                return self.target.apply(self.args).get()
        finally:
            context.running.reset(token)


def target_of(given: object, where: str) -> Step[..., Any] | StepSignature[Any] | Signature:
    """Check what is to be called for each item.

    Raises:
        OptionError: it is nothing that a worker could execute.
    """
    if isinstance(given, (Step, StepSignature)):
        place_of(given if isinstance(given, Step) else given.step)
        return given
    if isinstance(given, Task):
        return given.s()
    if isinstance(given, Signature):
        return given
    raise OptionError(
        f"{where} takes a step (@step), a workflow, a Celery task or a signature, not {given!r:.200}"
    )


def item_for(target: Step[..., Any] | StepSignature[Any] | Signature, thing: object) -> Item:
    """Make the item of one of the things that ``target`` is called for: it comes first."""
    if isinstance(target, StepSignature):
        return Item(target.step, (thing, *target.args), target.kwargs)
    return Item(target, (thing,), {})


def item_of(given: object) -> Item:
    """Make an item of an argument of ``gather()``.

    Raises:
        OptionError: it is no signature.
    """
    if isinstance(given, StepSignature):
        place_of(given.step)
        return Item(given.step, given.args, given.kwargs)
    if isinstance(given, Signature):
        return Item(given, (), {})
    hint = f": write {given.name}.s(...)" if isinstance(given, (Step, Task)) else ""
    raise OptionError(
        "durable.gather() takes signatures of steps, workflows and Celery tasks, not"
        f" {given!r:.200}{hint}"
    )


def name_of(target: Step[..., Any] | StepSignature[Any] | Signature) -> str:
    """Return the name of a step or task."""
    if isinstance(target, StepSignature):
        target = target.step
    return target.name if isinstance(target, Step) else str(target.task)


# --- rows


class Rows:
    """Makes the row of each item of one fan-out.

    Args:
        execution: the parent.
        message: publish options of the parent, whose queue the items get
            that have none of their own.
    """

    def __init__(self, execution: Execution, message: Mapping[str, Any]) -> None:
        self._codec = execution.services.codec
        self._mask = execution.services.mask
        self._message = {key: message[key] for key in _ROUTE if key in message}
        self._message |= {
            "root_id": message.get("root_id") or execution.id,
            "parent_id": execution.id,
            "ignore_result": True,  # for Celery's backend; the row has it
        }

    def make(self, item: Item, run_id: str) -> NewRun:
        """Make the row of an item.

        Raises:
            PayloadError: its arguments cannot be stored.
        """
        if isinstance(item.target, Step):
            return self._of_step(item, item.target, run_id)
        start = _start_of_workflow(item.target)
        if start is not None:
            return start(item.args, run_id)
        given = [_plain(item.target), *item.args]
        return self._row(run_id, SIGNATURE, given, {}, {"argsrepr": f"({item.shown(self._mask)},)"})

    def _of_step(self, item: Item, step: Step[..., Any], run_id: str) -> NewRun:
        args, kwargs = self._mask.arguments(step.function, item.args, item.kwargs)
        message = {
            "argsrepr": self._mask.shown((step.name, *args), _REPR),
            "durable_place": place_of(step),
        }
        if kwargs:
            message["kwargsrepr"] = self._mask.shown(dict(kwargs), _REPR)
        return self._row(run_id, STEP, [step.name, *item.args], item.kwargs, message)

    def _row(
        self,
        run_id: str,
        name: str,
        args: list[Any],
        kwargs: Mapping[str, Any],
        message: Mapping[str, Any],
    ) -> NewRun:
        text = self._codec.encode(
            {"args": args, "kwargs": dict(kwargs)}, f"an item of the fan-out, {name!r}"
        )
        return NewRun(
            id=run_id,
            namespace="",  # the parent's
            name=name,
            input=text,
            message=stored_message.dumped({**self._message, **message}, self._codec),
            queue=self._message.get("queue"),
            rung=False,
        )


def _start_of_workflow(target: Signature) -> Callable[[Sequence[Any], str], NewRun] | None:
    """Return what makes the row of a workflow's run; None: it is a plain task or canvas."""
    app = target.app
    task = app.tasks.get(target.task) if target.subtask_type is None else None
    if not isinstance(task, Workflow):
        return None

    def make(args: Sequence[Any], run_id: str) -> NewRun:
        options = {"task_id": run_id, "add_to_parent": False}
        row: NewRun = app.durable.starter.row_of(lambda: target.apply_async(args, **options))
        return row

    return make


def _plain(part: Any) -> Any:
    """Turn signatures, which are dicts of their own kind, into plain ones."""
    if isinstance(part, dict):
        return {key: _plain(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [_plain(value) for value in part]
    return part
