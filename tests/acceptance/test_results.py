"""``AsyncResult`` of runs, with no result backend of Celery's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import celery.exceptions
import pytest
from celery import group
from celery.result import allow_join_result, denied_join_result

from durable.errors import RunNotFound
from durable.result import DurableResult
from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS
from tests.harness import wait_for
from tests.harness.postgres import PostgresServer


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("results")
    with running("tests.apps.options", postgres_server, directory) as shared:
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


@pytest.fixture
def module(shared: Shared) -> ModuleType:
    return shared.module


def test_a_success(module: ModuleType) -> None:
    result = module.total.delay([1, 2])
    assert result.get(timeout=10) == 3
    assert (result.state, result.status, result.result, result.info) == ("SUCCESS", "SUCCESS", 3, 3)
    assert (result.ready(), result.successful(), result.failed()) == (True, True, False)
    assert result.traceback is None
    assert result.maybe_throw() == 3
    assert result.wait() == 3
    assert module.total.AsyncResult(result.id).get() == 3
    assert result.date_done is not None


def test_a_failure(module: ModuleType) -> None:
    result = module.raises.delay("value")
    with pytest.raises(ValueError, match="bad value"):
        result.get(timeout=10)
    error = result.get(propagate=False)
    assert isinstance(error, ValueError)
    assert (result.state, str(result.result), result.info) == ("FAILURE", "bad value", error)
    assert (result.ready(), result.successful(), result.failed()) == (True, False, True)
    assert "raise ValueError" in result.traceback
    again = DurableResult(result.id, app=module.app)
    assert "raise ValueError" in again.traceback


def test_the_states_of_a_run(shared: Shared, tmp_path: Path) -> None:
    module, go = shared.module, tmp_path / "go"
    running_run = module.gated.delay(str(go))
    shared.wait_for_note(running_run.id, "gate")
    assert running_run.state == "STARTED"
    assert not running_run.ready()
    assert running_run.result is None
    go.touch()
    assert running_run.get(timeout=10) == "through"

    parked = module.parked.delay()
    shared.wait_for_status(parked.id, "sleeping")
    assert parked.state == "RETRY"
    assert parked.cancel("not wanted")
    assert parked.state == "REVOKED"
    assert isinstance(parked.result, celery.exceptions.TaskRevokedError)
    with pytest.raises(celery.exceptions.TaskRevokedError, match="not wanted"):
        parked.get()
    assert not parked.cancel()

    assert module.total.apply_async(([1],), countdown=3600).state == "PENDING"


def test_get_times_out(module: ModuleType) -> None:
    result = module.parked.delay()
    with pytest.raises(celery.exceptions.TimeoutError, match=result.id):
        result.get(timeout=0.2)
    result.revoke()


def test_get_tells_its_callbacks(module: ModuleType) -> None:
    result = module.total.delay([1, 2])
    got, looks = [], []
    result.get(
        timeout=10,
        callback=lambda *answer: got.append(answer),
        on_interval=lambda: looks.append(1),
    )
    assert got == [(result.id, 3)]
    then = []
    other = module.total.delay([2])
    other.then(then.append)
    assert other.get(timeout=10) == 2
    assert then == [other]


def test_a_group_without_a_result_backend(module: ModuleType) -> None:
    result = group(module.total.s([n]) for n in range(4)).delay()
    assert result.get(timeout=10) == [0, 1, 2, 3]
    assert result.successful()
    assert result.completed_count() == 4


def test_waiting_inside_a_task_is_refused_as_celery_does(module: ModuleType) -> None:
    result = module.total.delay([1])
    with denied_join_result():
        with pytest.raises(RuntimeError, match=r"Never call result\.get\(\)"):
            result.get(timeout=10)
        with allow_join_result():
            assert result.get(timeout=10) == 1


def test_an_unknown_id_is_pending(shared: Shared) -> None:
    for task_id in (str(uuid4()), "an id of my own"):
        unknown = shared.app.AsyncResult(task_id)
        assert (unknown.state, unknown.ready(), unknown.result) == ("PENDING", False, None)
        with pytest.raises(celery.exceptions.TimeoutError):
            unknown.get(timeout=0.1)
        assert not unknown.cancel()
        assert unknown.steps() == []
        with pytest.raises(RunNotFound, match=task_id):
            unknown.run()
        unknown.forget()


def test_forget_needs_no_backend_and_keeps_the_run(module: ModuleType) -> None:
    result = module.total.delay([1, 2])
    assert result.get(timeout=10) == 3
    result.forget()
    assert result.state == "SUCCESS"


def test_a_state_of_its_own_is_gone_when_the_run_parks_or_ends(
    shared: Shared, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = shared.module.reports.delay(str(go))
    shared.wait_for_note(run.id, "reported")
    wait_for(lambda: run.state == "COOKING", what="the state of its own")
    go.touch()
    assert run.get(timeout=10) == "served"
    assert (run.state, run.info) == ("SUCCESS", "served")
