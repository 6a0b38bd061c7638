"""Eager mode and direct calls: inline, in memory, without any database."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, Task, chain, chord, group
from celery.result import EagerResult

import durable
from durable import Durable, RecoverableError, Workflow, step
from durable.errors import ConfigurationError, NotInWorkflow, UnsupportedByDurable

attempts: list[int | None] = []


@step(name="unit.eager.add")
def add(x: int, y: int) -> int:
    return x + y


@step(name="unit.eager.flaky", retry_backoff=3600)
def flaky(failures: int) -> int:
    attempt = durable.current().step_attempt
    attempts.append(attempt)
    assert attempt is not None
    if attempt <= failures:
        raise RecoverableError("later")
    return attempt


@step(name="unit.eager.session")
def writes() -> None:
    durable.session()


class ProjectTask(Task):
    calls: list[Any] = []  # noqa: RUF012 - what the tests look at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(args)
        return super().__call__(*args, **kwargs)


def make_app(**options: Any) -> Celery:
    app = Celery("eager", broker="memory://", set_as_current=False, **options)
    app.conf.task_always_eager = True
    Durable(app)

    @app.task(shared=False, base=Workflow, name="total")
    def total(numbers: list[int]) -> int:
        result = 0
        for number in numbers:
            result = add(result, number)
        return result

    @app.task(shared=False, base=Workflow, name="request", bind=True)
    def request(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
        request = self.request
        return [request.id, list(request.args), dict(request.kwargs), request.is_eager]

    @app.task(shared=False, base=Workflow, name="retries", bind=True)
    def retries(self: Any) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=3600)
        return int(self.request.retries)

    @app.task(shared=False, base=Workflow, name="tries")
    def tries(failures: int) -> int:
        return flaky(failures)

    @app.task(shared=False, base=Workflow, name="verbs", bind=True)
    def verbs(self: Any) -> list[Any]:
        self.update_state(state="COOKING", meta={})
        durable.set_progress(1, 2)
        run = durable.current()
        values = [durable.now(), durable.uuid4(), durable.random()]
        return [run.id, run.workflow, run.attempt, durable.is_replaying(), *values]

    @app.task(shared=False, base=Workflow, name="stores")
    def stores() -> None:
        writes()

    return app


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """An app that would fail at once if it looked for a database: it has none."""
    monkeypatch.delenv("DURABLE_DATABASE_URL", raising=False)
    app = make_app()
    yield app
    app.close()


def test_every_call_runs_inline(app: Celery) -> None:
    total = app.tasks["total"]
    assert total([1, 2]) == 3
    assert isinstance(total.delay([1, 2]), EagerResult)
    assert total.delay([1, 2]).get() == 3
    assert total.apply_async(([1, 2],), countdown=3600).get() == 3
    assert total.apply(([1, 2],)).get() == 3
    assert total.s([1, 2]).delay().get() == 3
    assert chain(total.s([1, 2]), app.tasks["request"].s()).delay().get()[1] == [3]
    assert group(total.s([n]) for n in range(3)).delay().get() == [0, 1, 2]


def test_a_body_waits_for_what_it_has_started(app: Celery) -> None:
    total = app.tasks["total"]
    bodies: dict[str, Callable[[], Any]] = {
        "get": lambda: total.delay([1, 2]).get(),
        "group": lambda: group(total.s([n]) for n in range(3)).delay().get(),
        "chain": lambda: chain(total.s([1, 2]), app.tasks["listed"].s()).delay().get(),
        "chord": lambda: chord([total.s([1]), total.s([2])], total.s()).delay().get(),
        "gather": lambda: durable.gather(
            chain(total.s([1, 2]), app.tasks["listed"].s()),
            chord([total.s([1]), total.s([2])], total.s()),
        ),
    }

    @app.task(shared=False, name="listed")
    def listed(number: int) -> list[int]:
        return [number]

    @app.task(shared=False, base=Workflow, name="waits")
    def waits(name: str) -> Any:
        return bodies[name]()

    @app.task(shared=False, base=Workflow, name="awaits")
    async def awaits(name: str) -> Any:
        return bodies[name]()

    expected = {"get": 3, "group": [0, 1, 2], "chain": [3], "chord": 3, "gather": [[3], 3]}
    assert {name: waits.delay(name).get() for name in bodies} == expected
    del bodies["gather"]  # its verb in a coroutine is another one
    del expected["gather"]
    assert {name: awaits.delay(name).get() for name in bodies} == expected


def test_a_plain_task_that_waits_is_refused_as_ever(app: Celery) -> None:
    @app.task(shared=False, name="impatient")
    def impatient() -> Any:
        return app.tasks["total"].delay([1]).get()

    @app.task(shared=False, base=Workflow, name="starts")
    def starts() -> Any:
        return impatient.delay().get()

    with pytest.raises(RuntimeError, match=r"Never call result\.get"):
        starts.delay().get()


def test_what_makes_a_start_happen_once_has_no_meaning_inline(app: Celery) -> None:
    total = app.tasks["total"]
    assert total.apply_async(([1, 2],), transaction=object()).get() == 3
    assert total.apply_async(([1, 2],), idempotency_key="k").get() == 3
    assert [each.get() for each in durable.start_many(total, [([1],), ([2],)])] == [1, 2]


def test_a_direct_call_needs_no_eager_mode(app: Celery) -> None:
    app.conf.task_always_eager = False
    assert app.tasks["total"]([1, 2]) == 3


def test_the_request_is_celerys_own(app: Celery) -> None:
    task = app.tasks["request"]
    run_id = str(uuid.uuid4())
    assert task.apply_async((1,), {"k": 2}, task_id=run_id).get() == [run_id, [1], {"k": 2}, True]
    assert task(1, k=2) == [None, [1], {"k": 2}, False]


def test_the_projects_task_class_is_called() -> None:
    app = make_app(task_cls=ProjectTask)
    ProjectTask.calls.clear()
    assert app.tasks["total"].delay([1]).get() == 1
    assert app.tasks["total"]([2]) == 2
    assert ProjectTask.calls == [([1],), ([2],)]
    app.close()


def test_pauses_are_skipped(app: Celery) -> None:
    attempts.clear()
    assert app.tasks["tries"].delay(2).get() == 3
    assert attempts == [1, 2, 3]
    assert app.tasks["retries"].delay().get() == 2


def test_a_failure_is_the_results(app: Celery) -> None:
    result = app.tasks["tries"].delay(99)
    assert result.state == "FAILURE"
    with pytest.raises(RecoverableError, match="later"):
        result.get()


def test_verbs_answer_from_memory(app: Celery) -> None:
    run_id = str(uuid.uuid4())
    answer = app.tasks["verbs"].apply_async(task_id=run_id).get()
    assert answer[:4] == [run_id, "verbs", 1, False]
    assert answer[5:] == app.tasks["verbs"].apply_async(task_id=run_id).get()[5:]


def test_a_state_that_means_the_end_is_refused(app: Celery) -> None:
    @app.task(shared=False, base=Workflow, name="ends", bind=True)
    def ends(self: Any, state: str) -> None:
        self.update_state(state=state, meta={})

    for state in ("SUCCESS", "FAILURE", "REVOKED"):
        with pytest.raises(UnsupportedByDurable, match="a run ends by what its body returns"):
            ends.delay(state).get()


def test_what_needs_a_database_says_so(app: Celery) -> None:
    with pytest.raises(NotInWorkflow, match="runs inline"):
        app.tasks["stores"].delay().get()
    app.conf.task_always_eager = False
    with pytest.raises(ConfigurationError, match="DURABLE_DATABASE_URL"):
        app.tasks["total"].delay([1])


def test_a_workflow_of_an_app_without_durable_says_so() -> None:
    app = Celery("bare", set_as_current=False)

    @app.task(shared=False, base=Workflow, name="lonely")
    def lonely() -> None:
        """Never run."""

    for call in (lonely, lonely.delay, lonely.s().apply_async):
        with pytest.raises(ConfigurationError, match="has no Durable"):
            call()
    app.close()
