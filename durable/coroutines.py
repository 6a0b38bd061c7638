"""Steps and waits of ``async def`` bodies, and such bodies without a worker."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

from celery import _state

from durable import context
from durable.attempts import Ended, Outcome, attempts
from durable.branch import Branch, Frame, Waiting, current_branch
from durable.errors import Suspend, UnsupportedByDurable
from durable.timeouts import too_slow

if TYPE_CHECKING:
    from durable.execution import Driver, Execution
    from durable.steps import Step
    from durable.store.waits import Wait
    from durable.waiting import Verb

T = TypeVar("T")

_Call = Callable[[], Coroutine[Any, Any, Any]]


class InlineDriver:
    """Drives a body on whatever event loop it is awaited: nothing of it is stored.

    The base of `durable.loop.LoopDriver`, which does so in a worker.
    """

    def __init__(self, execution: Execution) -> None:
        self.working = 0  # steps that are running, or pause for an instant
        self._execution = execution
        self._bodies: set[Body] = set()

    # --- what an execution asks for

    def check(self) -> None:
        """Raise `Suspend` again if the calling branch has stopped already.

        Not in a step: one may still be running, to its end, beside the branch that stopped.
        """
        execution = self._execution
        branch = execution.branch
        if branch.frame is not None:
            return
        if execution.suspension is not None:
            raise Suspend(execution.suspension.reason)
        if branch.stopped:
            raise Suspend("stopped")

    async def wait(self, waiting: Waiting) -> Wait:
        """Refuse, by the journal: inline there is nothing that could end a wait."""
        return self._execution.wait(waiting)

    def stop(self, waiting: Waiting, wait: Wait) -> Suspend:
        """Never asked: there are no waits."""
        raise NotImplementedError

    async def step(
        self, step: Step[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Return the recorded outcome of an async step, or produce it."""
        core = attempts(self._execution, step, "run")
        call = functools.partial(step.function, *args, **kwargs)
        answer: Any = None
        self.working += 1
        try:
            while True:
                todo = core.send(answer)
                if isinstance(todo, Frame):
                    await self.begin()
                    if todo.once:
                        self._execution.intend(todo)
                    answer, canceled = await self._run(Body(todo, step.timeout, call))
                    if canceled is not None:
                        if answer is not None:  # it has ended all the same: that counts
                            with suppress(StopIteration):
                                core.send(answer)
                        raise canceled
                elif isinstance(todo, Waiting):
                    answer = await self._rest(todo)
                else:
                    await asyncio.sleep(todo)
                    answer = None
        except StopIteration as end:
            outcome: Outcome = end.value
        finally:
            self.working -= 1
        await self.deliver(outcome.rank)
        return outcome.told()

    async def begin(self) -> None:
        """Wait until something new may begin; see `durable.loop`."""

    async def deliver(self, rank: int | None) -> None:
        """Wait until it is the turn of an outcome; see `durable.loop`."""

    async def _run(self, body: Body) -> tuple[Ended | None, asyncio.CancelledError | None]:
        execution = self._execution
        clock = execution.services.clock.monotonic
        started = clock()
        self._bodies.add(body)
        try:
            canceled = await body.end(execution)
        finally:
            self._bodies.discard(body)
        ended = body.outcome(clock() - started)
        if ended is None:
            return None, canceled or asyncio.CancelledError()
        if canceled is not None and ended.error is not None and execution.suspension is None:
            return None, canceled  # of an error that the cancellation brought about
        return ended, canceled

    async def _rest(self, waiting: Waiting) -> Wait:
        self.working -= 1
        try:
            return await self.wait(waiting)
        finally:
            self.working += 1


class Body:
    """The body of an async step, as a task of its own: what it starts belongs to it, for good."""

    def __init__(self, frame: Frame, timeout: float | None, call: _Call) -> None:
        self._frame = frame
        self._timeout = timeout
        self._task = _in_step(frame, call)
        self._error: Exception | None = None

    def stop(self, error: Exception) -> None:
        """Cancel it: this is what it fails with, unless it ends in another way."""
        self._error = error
        self._task.cancel()

    async def end(self, execution: Execution) -> asyncio.CancelledError | None:
        """Wait for its end. Returns what the branch was canceled with meanwhile."""
        timer, timeout = None, self._timeout
        if timeout is not None:
            late = too_slow(timeout, self._frame.name)
            timer = asyncio.get_running_loop().call_later(timeout, self.stop, late)
        canceled = None
        while not self._task.done():
            try:
                await asyncio.wait({self._task})
            except asyncio.CancelledError as exc:
                canceled = exc
                if execution.suspension is None:  # else it is to end, and to be recorded
                    self._task.cancel()
        if timer is not None:
            timer.cancel()
        return canceled

    def outcome(self, seconds: float) -> Ended | None:
        """Tell how it ended. None: it was canceled with its branch.

        Raises:
            BaseException: what stops more than the step.
        """
        task = self._task
        if task.cancelled():
            self._frame.roll_back()
            return None if self._error is None else Ended(None, self._error, seconds)
        error = task.exception()
        if error is None:
            return Ended(task.result(), None, seconds)
        if isinstance(error, Exception):
            return Ended(None, error, seconds)
        self._frame.roll_back()
        raise error


def _in_step(frame: Frame, call: _Call) -> asyncio.Task[Any]:
    """Begin the body of a step. Whatever it starts finds itself in that step, also afterwards."""
    own = copy_context()
    own.run(current_branch.set, Branch(frame.branch, frame=frame))
    return own.run(asyncio.get_running_loop().create_task, _awaited(call))


async def _awaited(call: _Call) -> Any:
    return await call()


async def drive(execution: Execution, verb: Verb[T]) -> T:
    """Run a verb for a coroutine: each wait that is not over lets the other branches go on."""
    driver, history = execution.driver, execution.history
    history.noted = None
    try:
        waiting = next(verb)
    except StopIteration as end:
        outcome = Outcome(end.value, rank=history.noted)
    except Exception as exc:  # noqa: BLE001 - in its turn
        outcome = Outcome(error=exc, rank=history.noted)
    else:
        assert driver is not None
        outcome = await _waited(driver, verb, waiting)
    if driver is not None:
        await driver.deliver(outcome.rank)
    value: T = outcome.told()
    return value


async def _waited(driver: Driver, verb: Verb[Any], waiting: Waiting) -> Outcome:
    try:
        while True:
            waiting = verb.send(await driver.wait(waiting))
    except StopIteration as end:
        return Outcome(end.value)
    except Exception as exc:  # noqa: BLE001 - in its turn
        return Outcome(error=exc)


# --- the body of a workflow


def entering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an ``async def`` body, so that a worker's call of it returns its result.

    Innermost, so that whatever wraps a task's ``run`` (Celery's autoretry, the
    project's own ``__call__``) sees a function that runs when it is called.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        coroutine = function(*args, **kwargs)
        execution = context.running.get()
        if execution is None or not inspect.iscoroutine(coroutine):
            return coroutine
        enter, execution.enter = execution.enter, None
        if enter is not None:
            return enter(execution, coroutine)
        if execution.in_step or execution.driver is not None:
            return coroutine
        coroutine.close()
        raise UnsupportedByDurable(
            f"an async workflow was called in the body of {execution.name!r}, which has no event"
            " loop: start it with .delay(), or make the caller an `async def` and await the call"
        )

    return run


def enter_directly(
    execution: Execution, coroutine: Coroutine[Any, Any, Any]
) -> Coroutine[Any, Any, Any]:
    """A direct call: return a coroutine, as the plain function does."""
    execution.driver = InlineDriver(execution)

    async def inline() -> Any:
        with execution.active():
            try:
                return await coroutine
            except Exception as exc:
                from durable.compensation import undo_inline

                undo_inline(execution, exc)
                raise

    return inline()


def enter_eagerly(execution: Execution, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Eager mode: return the result, also to a caller that runs on an event loop."""
    execution.driver = InlineDriver(execution)
    return _run_here(coroutine)


def run_inline_step(
    execution: Execution, step: Step[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run an async step in a run that is executed inline, from any sort of body."""
    return _run_here(InlineDriver(execution).step(step, args, kwargs))


def _run_here(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine: in a thread if this one has a running loop, which waits meanwhile."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    outcome: list[Callable[[], Any]] = []
    here = copy_context()

    task = _state.get_current_task()
    request = task and task.request_stack.top

    def run() -> None:
        if task is not None:  # Celery keeps them for each thread
            _state._task_stack.push(task)  # noqa: SLF001
            task.request_stack.push(request)
        try:
            value = here.run(asyncio.run, coroutine)
        except BaseException as exc:  # noqa: BLE001 - it is the caller's
            error = exc
            outcome.append(lambda: _raise(error))
        else:
            outcome.append(lambda: value)

    thread = threading.Thread(target=run, name="durable-eager")
    thread.start()
    thread.join()
    return outcome[0]()


def _raise(error: BaseException) -> None:
    raise error
