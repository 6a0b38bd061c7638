"""What the body of an ``async def`` workflow awaits: the waiting verbs of `durable`.

A branch that waits holds up no other; the run parks when none can go on. What
does not wait (`durable.current`, `durable.uuid4`, ``.delay()``, ...) is called
in such a body as in any other.

Example:
    >>> import asyncio
    >>> import durable
    >>> @durable.step
    ... async def charge(order_id: str) -> str:
    ...     return f"{order_id} is paid"
    >>> @durable.step
    ... async def ship(order_id: str) -> str:
    ...     return f"{order_id} is on its way"
    >>> @durable.workflow
    ... async def fulfil(order_id: str) -> list[str]:
    ...     done = await asyncio.gather(charge(order_id), ship(order_id))
    ...     await durable.aio.sleep(0.1)
    ...     return done
    >>> fulfil.delay("o-42").get(timeout=30)
    ['o-42 is paid', 'o-42 is on its way']
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from durable import waiting
from durable.context import active
from durable.coroutines import drive
from durable.errors import OptionError, UnsupportedByDurable
from durable.fan_out import fanning_out, gathering
from durable.joining import joining
from durable.retry import RetryPolicy
from durable.steps import Step, check_step_name, is_async, refuse_suspending

if TYPE_CHECKING:
    from celery.canvas import Signature
    from celery.result import AsyncResult, ResultSet

    from durable.execution import Execution
    from durable.schemas import Schema
    from durable.steps import StepSignature
    from durable.task import WorkflowTask

__all__ = [
    "fan_out",
    "gather",
    "get",
    "run_step",
    "sleep",
    "sleep_until",
    "wait_for_event",
]

P = ParamSpec("P")
R = TypeVar("R")


def sleep(duration: timedelta | float | str) -> Coroutine[Any, Any, None]:
    """Pause the calling branch; see `durable.sleep`.

    Raises:
        NotInWorkflow: outside the body of a workflow.
        UnsupportedByDurable: the workflow is no ``async def``.

    Example:
        >>> import asyncio
        >>> @workflow
        ... async def remind(texts: list[str]) -> list[str]:
        ...     async def one(text: str) -> str:
        ...         await durable.aio.sleep(0.1)
        ...         return text
        ...     return await asyncio.gather(*(one(text) for text in texts))
        >>> remind.delay(["tea", "coffee"]).get(timeout=30)
        ['tea', 'coffee']
    """
    execution = _body("sleep", "(...)")
    return drive(execution, waiting.sleeping(execution, duration))


def sleep_until(when: datetime) -> Coroutine[Any, Any, None]:
    """Pause the calling branch until a time; see `durable.sleep_until`.

    Example:
        >>> import asyncio
        >>> from datetime import datetime, timezone
        >>> @workflow
        ... async def new_year(year: int) -> int:
        ...     await durable.aio.sleep_until(datetime(year, 1, 1, tzinfo=timezone.utc))
        ...     return year
        >>> asyncio.run(new_year(2020))  # called directly: a coroutine
        2020
    """
    execution = _body("sleep_until", "(...)")
    return drive(execution, waiting.sleeping_until(execution, when))


def wait_for_event(
    event_type: str,
    *,
    timeout: timedelta | float | str | None = None,
    schema: Schema | None = None,
) -> Coroutine[Any, Any, Any]:
    """Have the calling branch wait for an event; see `durable.wait_for_event`.

    Raises:
        EventTimeout: none came in time.

    Example:
        >>> import asyncio
        >>> @workflow
        ... async def approve(order_id: str) -> list[str]:
        ...     return await asyncio.gather(
        ...         durable.aio.wait_for_event("sales"), durable.aio.wait_for_event("stock")
        ...     )
        >>> result = approve.delay("o-42")
        >>> _ = result.send_event("stock", "enough"), result.send_event("sales", "granted")
        >>> result.get(timeout=30)
        ['granted', 'enough']
    """
    execution = _body("wait_for_event", "(...)")
    return drive(execution, waiting.awaiting_event(execution, event_type, timeout, schema))


def get(
    result: AsyncResult[Any] | ResultSet[Any],
    *,
    timeout: float | None = None,
    propagate: bool = True,
) -> Coroutine[Any, Any, Any]:
    """Wait for a task that the body has started, or for a group of them: ``result.get()``.

    Args:
        result: what ``delay()`` returned, or a canvas.
        timeout: seconds; None: without end.
        propagate: whether to raise the task's exception; else it is returned.

    Raises:
        celery.exceptions.TimeoutError: not in time; the same on every replay.
        celery.exceptions.TaskRevokedError: the task was canceled.

    Example:
        >>> @workflow
        ... def double(number: int) -> int:
        ...     return 2 * number
        >>> @workflow
        ... async def quadruple(number: int) -> int:
        ...     doubled = await durable.aio.get(double.delay(number))
        ...     return await durable.aio.get(double.delay(doubled))
        >>> quadruple.delay(3).get(timeout=30)
        12
    """
    execution = _body("get", "(result)", instead="result.get()")
    options = {"timeout": timeout, "propagate": propagate}
    if execution.journal.inline:
        return _got(result, **options)
    return drive(execution, joining(execution, result, options))


@overload
def fan_out(
    fn: Step[P, Coroutine[Any, Any, R]] | WorkflowTask[P, Coroutine[Any, Any, R]],
    items: Iterable[Any],
    *,
    max_concurrency: int | None = ...,
    return_exceptions: Literal[False] = ...,
) -> Coroutine[Any, Any, list[R]]: ...


@overload
def fan_out(
    fn: Step[P, R] | WorkflowTask[P, R],
    items: Iterable[Any],
    *,
    max_concurrency: int | None = ...,
    return_exceptions: Literal[False] = ...,
) -> Coroutine[Any, Any, list[R]]: ...


@overload
def fan_out(
    fn: Any,
    items: Iterable[Any],
    *,
    max_concurrency: int | None = ...,
    return_exceptions: bool = ...,
) -> Coroutine[Any, Any, list[Any]]: ...


def fan_out(
    fn: Any,
    items: Iterable[Any],
    *,
    max_concurrency: int | None = None,
    return_exceptions: bool = False,
) -> Coroutine[Any, Any, list[Any]]:
    """Call a step, workflow or task for each item, over all workers; see `durable.fan_out`.

    The step or workflow may be an ``async def``, or not.

    Example:
        >>> @step
        ... async def ship(order_id: str) -> str:
        ...     return f"parcel of {order_id}"
        >>> @workflow
        ... async def ship_all(order_ids: list[str]) -> list[str]:
        ...     return await durable.aio.fan_out(ship, order_ids)
        >>> ship_all.delay(["o-1", "o-2"]).get(timeout=30)
        ['parcel of o-1', 'parcel of o-2']
    """
    execution = _body("fan_out", "(...)")
    verb = fanning_out(
        execution, fn, items, max_concurrency=max_concurrency, return_exceptions=return_exceptions
    )
    return drive(execution, verb)


def gather(
    *signatures: StepSignature[Any] | Signature,
    max_concurrency: int | None = None,
    return_exceptions: bool = False,
) -> Coroutine[Any, Any, list[Any]]:
    """Call different steps, workflows and tasks, over all workers; see `durable.gather`.

    To run several branches in this process use ``asyncio.gather``.

    Example:
        >>> @step
        ... async def price(sku: str) -> int:
        ...     return 20
        >>> @step
        ... def stock(sku: str) -> int:
        ...     return 3
        >>> @workflow
        ... async def offer(sku: str) -> list[int]:
        ...     return await durable.aio.gather(price.s(sku), stock.s(sku))
        >>> offer.delay("tea").get(timeout=30)
        [20, 3]
    """
    execution = _body("gather", "(...)")
    verb = gathering(
        execution,
        signatures,
        max_concurrency=max_concurrency,
        return_exceptions=return_exceptions,
    )
    return drive(execution, verb)


@overload
def run_step(
    name: str,
    function: Callable[P, Coroutine[Any, Any, R]],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Coroutine[Any, Any, R]: ...


@overload
def run_step(
    name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, R]: ...


def run_step(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a function as a step under ``name``: an ``async def``, or any other in a thread.

    A function in a thread cannot be interrupted: a branch that is canceled
    meanwhile does not get its result, and it runs to its end.

    Raises:
        NotInWorkflow: outside a workflow's body.
        UnsupportedByDurable: the workflow is no ``async def``.
        OptionError: the name or the function is none.

    Example:
        >>> import asyncio
        >>> @workflow
        ... async def total(numbers: list[int]) -> int:
        ...     return await durable.aio.run_step("add up", sum, numbers)
        >>> asyncio.run(total([1, 2]))
        3
    """
    execution = _body("run_step", "(...)")
    check_step_name(name, "aio.run_step(name, function)")
    if not callable(function):
        raise OptionError(
            f"aio.run_step({name!r}, ...) takes a function as its second argument, not {function!r}"
        )
    refuse_suspending(function, f"aio.run_step({name!r}, ...)")
    call = function if is_async(function) else partial(_in_thread, function)
    if execution.in_step:
        return call(*args, **kwargs)
    return execution.async_step(Step(call, name, RetryPolicy()), args, kwargs)


async def _in_thread(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    def call() -> Any:
        try:
            return function(*args, **kwargs)
        except StopIteration as exc:  # no future can take it: its waiter would wait for ever
            raise RuntimeError(f"{function!r} raised StopIteration") from exc

    value = await asyncio.to_thread(call)
    return await value if inspect.isawaitable(value) else value


async def _got(result: Any, **options: Any) -> Any:
    """Inline: it is there already."""
    return result.get(disable_sync_subtasks=False, **options)


def _body(verb: str, call: str, instead: str = "") -> Execution:
    """Return the run whose ``async def`` body calls.

    Raises:
        NotInWorkflow: there is none.
        UnsupportedByDurable: its body is a plain function.
    """
    execution = active(f"aio.{verb}")
    if execution.driver is None and not execution.in_step:
        plain = instead or f"durable.{verb}{call}"
        raise UnsupportedByDurable(
            f"durable.aio.{verb}() in workflow {execution.name!r}, which has no event loop: write"
            f" {plain} there, or make the workflow an `async def`"
        )
    return execution
