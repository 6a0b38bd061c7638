"""``fan_out`` and ``gather``: many steps, workflows or tasks at once, over all workers.

Each item is a run, tied to its parent, which is parked meanwhile and has one
row of history for all of them. The verbs are generators like those of
`durable.waiting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast, overload

from celery.canvas import Signature

from durable._fan_out import Calls, run
from durable.context import active
from durable.errors import OptionError
from durable.items import Item, item_for, item_of, name_of, target_of
from durable.steps import Step, StepSignature
from durable.waiting import Verb, drive

if TYPE_CHECKING:
    from durable.execution import Execution
    from durable.task import WorkflowTask

P = ParamSpec("P")
R = TypeVar("R")


@overload
def fan_out(
    fn: Step[P, R] | WorkflowTask[P, R],
    items: Iterable[Any],
    *,
    max_concurrency: int | None = ...,
    return_exceptions: Literal[False] = ...,
) -> list[R]: ...


@overload
def fan_out(
    fn: Any,
    items: Iterable[Any],
    *,
    max_concurrency: int | None = ...,
    return_exceptions: bool = ...,
) -> list[Any]: ...


def fan_out(
    fn: Any,
    items: Iterable[Any],
    *,
    max_concurrency: int | None = None,
    return_exceptions: bool = False,
) -> list[Any]:
    """Call a step, workflow or task for each item, over all workers; the results in order.

    Each item is a run of its own, with the retries of its step, and is canceled
    with this run, which is parked meanwhile. A step is found by its name on
    whichever worker takes the item.

    Args:
        fn: a step at the top of a module, a workflow, a Celery task, or a
            signature of one. The item becomes its first argument, before those of
            the signature.
        items: anything to iterate over; the same number on every replay.
        max_concurrency: how many items may be begun and not ended at a time;
            None: any number.
        return_exceptions: as in ``asyncio.gather``: an item that fails has its
            exception in the list. By default the first failure is raised here,
            with a note that names the item; items that have not ended are
            canceled, and no more are begun.

    Raises:
        Exception: that of the first item that failed.
        celery.exceptions.TaskRevokedError: an item was canceled.
        NotInWorkflow: outside the body of a workflow.
        OptionError: ``fn`` is nothing that another worker could find, or ``items``
            is nothing to iterate over.

    Example:
        >>> @step
        ... def ship(order_id: str) -> str:
        ...     return f"parcel of {order_id}"
        >>> @workflow
        ... def ship_all(order_ids: list[str]) -> list[str]:
        ...     return durable.fan_out(ship, order_ids, max_concurrency=10)
        >>> ship_all.delay(["o-1", "o-2"]).get(timeout=30)
        ['parcel of o-1', 'parcel of o-2']
    """
    execution = active("fan_out")
    verb = fanning_out(
        execution, fn, items, max_concurrency=max_concurrency, return_exceptions=return_exceptions
    )
    return drive(execution, verb, "fan_out")


def gather(
    *signatures: StepSignature[Any] | Signature,
    max_concurrency: int | None = None,
    return_exceptions: bool = False,
) -> list[Any]:
    """Call different steps, workflows and tasks at once, over all workers; the results in order.

    All that holds of `fan_out` holds here.

    Args:
        *signatures: ``step.s(...)``, ``workflow.s(...)``, ``task.s(...)``, or canvas.
        max_concurrency: as in `fan_out`.
        return_exceptions: as in `fan_out`.

    Example:
        >>> @step
        ... def price(sku: str) -> int:
        ...     return 20
        >>> @step
        ... def stock(sku: str, warehouse: str) -> int:
        ...     return 3
        >>> @workflow
        ... def offer(sku: str) -> dict[str, int]:
        ...     cents, pieces = durable.gather(price.s(sku), stock.s(sku, warehouse="Graz"))
        ...     return {"cents": cents, "pieces": pieces}
        >>> offer.delay("tea").get(timeout=30)
        {'cents': 20, 'pieces': 3}
    """
    execution = active("gather")
    verb = gathering(
        execution,
        signatures,
        max_concurrency=max_concurrency,
        return_exceptions=return_exceptions,
    )
    return drive(execution, verb, "gather")


# --- the verbs themselves


def fanning_out(
    execution: Execution,
    fn: object,
    items: Iterable[Any],
    *,
    max_concurrency: int | None = None,
    return_exceptions: bool = False,
) -> Verb[list[Any]]:
    """Call one thing for many items."""
    target = target_of(fn, "durable.fan_out()")
    if not isinstance(items, Iterable):
        raise OptionError(
            f"durable.fan_out() calls {name_of(target)!r} once for each item, and items must be"
            f" iterable, such as a list, not {items!r:.200}"
        )
    things = items if isinstance(items, Sequence) else list(items)
    calls = Calls("fan_out", name_of(target), things, lambda thing: item_for(target, thing))
    return run(execution, calls, max_concurrency, return_exceptions)


def gathering(
    execution: Execution,
    signatures: Sequence[object],
    *,
    max_concurrency: int | None = None,
    return_exceptions: bool = False,
) -> Verb[list[Any]]:
    """Call different things."""
    items = [item_of(each) for each in signatures]
    calls = Calls("gather", "gather", items, lambda item: cast("Item", item))
    return run(execution, calls, max_concurrency, return_exceptions)
