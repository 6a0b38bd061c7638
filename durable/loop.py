"""The event loop of an ``async def`` workflow: one for each attempt of a run.

Each asyncio task that the body starts is a branch, with a line of steps of its
own. A branch that waits holds up no other; when none can go on, the run parks.
That moment is when the loop is about to block for ever: its selector sees it.

Outcomes are given to branches one at a time, each when the loop has nothing
else to do, in the order in which they were recorded. On replay nothing new
begins before the last of them. So what a body sees of the order in which its
branches end (``asyncio.wait``, ``as_completed``, a TaskGroup that is canceled)
is the same each time.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import math
import selectors
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from durable import context
from durable.branch import Branch, Waiting, current_branch
from durable.coroutines import InlineDriver
from durable.errors import Suspend, UnsupportedByDurable
from durable.store import waits
from durable.store.runs import Park

if TYPE_CHECKING:
    from durable.execution import Execution
    from durable.steps import Step
    from durable.store.waits import Wait

#: Between two looks whether something was sent to the run, or stops it, in seconds.
_LOOK_EACH = 1.0
#: How long nothing has to happen in a body that has sockets of its own, in seconds.
_QUIET = 1.0
#: A timer of the body's own is waited for that is due within so many seconds.
_TIMER = 30.0
#: How often the loop goes round without a rest before an outcome is given out all the same.
_RESTLESS = 100
#: How often tasks are canceled that start others as they end.
_ROUNDS = 100


def run(execution: Execution, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run the coroutine of a body in a worker: to its end, or until the run parks.

    Raises:
        Suspend: the execution has stopped.
    """
    patched = _patched_by()
    if patched is not None:
        coroutine.close()
        reason = (
            f"the async workflow {execution.name!r} has come to a worker with the pool {patched},"
            " which has no asyncio event loops: let a worker with prefork, threads or solo take"
            " its queue, and resume the run"
        )
        suspend = execution.park(Park("paused", reason), cause=UnsupportedByDurable(reason))
        assert suspend is not None
        raise suspend
    return LoopDriver(execution).run(coroutine)


def run_step(
    execution: Execution, step: Step[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run an async step that is all there is to its run."""

    async def body() -> Any:
        return await execution.async_step(step, args, kwargs)

    return run(execution, body())


def _patched_by() -> str | None:
    """Return whose green threads have replaced what an event loop stands on."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None and gevent.is_module_patched("select"):
        return "gevent"
    if eventlet is not None and eventlet.is_monkey_patched("select"):
        return "eventlet"
    return None


@dataclass(slots=True, eq=False)
class _Open:
    """A wait that is not over.

    Attributes:
        branch: what waits.
        future: what its task waits at; None: it has stopped.
        due: when it is over anyway, by the monotonic clock.
    """

    waiting: Waiting
    branch: Branch
    future: asyncio.Future[Wait] | None
    due: float = math.inf


class LoopDriver(InlineDriver):
    """Drives the branches of one attempt of a run."""

    def __init__(self, execution: Execution) -> None:
        super().__init__(execution)
        self._clock = execution.services.clock.monotonic
        self._selector = _Selector(self._before_blocking)
        self._loop = _Loop(self, self._selector)
        self._loop.set_exception_handler(self._on_stray)
        self._thread = threading.get_ident()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._closing = False
        self._open: dict[_Open, None] = {}  # in the order in which they were begun
        self._due: list[tuple[float, int, _Open]] = []
        self._numbers = itertools.count()
        self._replaying = not execution.history.empty
        self._beginnings: list[asyncio.Future[None]] = []
        self._deliveries: list[tuple[float, int, asyncio.Future[None]]] = []
        self._rounds = 0
        self._wake: int | None = None
        self._happened_at = self._progress_at = self._clock()
        self._look_at = self._progress_at + _LOOK_EACH

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run the body until it has ended, or none of its branches can go on."""
        execution = self._execution
        execution.driver = self
        try:
            root = self._loop.create_branch(coroutine, execution.root, copy_context(), {})
            root.add_done_callback(self._root_done)
            self._run_until_over()
            execution.settle()
        finally:
            self._tear_down()
            execution.driver = None  # what comes after the body, such as a retry, parks at once
        if execution.suspension is not None:
            raise Suspend(execution.suspension.reason)
        return root.result()

    # --- what an execution asks for

    def check(self) -> None:
        """Raise `Suspend` again if the calling branch has stopped already.

        Raises:
            UnsupportedByDurable: the caller is in another thread than the branches.
        """
        super().check()
        if threading.get_ident() != self._thread and not self._execution.in_step:
            raise UnsupportedByDurable(
                f"run {self._execution.id} of the async workflow {self._execution.name!r} was"
                " asked for a step or a wait in a thread of the body's own, where its place in the"
                " history is not known: run the whole function as a step,"
                " await durable.aio.run_step(name, function)"
            )

    async def wait(self, waiting: Waiting) -> Wait:
        """Let the calling branch wait; the others go on."""
        await self.begin()
        if self._closing:  # a branch that nobody awaits, in its `finally`
            raise Suspend("the body has ended")
        wait = self._execution.ask(waiting.ask)
        if wait.over:
            return wait
        future: asyncio.Future[Wait] = self._loop.create_future()
        opened = self._opened(waiting, future, wait)
        try:
            return await future
        finally:
            self._open.pop(opened, None)
            self._progress_at = self._clock()

    def stop(self, waiting: Waiting, wait: Wait) -> Suspend:
        """Stop the calling branch, which cannot wait; the others go on."""
        self._execution.branch.stopped = True
        self._opened(waiting, None, wait)
        return Suspend(waiting.reason)

    async def begin(self) -> None:
        """Wait until something new may begin: on replay, when all that is recorded was given out."""
        if self._replaying and self._several:
            future: asyncio.Future[None] = self._loop.create_future()
            self._beginnings.append(future)
            await future
            self.check()

    async def deliver(self, rank: int | None) -> None:
        """Wait until it is the turn of an outcome with this rank; None: a new one."""
        if self._several:
            key = rank if rank is not None and self._replaying else math.inf
            future: asyncio.Future[None] = self._loop.create_future()
            heapq.heappush(self._deliveries, (key, next(self._numbers), future))
            await future

    @property
    def _several(self) -> bool:
        """Whether there is an order to keep: the body has more than one branch."""
        return self._execution.root.children > 0 and not self._closing

    def _has_turn(self, *, idle: bool) -> bool:
        """Tell whether it is time for the next turn, if anything waits for one."""
        if not (self._deliveries or self._beginnings):
            return False
        self._rounds = 0 if idle else self._rounds + 1
        return idle or self._rounds % _RESTLESS == 0

    def _next_turn(self) -> bool:
        """Give out the next outcome; else let begin what is new. False: there is none."""
        while self._deliveries:
            _, _, future = heapq.heappop(self._deliveries)
            if not future.done():
                future.set_result(None)
                return True
        beginnings = [future for future in self._beginnings if not future.done()]
        self._beginnings.clear()
        for future in beginnings:
            self._replaying = False
            future.set_result(None)
        return bool(beginnings)

    def _opened(self, waiting: Waiting, future: asyncio.Future[Wait] | None, wait: Wait) -> _Open:
        opened = _Open(waiting, self._execution.branch, future)
        self._open[opened] = None
        self._set_due(opened, wait)
        self._progress_at = self._clock()
        return opened

    def _set_due(self, opened: _Open, wait: Wait) -> None:
        if wait.due_in is not None:
            opened.due = self._clock() + wait.due_in
            if opened.future is not None:
                heapq.heappush(self._due, (opened.due, next(self._numbers), opened))

    # --- before the loop blocks

    def _before_blocking(self, timeout: float | None) -> float | None:
        """Decide how long the selector may block; ``timeout`` is what the loop wants."""
        if self._closing or self._over.done():
            return timeout
        now = self._clock()
        if self._selector.happened:
            self._happened_at, self._selector.happened = now, False
        if self._execution.suspension is not None:
            return timeout if self.working else self._soon(self._end)
        idle = timeout is None or timeout > 0
        if self._has_turn(idle=idle) and self._next_turn():
            return 0.0
        until = self._next_look()
        if until <= now:
            return self._soon(self._look)
        return self._until(now, until, timeout) if idle else timeout

    def _until(self, now: float, until: float, timeout: float | None) -> float | None:
        """Tell how long to block at most, with a look due at ``until``; or park."""
        if self._open and not self.working and not self._loop.jobs:
            quiet = self._quiet_at(now, timeout)
            if quiet <= now:
                return self._soon(self._park)
            until = min(until, quiet)
        pause = until - now
        return timeout if timeout is not None and timeout <= pause else pause

    def _soon(self, callback: Callable[[], None]) -> float:
        self._loop.call_soon(callback)
        return 0.0

    def _quiet_at(self, now: float, timeout: float | None) -> float:
        """Tell from when on nothing is expected to happen by itself.

        Sockets may be those of idle connections, and timers those that keep
        them alive: a body with such things is given a second.
        """
        since = max(self._happened_at, self._progress_at)
        if timeout is None:
            return since + _QUIET if self._selector.foreign else now
        if now + timeout <= self._progress_at + _TIMER:
            return math.inf
        return since + _QUIET

    def _next_look(self) -> float:
        due = self._due
        while due and (due[0][2] not in self._open or due[0][2].due != due[0][0]):
            heapq.heappop(due)
        return min(due[0][0], self._look_at) if due else self._look_at

    def _look(self) -> None:
        """Ask again for what is due, and for the rest if something was sent to the run."""
        if self._execution.suspension is not None:  # since this look was decided upon
            return
        now = self._clock()
        asked = [opened for opened in self._open if opened.due <= now]
        if self._look_at <= now:
            awaited = [each for each in self._open if each.waiting.status == "waiting"]
            # A step that runs is not interrupted, and what comes after it looks for itself.
            # But a body that awaits something of its own comes to no step that would.
            if not self.working and not self._may_go_on():
                return
            if (awaited or not self.working) and self._was_woken():
                asked = list(dict.fromkeys([*asked, *awaited]))
            self._look_at = self._clock() + _LOOK_EACH
        for opened in asked:
            if self._execution.suspension is not None:
                return
            if opened.future is not None and not opened.future.done():
                self._ask(opened, opened.future)

    def _may_go_on(self) -> bool:
        """Tell whether this worker still has the run, and is not to hand it back."""
        try:
            self._execution.journal.before_body(self._execution)
        except Suspend:
            return False
        return True

    def _was_woken(self) -> bool:
        execution = self._execution
        look = execution.journal.call(waits.look, execution.id, execution.attempt)
        if look is None:
            execution.suspend("fenced")
        elif look.control is not None:
            execution.suspend(look.control)
        elif look.wake != self._wake:
            self._wake = look.wake
            return True
        return False

    def _ask(self, opened: _Open, future: asyncio.Future[Wait]) -> None:
        try:
            wait = self._execution.ask(opened.waiting.ask)
        except Suspend:
            return
        except Exception as exc:  # noqa: BLE001 - it is the branch's
            future.set_exception(exc)
            return
        if wait.over:
            future.set_result(wait)
        else:
            opened.due = math.inf
            self._set_due(opened, wait)

    # --- ends

    def _park(self) -> None:
        """No branch can go on: park until the first of them can."""
        if self._execution.halt is not None:
            self._execution.suspend(self._execution.halt)
            return self._end()
        first = min(self._open, key=lambda opened: opened.due)
        now = self._clock()
        due_in = None if first.due == math.inf else max(0.0, first.due - now)
        sleeping = all(opened.waiting.status == "sleeping" for opened in self._open)
        reasons = list(dict.fromkeys(opened.waiting.reason for opened in self._open))
        reason = ", ".join(sorted(reasons)[:3]) + (" ..." if reasons[3:] else "")
        park = Park("sleeping" if sleeping else "waiting", reason, delay=due_in)
        self._execution.suspend(reason, due_in, first.waiting.cause, park)
        return self._end()

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    def _root_done(self, _: object) -> None:
        if self._execution.suspension is None:
            self._end()

    def _run_until_over(self) -> None:
        while True:
            try:
                return self._loop.run_until_complete(self._over)
            except Exception as exc:
                # A signal's, such as a soft time limit, that came between two
                # tasks: it is meant for the steps that are running.
                if not self._bodies:
                    raise
                for body in self._bodies:
                    body.stop(exc)

    def _tear_down(self) -> None:
        """End what is left of the branches, as ``asyncio.run`` does."""
        self._closing = True
        loop = self._loop
        try:
            for _ in range(_ROUNDS):
                tasks = asyncio.all_tasks(loop)
                if not tasks:
                    break
                for task in tasks:
                    task.cancel()
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()

    def _on_stray(self, loop: asyncio.AbstractEventLoop, about: dict[str, Any]) -> None:
        """Report what nobody has awaited; after a stop that is nothing of interest."""
        if self._execution.suspension is None:
            loop.default_exception_handler(about)

    # --- branches

    def fork(self, explicit: Context | None) -> tuple[Branch, Context] | None:
        """Number the branch that begins here. None: the task belongs to a step, or to us."""
        execution = self._execution
        branch = execution.branch
        if self._closing or branch.frame is not None:
            return None
        self._progress_at = self._clock()
        # A context that several tasks are to share would give them one line of steps.
        own = copy_context() if explicit is None else explicit.copy()
        return branch.fork(), own

    def enter(self, branch: Branch) -> None:
        """Make a branch the calling context's."""
        context.running.set(self._execution)
        current_branch.set(branch)

    def stays(self, branch: Branch, error: BaseException | None) -> bool:
        """Tell whether a branch that comes to its end in this way is not to end yet."""
        return not self._closing and (branch.stopped or isinstance(error, Suspend))

    async def stand_still(self, branch: Branch) -> None:
        """Wait for the end of this attempt, out of the others' way."""
        try:
            await self._loop.create_future()
        finally:  # somebody has canceled it: what it waited for is of no interest
            for opened in [each for each in self._open if each.branch is branch]:
                del self._open[opened]


class _Selector(selectors.DefaultSelector):
    """Tells when the loop is about to block."""

    def __init__(self, before_blocking: Callable[[float | None], float | None]) -> None:
        super().__init__()
        self._before_blocking = before_blocking
        self.happened = False

    @property
    def foreign(self) -> bool:
        """Whether there is more than the socket by which threads wake the loop."""
        return len(self.get_map()) > 1

    def select(self, timeout: float | None = None) -> list[Any]:
        """Wait for input; note whether there was some, or a timer of the loop ran out."""
        allowed = self._before_blocking(timeout)
        events: list[Any] = super().select(allowed)
        if events or (timeout is not None and 0 < timeout == allowed):
            self.happened = True
        return events


class _Loop(asyncio.SelectorEventLoop):
    """Makes each task that the body starts a branch, and counts what runs in threads."""

    def __init__(self, driver: LoopDriver, selector: selectors.BaseSelector) -> None:
        super().__init__(selector)
        self._driver = driver
        self.jobs = 0

    def create_task(self, coro: Any, **options: Any) -> Any:
        """Start a task."""
        forked = self._driver.fork(options.get("context"))
        if forked is None:
            return super().create_task(coro, **options)
        options.pop("context", None)
        _refuse_unordered(coro)
        return self.create_branch(coro, *forked, options)

    def create_branch(
        self, coro: Any, branch: Branch, own: Context, options: dict[str, Any]
    ) -> asyncio.Task[Any]:
        """Start a task that is a branch, in a context of its own."""
        own.run(self._driver.enter, branch)
        standing = _BranchCoroutine(coro, branch, self._driver)
        task: asyncio.Task[Any] = own.run(
            functools.partial(super().create_task, standing, **options)
        )
        return task

    def run_in_executor(  # type: ignore[override]  # as in the base class, but for its TypeVarTuple
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        """Run a function in a thread."""
        future = super().run_in_executor(executor, func, *args)
        self.jobs += 1
        future.add_done_callback(self._job_done)
        return future

    def _job_done(self, _: object) -> None:
        self.jobs -= 1


#: What of asyncio makes tasks of a set of coroutines, in the order of their addresses.
_UNORDERED = frozenset({"as_completed", "wait", "__init__"})


def _refuse_unordered(coro: Any) -> None:
    """Refuse tasks that would be numbered in another order on replay.

    Raises:
        UnsupportedByDurable: `asyncio.as_completed` was given coroutines.
    """
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - the caller of create_task
    while frame is not None and frame.f_code.co_filename == asyncio.tasks.__file__:
        if frame.f_code.co_name in _UNORDERED:
            coro.close()
            raise UnsupportedByDurable(
                "asyncio.as_completed() and asyncio.wait() begin coroutines in an order that is"
                " another one on each replay, so that results would be swapped: give them tasks,"
                " [asyncio.create_task(each) for each in ...]"
            )
        frame = frame.f_back


class _BranchCoroutine(Coroutine[Any, Any, Any]):
    """The coroutine of a branch, which does not end when the branch has stopped.

    Whoever awaits it, such as a TaskGroup that would cancel the others, is not
    to see that: the branch will go on, in another attempt of the run.
    """

    def __init__(self, inner: Any, branch: Branch, driver: LoopDriver) -> None:
        self._inner = inner
        self._branch = branch
        self._driver = driver
        self._stands = False
        name = getattr(inner, "__name__", type(inner).__name__)
        self.__name__ = name
        self.__qualname__ = getattr(inner, "__qualname__", name)

    def send(self, value: Any) -> Any:
        """Go on."""
        return self._resume(functools.partial(self._inner.send, value))

    def throw(self, *exc: Any) -> Any:
        """Go on with an exception."""
        return self._resume(functools.partial(self._inner.throw, *exc))

    def close(self) -> None:
        """End."""
        self._inner.close()

    def __await__(self) -> Any:
        return self

    def _resume(self, resume: Callable[[], Any]) -> Any:
        try:
            return resume()
        except StopIteration:
            if self._stands or not self._driver.stays(self._branch, None):
                raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:
            if self._stands or not self._driver.stays(self._branch, exc):
                raise
        self._stands = True
        self._inner = self._driver.stand_still(self._branch)
        return self._inner.send(None)
