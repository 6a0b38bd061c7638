"""``start_many``: thousands of runs in a few statements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.canvas import Signature, maybe_signature

from durable import context
from durable.call import Call
from durable.errors import NotInWorkflow, OptionError, PartlyStarted, PayloadError, StoreError
from durable.keys import EXACTLY_ONCE
from durable.result import DurableResult
from durable.store import runs
from durable.task import Workflow, WorkflowTask

if TYPE_CHECKING:
    from durable.outbox import Caller
    from durable.store.runs import NewRun

_PER_RUN = (*EXACTLY_ONCE, "task_id", "link", "link_error", "chain", "chord")
_SHOWN = 60

Item = tuple[Any, ...] | list[Any] | Mapping[str, Any]


def start_many(
    task: WorkflowTask[..., Any] | Signature | Any,
    items: Iterable[Item],
    *,
    transaction: object = None,
    chunk: int = 1000,
) -> list[DurableResult]:
    """Start a run of a workflow for each item; the workers' dispatchers send the messages.

    All items are checked before anything is written. Then each chunk is one
    statement: all of its runs are accepted, or none.

    Args:
        task: a workflow, or a signature of one: ``fulfil.s().set(queue="bulk")``. The
            arguments of a signature come after an item's, as in Celery.
        items: for each run a tuple or list of positional arguments, or a dict of
            keyword arguments.
        transaction: a transaction of yours in the same database: the runs exist if
            and only if that is committed (see docs/transactions.md).
        chunk: runs in one statement.

    Returns:
        The handles, in the order of the items.

    Raises:
        OptionError: an item or an option is wrong; nothing was started.
        PayloadError: an argument cannot be stored; nothing was started.
        PartlyStarted: Postgres went away between two chunks; its ``started`` has the handles.

    Example:
        >>> @workflow
        ... def fulfil(order_id: str) -> str:
        ...     return f"{order_id} is done"
        >>> results = durable.start_many(fulfil, [("o-1",), {"order_id": "o-2"}])
        >>> [each.get(timeout=30) for each in results] if fulfil.delay("o-3") else None
        ['o-1 is done', 'o-2 is done']
    """
    if type(chunk) is not int or chunk < 1:
        raise OptionError(f"chunk={chunk!r}: give a number of runs, 1 or more")
    signature = _signature(task)
    workflow = signature.type
    given = list(items)
    if workflow.app.conf.task_always_eager:
        return [signature.apply_async(*_arguments(item, n)) for n, item in enumerate(given)]
    durable = workflow.durable
    if durable.settings.accept_only:
        raise OptionError(
            "start_many() writes runs itself, and durable_accept_only has this process send ordinary"
            " messages: finish the rolling deploy first"
        )
    caller: Caller = durable.outbox.caller(transaction)
    rows = _rows(signature, given)
    results = [workflow.AsyncResult(row.id) for row in rows]
    for start in range(0, len(rows), chunk):
        try:
            caller.call(runs.insert_many, rows[start : start + chunk])
        except StoreError as exc:
            if not start or not caller.commits:
                raise
            raise PartlyStarted(
                f"start_many() was interrupted: the first {start} of {len(rows)} runs of"
                f" {workflow.name!r} are started, the rest is not: {exc}",
                results[:start],
            ) from exc
    return results


def _signature(task: Any) -> Signature:
    """Return a signature of a workflow, checked."""
    signature = maybe_signature(task) if isinstance(task, dict) else task
    if isinstance(task, Workflow):
        signature = task.s()
    if not isinstance(signature, Signature) or not isinstance(
        getattr(signature, "type", None), Workflow
    ):
        raise OptionError(
            f"start_many({_short(task)}): give a workflow (made with @workflow or base=Workflow) or"
            " a signature of one"
        )
    for name in _PER_RUN:
        if signature.options.get(name):
            raise OptionError(
                f"start_many() cannot give {name}= to each of many runs: start them one by one with"
                " apply_async"
            )
    return signature


def _rows(signature: Signature, items: Sequence[Item]) -> list[NewRun]:
    """Check every item, and make the rows."""
    workflow: Any = signature.type
    execution = context.stored()
    if execution is not None and not execution.in_step:
        raise NotInWorkflow(
            "durable.start_many() belongs in a step: what it starts is not waited for. For runs"
            " whose results the workflow needs use durable.fan_out()"
        )
    new = workflow.durable.clock.uuid
    preparer = workflow.durable.starter.preparer
    own = {key: each for key, each in workflow._get_exec_options().items() if each is not None}  # noqa: SLF001
    rows: list[NewRun] = []
    for number, item in enumerate(items):
        args, kwargs, options = signature._merge(*_arguments(item, number))  # noqa: SLF001
        new_id = new() if execution is None else execution.new_task_id()
        call = Call(workflow, args, kwargs, {**own, **options, "task_id": new_id})
        try:
            rows.append(
                preparer.prepare_like(rows[0], call)
                if rows
                else preparer.prepare(call, publish=False)[0]
            )
        except (OptionError, PayloadError, TypeError) as exc:
            raise type(exc)(f"item {number}: {exc}") from exc
    return rows


def _arguments(item: Item, number: int) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(item, (tuple, list)):
        return item, {}
    if isinstance(item, Mapping):
        return (), item
    raise OptionError(
        f"item {number} of start_many() is {_short(item)}: give a tuple of positional arguments,"
        f" ({_short(item)},), or a dict of keyword arguments"
    )


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
