"""``async def`` workflows without a worker: direct calls and eager mode, in memory."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, Task

import durable
from durable import Durable, RecoverableError, Workflow, aio, step
from durable.errors import NotInWorkflow, OptionError, UnsupportedByDurable

attempts: list[int | None] = []


@step(name="unit.aio.add")
async def add(x: int, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


@step(name="unit.aio.flaky", retry_backoff=3600)
async def flaky(failures: int) -> int | None:
    attempt = durable.current().step_attempt
    attempts.append(attempt)
    if attempt is not None and attempt <= failures:
        raise RecoverableError("later")
    return attempt


class Around(Task):
    """As a project's own class: something holds while the body runs."""

    inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        Around.inside = True
        try:
            return self.run(*args, **kwargs)
        finally:
            Around.inside = False


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    monkeypatch.delenv("DURABLE_DATABASE_URL", raising=False)
    app = Celery("eager", broker="memory://", set_as_current=False)
    app.conf.task_always_eager = True
    Durable(app)

    @app.task(shared=False, base=Workflow, name="total")
    async def total(numbers: list[int]) -> int:
        await aio.sleep("48h")
        sums = await asyncio.gather(*(add(number, 0) for number in numbers))
        return sum(sums)

    @app.task(shared=False, base=Workflow, name="tries")
    async def tries(failures: int) -> int | None:
        return await flaky(failures)

    @app.task(shared=False, base=Workflow, name="asks", bind=True)
    async def asks(self: Any) -> list[Any]:
        await asyncio.sleep(0)
        return [self.request.id, durable.current().id, self.request.is_eager]

    @app.task(shared=False, base=Workflow, name="calls")
    async def calls(numbers: list[int]) -> list[Any]:
        one = await aio.get(total.delay(numbers))
        many = await aio.fan_out(total, [numbers, numbers])
        both = await aio.gather(total.s(numbers), total.s(numbers))
        return [one, many, both, await total(numbers)]

    @app.task(shared=False, base=Workflow, name="recurses")
    async def recurses(depth: int) -> int:
        return 1 + await app.tasks["recurses"](depth - 1) if depth else 0

    @app.task(shared=False, base=Workflow, name="waits")
    async def waits() -> None:
        await aio.wait_for_event("never")

    @app.task(shared=False, base=Workflow, name="plain")
    def plain() -> int:
        return int(total([1]))

    yield app
    app.close()


def test_eager_mode_returns_the_result(app: Celery) -> None:
    total = app.tasks["total"]
    assert total.delay([1, 2]).get() == 3
    assert total.apply(([1, 2],)).get() == 3
    assert app.tasks["calls"].delay([2]).get() == [2, [2, 2], [2, 2], 2]


def test_a_direct_call_in_an_eager_body_is_a_plain_one(app: Celery) -> None:
    assert app.tasks["recurses"].delay(3).get() == 3
    assert asyncio.run(app.tasks["recurses"](3)) == 3


def test_eager_mode_works_beside_a_running_loop(app: Celery) -> None:
    async def handler() -> Any:
        task_id, run_id, eager = app.tasks["asks"].delay().get(disable_sync_subtasks=False)
        assert task_id == run_id
        return eager, app.tasks["total"].delay([1, 2]).get(disable_sync_subtasks=False)

    assert asyncio.run(handler()) == (True, 3)


def test_a_direct_call_returns_a_coroutine_as_the_function_does(app: Celery) -> None:
    total = app.tasks["total"]

    async def handler() -> list[int]:
        return await asyncio.gather(total([1, 2]), total([3]))

    assert asyncio.run(handler()) == [3, 3]
    coroutine = total([1, 2])
    assert inspect.iscoroutine(coroutine)
    assert asyncio.run(coroutine) == 3


def test_an_async_step_outside_a_run_is_the_plain_function() -> None:
    assert asyncio.run(add(1, 2)) == 3
    assert add.is_async


def test_pauses_are_skipped(app: Celery) -> None:
    attempts.clear()
    assert app.tasks["tries"].delay(2).get() == 3
    assert attempts == [1, 2, 3]


def test_a_failure_is_the_results(app: Celery) -> None:
    with pytest.raises(RecoverableError, match="later"):
        app.tasks["tries"].delay(99).get()
    with pytest.raises(NotInWorkflow, match="executed inline"):
        app.tasks["waits"].delay().get()


def test_a_plain_body_cannot_call_an_async_workflow(app: Celery) -> None:
    with pytest.raises(UnsupportedByDurable, match=r"start it with \.delay\(\), or make the"):
        app.tasks["plain"].delay().get()


def test_the_projects_own_call_is_around_the_whole_body() -> None:
    app = Celery("around", broker="memory://", set_as_current=False, task_cls=Around)
    Durable(app)

    @app.task(shared=False, base=Workflow, name="inside")
    async def inside() -> bool:
        await asyncio.sleep(0)
        return Around.inside

    assert inside.apply().get() is True
    app.close()


def test_a_generator_is_no_body_even_an_async_one() -> None:
    app = Celery("refused", set_as_current=False)

    async def stream() -> Any:
        yield 1

    with pytest.raises(OptionError, match="generator function"):
        _ = app.task(shared=False, base=Workflow, name="stream")(stream).name
    app.close()


def test_verbs_outside_a_run_say_so() -> None:
    for call in (lambda: aio.sleep(1), lambda: aio.run_step("x", len, "")):
        with pytest.raises(NotInWorkflow, match=r"durable\.aio\.\w+\(\) needs a run"):
            call()
