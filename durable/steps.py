"""``@step`` and ``run_step``: functions whose results a workflow remembers."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from celery.utils.log import get_logger

from durable._retry_options import check_flag
from durable.context import active, running
from durable.durations import parse_seconds
from durable.errors import OptionError
from durable.names import LONGEST_NAME, is_name
from durable.retry import RetryPolicy

logger = get_logger(__name__)

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")

#: Steps by name: to find the one that an item of a fan-out is for, and to
#: refuse a second function under the same name.
_registered: dict[str, Step[..., Any]] = {}


@dataclass(frozen=True, slots=True)
class StepSignature(Generic[R]):
    """A step and what to call it with; see `Step.s`."""

    step: Step[..., R]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Step(Generic[P, R]):
    """A function that runs once per call in a workflow, and is remembered.

    Called in a workflow's body it returns the recorded result if there is
    one, else runs and records. Called anywhere else, in another step for
    one, it is the plain function. That of an ``async def`` is awaited, in an
    ``async def`` workflow.

    Attributes:
        name: what the history calls it.
        policy: when and how often a failed attempt is repeated.
        function: the plain function.
        timeout: seconds that an attempt may take; None: any number.
        is_async: whether the function is an ``async def``.
        at_most_once: whether it runs once and never again, whatever comes of it.
    """

    def __init__(
        self,
        function: Callable[P, R],
        name: str,
        policy: RetryPolicy,
        timeout: float | None = None,
        at_most_once: bool = False,
    ) -> None:
        self.function = function
        self.name = name
        self.policy = policy
        self.timeout = timeout
        self.is_async = is_async(function)
        self.at_most_once = at_most_once
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the recorded result, or run and record; a plain call outside a workflow."""
        execution = running.get()
        if execution is None or execution.in_step:
            return self.function(*args, **kwargs)
        call: Any = execution.async_step if self.is_async else execution.step
        result: R = call(self, args, kwargs)
        return result

    def s(self, *args: P.args, **kwargs: P.kwargs) -> StepSignature[R]:
        """Return the step with its arguments, for `durable.gather`, without calling it.

        Example:
            >>> @step
            ... def add(a: int, b: int) -> int:
            ...     return a + b
            >>> add.s(1, b=2).kwargs
            {'b': 2}
        """
        return StepSignature(self, args, kwargs)

    @overload
    def __get__(self, instance: None, owner: type) -> Step[P, R]: ...

    @overload
    def __get__(
        self: Step[Concatenate[Any, Q], R], instance: object, owner: type
    ) -> Callable[Q, R]: ...

    def __get__(self, instance: object, owner: type) -> Any:
        """Bind a step that is a method, as a function is bound."""
        return self if instance is None else MethodType(self, instance)

    def __repr__(self) -> str:
        return f"<step {self.name}>"


@overload
def step(function: Callable[P, R], /) -> Step[P, R]: ...


@overload
def step(*, name: str | None = None, **options: Any) -> Callable[[Callable[P, R]], Step[P, R]]: ...


def step(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any
) -> Any:
    """Make a function a step of the workflows that call it.

    Its arguments are free; its result has to be something the codec stores
    (JSON with dates, UUIDs, decimals, enums, dataclasses, pydantic models).
    A step whose result is committed never runs again in that run; one that
    was in flight when its worker died does, so outside effects want an
    `idempotency_key` and database writes want `session`.

    Args:
        function: what to remember.
        name: name in the history; by default module and function name. Give
            one before you rename or move a function that runs may be in.
        max_retries: how often a failed attempt is repeated after a pause,
            3 by default; None: without end.
        retry_backoff: seconds before the first repetition, doubled for each
            further one; 1 by default.
        retry_backoff_max: longest pause in seconds, 600 by default.
        retry_jitter: whether pauses are spread at random, True by default.
        autoretry_for: exceptions to repeat whatever the classification says.
        dont_autoretry_for: exceptions never to repeat.
        classify: function that is given the exception and returns a
            `durable.classify.RetryClass`, or None to leave the decision to the
            built-in table.
        transient_tries: quick tries in a row of a transient error, 3 by default.
        retry_unknown_outcome: whether to repeat what may have been executed
            already, such as a call that timed out; True by default.
        timeout: duration that an attempt may take, such as ``"30s"``; no limit
            by default. Then it fails with `StepTimeout` and is tried again like
            any time-out. The pools prefork, solo and gevent interrupt the body;
            in a thread it runs to its end and fails then. An ``async def`` is
            canceled.
        at_most_once: whether the body may run once and never again, for what
            must not happen twice and takes no `idempotency_key`. False by
            default. A raised error is final. After a crash in the step nobody
            knows whether it has taken effect: the run is paused, and its
            ``reason`` says how a person decides. Costs one more commit; retry
            options make no sense with it.
        **options: these, from ``max_retries`` on.

    Raises:
        OptionError: an option is unknown or has a wrong value, or another
            function has this name.

    Example:
        >>> @step(max_retries=5)
        ... def add(a: int, b: int) -> int:
        ...     return a + b
        >>> add(1, 2)  # outside a workflow: the plain function
        3
    """
    if function is None:
        return lambda decorated: _make(decorated, name, options)
    return _make(function, name, options)


def run_step(name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function as a step under ``name``, with the default options.

    For functions that are not yours to decorate.

    Raises:
        NotInWorkflow: outside a workflow's body.
        OptionError: the name or the function is none.

    Example:
        >>> @durable.workflow
        ... def total(numbers: list[int]) -> int:
        ...     return durable.run_step("add up", sum, numbers)
        >>> total([1, 2])
        3
    """
    execution = active("run_step")
    check_step_name(name, "run_step(name, function)")
    if not callable(function):
        raise OptionError(
            f"run_step({name!r}, ...) takes a function as its second argument, not {function!r}"
        )
    where = f"run_step({name!r}, ...)"
    if is_async(function):
        raise OptionError(
            f"{where} does not take the async function {_name_of(function)!r}: await"
            " durable.aio.run_step(...) in an `async def` workflow"
        )
    refuse_suspending(function, where)
    if execution.in_step:
        return function(*args, **kwargs)
    result: R = execution.step(Step(function, name, RetryPolicy()), args, kwargs)
    return result


def _make(function: Callable[..., Any], name: str | None, options: dict[str, Any]) -> Any:
    if not callable(function):
        raise OptionError(
            f"@step goes on a function, not on {function!r}; options are given by keyword"
        )
    refuse_suspending(function, "@step")
    if name is None and not hasattr(function, "__qualname__"):
        raise OptionError(f"{function!r} has no name of its own: give it one with @step(name=...)")
    if name is not None:
        check_step_name(name, "@step(name=...)")
    name = name or f"{function.__module__}.{function.__qualname__}"
    timeout = options.pop("timeout", None)
    if timeout is not None:
        timeout = parse_seconds(timeout, name="timeout")
        if not timeout:
            raise OptionError("timeout=0 leaves a step no time; None means no limit")
    once = options.pop("at_most_once", False)
    check_flag("at_most_once", once)
    if once and options:
        raise OptionError(
            f"at_most_once=True means that there is no second attempt: leave out {', '.join(options)}"
        )
    made = Step(function, name, RetryPolicy.from_options(**options), timeout, once)
    _register(made)
    return made


def find_step(name: str, place: str) -> Step[..., Any] | None:
    """Find a step of this process by its name; None: it is not known here.

    Args:
        name: of the step.
        place: ``"shop.orders:charge"``, imported if the name is not known yet:
            a module may be one that only a body imports.
    """
    if name not in _registered:
        try:
            importlib.import_module(place.partition(":")[0])
        except Exception:  # it is the user's module
            logger.exception("step %s cannot be imported from %s", name, place)
    return _registered.get(name)


def place_of(step: Step[..., Any]) -> str:
    """Return where another process finds the step, ``"shop.orders:charge"``.

    Raises:
        OptionError: no other process can.
    """
    function: Any = inspect.unwrap(step.function)
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", repr(function))
    problem = ""
    if "<locals>" in name:
        problem = f"{module}.{name} is defined inside a function: move it to the top of its module"
    elif module == "__main__":
        problem = f"{name} is defined in the script that was started: move it into a module"
    elif step.name not in _registered or _source_of(_registered[step.name]) != _source_of(step):
        problem = f"{module}.{name} was not made by @step"
    if problem:
        raise OptionError(
            f"step {step.name!r} cannot be an item of a fan-out, since another worker could not"
            f" find it: {problem}"
        )
    return f"{module}:{name}"


def refuse_suspending(function: Callable[..., Any], where: str) -> None:
    """Refuse a function whose call only makes a generator: its body would not run.

    Raises:
        OptionError: naming the function and what to write instead.
    """
    plain = inspect.unwrap(function)
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise OptionError(
            f"{where} does not take the generator function {_name_of(function)!r}: make it return"
            " a list"
        )


def is_async(function: Callable[..., Any]) -> bool:
    """Tell whether a call of the function only makes a coroutine."""
    plain = inspect.unwrap(function)
    return inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(
        getattr(plain, "__call__", None)  # noqa: B004 - of an object that is called as a function
    )


def _name_of(function: Callable[..., Any]) -> Any:
    plain = inspect.unwrap(function)
    return getattr(plain, "__qualname__", plain)


def check_step_name(name: object, where: str) -> None:
    """Refuse what Postgres could not store, or index, after the step's body has run."""
    if not is_name(name):
        raise OptionError(
            f"{where} takes a name of 1 to {LONGEST_NAME} printable characters, not {name!r:.80}"
        )


def _register(step: Step[..., Any]) -> None:
    known = _registered.get(step.name, step)
    first, second = _source_of(known), _source_of(step)
    if first != second:
        raise OptionError(
            f"two functions are steps under the name {step.name!r}: one at {first[0]}:{first[1]},"
            f" one at {second[0]}:{second[1]}. Give one of them another name with @step(name=...)"
        )
    _registered[step.name] = step


def _source_of(step: Step[..., Any]) -> tuple[str, int]:
    code = getattr(inspect.unwrap(step.function), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else (repr(step.function), 0)
