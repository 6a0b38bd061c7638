"""Branches of an ``async def`` body: their numbers, their steps, what stops them and what does not."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import pytest
from celery import signature

import durable
from durable import PermanentError, aio, loop
from durable.clock import SYSTEM
from durable.errors import NotInWorkflow, OptionError, StepTimeout, UnsupportedByDurable
from durable.execution import Execution
from durable.retry import RetryPolicy
from durable.steps import Step
from durable.store.steps import Written
from tests.harness.ledger import Attempt, Ledger

needs_task_group = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="asyncio.TaskGroup came with Python 3.11"
)

ran: Counter[str] = Counter()


class Failed(Exception):
    pass


@pytest.fixture(autouse=True)
def _nothing_stray(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What asyncio complains of, such as a task that was destroyed while it was pending."""
    ran.clear()
    with caplog.at_level(logging.WARNING, logger="asyncio"):
        yield
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.inline = False  # type: ignore[attr-defined]
    ledger.time.clock = SYSTEM
    return ledger


def run(ledger: Ledger, body: Callable[[], Coroutine[Any, Any, Any]]) -> Attempt:
    """Execute an async body once, as a worker does."""
    attempt = Attempt(ledger.execution())

    def enter() -> Any:
        return loop.run(attempt.execution, body())

    return ledger.run_as(attempt, enter)


def make_step(name: str, function: Callable[..., Any], **options: Any) -> Step[..., Any]:
    timeout = options.pop("timeout", None)
    return Step(function, name, RetryPolicy.from_options(**options), timeout)


async def _take(label: str, turns: int = 0) -> str:
    """Take so many turns of the loop."""
    ran[label] += 1
    for _ in range(turns):
        await asyncio.sleep(0)
    return label


def _take_at_once(label: str) -> str:
    ran[label] += 1
    return label


async def until_ran(label: str) -> None:
    while not ran[label]:  # noqa: ASYNC110 - an event would belong to one loop
        await asyncio.sleep(0)


async def _linger(label: str, others: int) -> str:
    """Wait until so many others have come to their end."""
    while sum(ran.values()) < others:  # noqa: ASYNC110 - an event would belong to one loop
        await asyncio.sleep(0)
    ran[label] += 1
    return label


async def _fail(label: str) -> str:
    ran[label] += 1
    raise Failed(label)


take = make_step("take", _take)
linger = make_step("linger", _linger)
take_at_once = make_step("take at once", _take_at_once)
fail = make_step("fail", _fail, dont_autoretry_for=(Exception,))


def places(ledger: Ledger) -> list[tuple[str, int, str]]:
    """Branch, position and result of what is recorded."""
    return sorted((row.branch, row.ordinal, row.output or "") for row in ledger.rows)


# --- numbers


def test_branches_have_the_numbers_in_which_they_were_begun(ledger: Ledger) -> None:
    async def leaf(label: str) -> str:
        return await take(label)

    async def branch(label: str) -> list[str]:
        await take(label)
        return await asyncio.gather(leaf(f"{label}x"), leaf(f"{label}y"))

    async def body() -> Any:
        first = asyncio.create_task(branch("a"))
        second = asyncio.ensure_future(branch("b"))
        return [await take("root"), await second, await first, take_at_once("end")]

    assert run(ledger, body).value == ["root", ["bx", "by"], ["ax", "ay"], "end"]
    assert places(ledger) == [
        ("", 0, '"root"'),
        ("", 1, '"end"'),
        ("0", 0, '"a"'),
        ("0.0", 0, '"ax"'),
        ("0.1", 0, '"ay"'),
        ("1", 0, '"b"'),
        ("1.0", 0, '"bx"'),
        ("1.1", 0, '"by"'),
    ]
    assert run(ledger, body).value == ["root", ["bx", "by"], ["ax", "ay"], "end"]
    assert set(ran.values()) == {1}


def test_results_are_not_swapped_whatever_order_branches_finish_in(ledger: Ledger) -> None:
    async def branch(number: int) -> list[Any]:
        turns = number if ledger.claims == 1 else 9 - number
        seen: list[Any] = []
        for each in range(3):
            await asyncio.sleep(0.002 * turns)
            seen.append(await take(f"{number}.{each}", turns))
            seen.append(str(durable.uuid4()))
        return seen

    async def body() -> Any:
        return await asyncio.gather(*(branch(number) for number in range(5)))

    first = run(ledger, body).value
    recorded = ledger.rows
    for kept in (15, 7):  # as if the worker had been killed after so many commits
        ledger.rows = recorded[:kept]
        ran.clear()
        assert run(ledger, body).value == first
        assert sum(ran.values()) == 15 - kept
    assert [seen[::2] for seen in first] == [
        [f"{number}.{each}" for each in range(3)] for number in range(5)
    ]


def test_a_body_sees_its_branches_end_in_the_same_order_on_replay(ledger: Ledger) -> None:
    async def branch(number: int) -> str:
        return await linger(f"{number}", number - 1 if ledger.claims == 1 else 0)

    async def body() -> Any:
        tasks = [asyncio.create_task(branch(number)) for number in (3, 1, 2)]
        order = [await each for each in asyncio.as_completed(tasks)]
        return await take("".join(order))

    assert run(ledger, body).value == "123"
    recorded = ledger.rows
    for kept in (4, 3, 2):
        ledger.rows = recorded[:kept]
        ran.clear()
        assert run(ledger, body).value == "123"
        assert sum(ran.values()) == 4 - kept


def test_coroutines_that_asyncio_would_begin_in_any_order_are_refused(ledger: Ledger) -> None:
    async def body() -> Any:
        return [await each for each in asyncio.as_completed([take("a")])]

    error = run(ledger, body).error
    assert isinstance(error, UnsupportedByDurable)
    assert "[asyncio.create_task(each) for each in ...]" in str(error)

    async def in_a_step() -> Any:
        return [await each for each in asyncio.as_completed([_take("a")])]

    async def fine() -> Any:
        return await make_step("fine", in_a_step)()

    assert run(ledger, fine).value == ["a"]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_outcomes_that_are_there_at_once_are_seen_one_by_one(ledger: Ledger, kept: int) -> None:
    """Else the body sees both here, and one of them where only that one was recorded."""

    async def body() -> Any:
        tasks = [asyncio.create_task(take(label)) for label in "ab"]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return [task.result() for task in done]

    assert run(ledger, body).value == ["a"]
    ledger.rows = ledger.rows[:kept]
    assert run(ledger, body).value == ["a"]


def test_a_step_that_is_new_waits_for_what_is_recorded(ledger: Ledger) -> None:
    async def body() -> Any:
        first, second = asyncio.create_task(take("a")), asyncio.create_task(take("b"))
        done, _ = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        if second in done:
            first.cancel()
        return sorted(task.result() for task in done)

    run(ledger, body)
    ledger.rows = [row for row in ledger.rows if row.branch == "1"]  # as if b had been quicker
    ran.clear()
    assert run(ledger, body).value == ["b"]
    assert ran == {}


def test_what_a_step_starts_belongs_to_the_step(ledger: Ledger) -> None:
    left: list[asyncio.Task[Any]] = []

    async def inner(label: str) -> Any:
        await asyncio.sleep(0)
        return await take(label), durable.current().step

    async def outer() -> Any:
        left.append(asyncio.create_task(inner("left behind")))
        return await asyncio.gather(inner("a"), inner("b"))

    outer_step = make_step("outer", outer)

    async def body() -> Any:
        both = await outer_step()
        assert await left[0] == ("left behind", "outer")  # also when the step is over
        return both, await asyncio.gather(take("c"))

    assert run(ledger, body).value == ([["a", "outer"], ["b", "outer"]], ["c"])
    assert [(branch, ordinal) for branch, ordinal, _ in places(ledger)] == [("", 0), ("0", 0)]


def test_a_context_that_tasks_share_gives_them_no_common_line(ledger: Ledger) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("create_task(context=) came with Python 3.11")

    async def body() -> Any:
        shared = copy_context()
        tasks = [
            asyncio.get_running_loop().create_task(take(label), context=shared) for label in "ab"
        ]
        return await asyncio.gather(*tasks)

    assert run(ledger, body).value == ["a", "b"]
    assert places(ledger) == [("0", 0, '"a"'), ("1", 0, '"b"')]


def test_another_step_than_the_recorded_one_in_a_branch_pauses_the_run(ledger: Ledger) -> None:
    other = make_step("other", _take)

    async def body() -> Any:
        second = take if ledger.claims == 1 else other
        return await asyncio.gather(take("a"), second("b"))

    run(ledger, body)
    attempt = run(ledger, body)
    assert attempt.stopped == "paused"
    [park] = ledger.parks
    assert "step 'take' at position 0 of branch 1, the code now asks for 'other'" in park.reason


# --- what fails


@needs_task_group
def test_a_branch_that_fails_for_good_cancels_its_task_group(ledger: Ledger) -> None:
    ended: list[str] = []

    async def forever() -> None:
        try:
            await take("other")
            await asyncio.Event().wait()
        finally:
            ended.append("other")

    async def body() -> Any:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(forever())
                group.create_task(fail("broken"))
        except BaseExceptionGroup as errors:  # noqa: F821 - from Python 3.11 on
            ended.extend(str(error) for error in errors.exceptions)
        return await take("after"), ended.copy()

    for _ in range(2):
        ended.clear()
        assert run(ledger, body).value == ("after", ["other", "broken"])
    assert set(ran.values()) == {1}


def test_a_step_that_is_canceled_with_its_branch_is_not_recorded(ledger: Ledger) -> None:
    async def hang() -> None:
        ran["hang"] += 1
        await asyncio.Event().wait()

    hanging = make_step("hang", hang)

    async def body() -> str:
        task = asyncio.create_task(hanging())
        await until_ran("hang")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await take("after")

    assert run(ledger, body).value == "after"
    assert places(ledger) == [("", 0, '"after"')]


def test_what_a_canceled_step_has_done_all_the_same_counts(ledger: Ledger) -> None:
    async def stubborn() -> str:
        ran["stubborn"] += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "done"
        raise AssertionError

    step = make_step("stubborn", stubborn)

    async def body() -> None:
        task = asyncio.create_task(step())
        await until_ran("stubborn")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(ledger, body)
    assert places(ledger) == [("0", 0, '"done"')]


def test_a_step_that_takes_too_long_is_canceled_and_tried_again(ledger: Ledger) -> None:
    async def slow() -> int | None:
        attempt = durable.current().step_attempt
        if attempt == 1:
            await asyncio.sleep(600)
        return attempt

    step = make_step("slow", slow, timeout=0.05, autoretry_for=(), max_retries=3)
    transient = make_step(
        "transient", slow, timeout=0.05, classify=lambda _: durable.classify.RetryClass.TRANSIENT
    )

    async def body() -> Any:
        with pytest.raises(StepTimeout, match=r"'none' took longer than its timeout of 0.05 s"):
            await make_step("none", slow, timeout=0.05, max_retries=0)()
        return await asyncio.gather(transient(), take("other"))

    assert step.timeout == 0.05
    assert run(ledger, body).value == [2, "other"]


def test_stop_iteration_of_a_step_is_an_error_like_another(ledger: Ledger) -> None:
    def exhausted() -> None:
        next(iter(()))

    step = make_step("exhausted", partial(aio._in_thread, exhausted), max_retries=0)

    async def body() -> str:
        with pytest.raises(RuntimeError, match="StopIteration"):
            await step()
        return "alive"

    assert run(ledger, body).value == "alive"


def test_a_branch_that_nobody_awaits_ends_with_the_body(ledger: Ledger) -> None:
    ended: list[str] = []

    async def left() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("left")

    async def body() -> str:
        task = asyncio.create_task(left())
        await asyncio.sleep(0)
        return f"done, {task.get_name() != ''}"

    assert run(ledger, body).value == "done, True"
    assert ended == ["left"]


# --- what stops


@pytest.mark.parametrize("how", [Written.FENCED, Written.CANCEL])
def test_a_stop_begins_nothing_more_and_lets_running_steps_end(
    ledger: Ledger, how: Written
) -> None:
    async def slow() -> str:
        ran["slow"] += 1
        await asyncio.sleep(0.05)
        durable.set_progress(1)  # a verb in a step that is to end
        ran["slow ended"] += 1
        return "slow"

    slow_step = make_step("slow", slow)

    async def quick() -> None:
        await until_ran("slow")
        ledger.answers = [how]
        await take("quick")
        await take("next")

    async def body() -> None:
        try:
            await asyncio.gather(slow_step(), quick())
        finally:
            await take("finally")

    attempt = run(ledger, body)
    assert attempt.stopped == ("fenced" if how is Written.FENCED else "cancel")
    assert ran == {"slow": 1, "quick": 1, "slow ended": 1}
    assert ("0", 0, '"slow"') in places(ledger)


@needs_task_group
def test_a_stop_in_a_task_group_cancels_no_running_step(ledger: Ledger) -> None:
    async def slow() -> str:
        ran["slow"] += 1
        await asyncio.sleep(0.05)
        return "slow"

    slow_step = make_step("slow", slow)

    async def stops() -> None:
        await until_ran("slow")
        ledger.answers = [Written.CANCEL]
        take_at_once("last")
        durable.uuid4()  # raises the stop in this branch

    async def body() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(slow_step())
            group.create_task(stops())

    assert run(ledger, body).stopped == "cancel"
    assert ("0", 0, '"slow"') in places(ledger)


def test_no_body_starts_without_the_journals_leave(ledger: Ledger) -> None:
    def refuse(execution: Execution) -> None:
        raise execution.suspend("lease missed")

    ledger.may_start = refuse

    async def body() -> None:
        await asyncio.gather(take("a"), take("b"))

    assert run(ledger, body).stopped == "lease missed"
    assert ran == {}


# --- what does not go together


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        (lambda: durable.sleep(1), "durable.sleep() in the async workflow"),
        (lambda: durable.wait_for_event("x"), "write `await durable.aio.wait_for_event(...)`"),
        (
            lambda: durable.fan_out(signature("shop.ship"), []),
            "write `await durable.aio.fan_out(...)`",
        ),
        (durable.gather, "write `await durable.aio.gather(...)`"),
    ],
)
def test_a_verb_that_would_hold_up_the_loop_names_the_other_one(
    ledger: Ledger, call: Callable[[], Any], instead: str
) -> None:
    async def body() -> None:
        call()

    error = run(ledger, body).error
    assert isinstance(error, UnsupportedByDurable)
    assert instead in str(error)
    assert ledger.rows == []


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        (lambda: take("x"), "make the workflow an `async def` and await the step"),
        (lambda: aio.sleep(1), "write durable.sleep(...) there"),
        (lambda: aio.run_step("x", len, ""), "write durable.run_step(...) there"),
        (lambda: aio.get(None), "write result.get() there"),  # type: ignore[arg-type]
    ],
)
def test_what_is_async_names_what_to_write_in_a_plain_body(
    ledger: Ledger, call: Callable[[], Any], instead: str
) -> None:
    error = ledger.run(call).error
    assert isinstance(error, UnsupportedByDurable)
    assert instead in str(error)
    assert ledger.rows == []


def test_waiting_in_a_step_is_refused(ledger: Ledger) -> None:
    async def sleepy() -> None:
        await aio.sleep(1)

    async def body() -> None:
        await make_step("sleepy", sleepy, dont_autoretry_for=(Exception,))()

    error = run(ledger, body).error
    assert isinstance(error, NotInWorkflow)
    assert "durable.sleep() belongs in the body of a workflow" in str(error)


def test_a_step_in_a_thread_of_the_bodys_own_is_refused(ledger: Ledger) -> None:
    async def body() -> None:
        await asyncio.to_thread(take_at_once, "x")

    error = run(ledger, body).error
    assert isinstance(error, UnsupportedByDurable)
    assert "await durable.aio.run_step(name, function)" in str(error)
    assert ran == {}


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_green_threads_are_no_place_for_event_loops(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setattr(loop, "_patched_by", lambda: library)
    attempt = run(ledger, lambda: _take("x"))
    assert attempt.stopped == "paused"
    [park] = ledger.parks
    assert f"has come to a worker with the pool {library}" in park.reason
    assert ran == {}


# --- run_step


def test_run_step_takes_both_sorts_of_functions(ledger: Ledger) -> None:
    threads: list[str] = []

    def blocking(label: str) -> str:
        threads.append(threading.current_thread().name)
        assert durable.current().step == "blocking"
        assert durable.idempotency_key()
        durable.set_progress(1)
        return take_at_once(label)

    async def body() -> Any:
        return await asyncio.gather(
            aio.run_step("blocking", blocking, "a"),
            aio.run_step("async", _take, "b", turns=1),
            aio.run_step("lambda", lambda: _take("c")),
        )

    for _ in range(2):
        assert run(ledger, body).value == ["a", "b", "c"]
    assert ran == {"a": 1, "b": 1, "c": 1}
    assert len(threads) == 1
    assert threads != [threading.current_thread().name]
    assert sorted(row.name for row in ledger.rows) == ["async", "blocking", "lambda"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("", len), "1 to 255 printable characters"),
        (("x", 3), "a function as its second argument"),
        (("x", lambda: (yield)), "generator function"),
    ],
)
def test_run_step_refuses_what_is_no_function(
    ledger: Ledger, args: tuple[Any, ...], text: str
) -> None:
    async def body() -> None:
        await aio.run_step(*args)

    error = run(ledger, body).error
    assert isinstance(error, OptionError)
    assert text in str(error)


# --- contexts

request_id: ContextVar[str] = ContextVar("request_id", default="none")


def test_context_variables_are_as_asyncio_has_them(ledger: Ledger) -> None:
    async def look() -> str:
        return request_id.get()

    look_step = make_step("look", look)

    async def branch(value: str) -> list[str]:
        request_id.set(value)
        await asyncio.sleep(0)
        return [await look_step(), request_id.get()]

    async def body() -> Any:
        request_id.set("body")
        both = await asyncio.gather(branch("a"), branch("b"))
        return both, request_id.get(), await look_step()

    assert run(ledger, body).value == ([["a", "a"], ["b", "b"]], "body", "body")
    assert request_id.get() == "none"


def test_the_place_of_a_body_is_known_in_each_of_its_branches(ledger: Ledger) -> None:
    async def branch() -> Any:
        await take("x")
        return durable.current().id, durable.is_replaying()

    async def body() -> Any:
        return await asyncio.gather(branch(), branch())

    assert run(ledger, body).value == [(ledger.id, False)] * 2


def test_a_body_that_only_computes_needs_no_step(ledger: Ledger) -> None:
    async def body() -> int:
        await asyncio.sleep(0)
        return 3

    assert run(ledger, body).value == 3

    async def broken() -> int:
        raise PermanentError("no")

    assert isinstance(run(ledger, broken).error, PermanentError)
