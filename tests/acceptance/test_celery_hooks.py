"""Celery's hooks, signals and errbacks on durable tasks: called when, and told what."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from durable.errors import RunLost
from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS
from tests.harness import wait_for
from tests.harness.postgres import PostgresServer

TOLD = "SELECT available_at = 'infinity' FROM durable.workflow_runs WHERE id = %s"


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("hooks")
    with running(
        "tests.apps.options", postgres_server, directory, durable_max_recoveries=2
    ) as shared:
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


def test_hooks_of_a_success_get_the_arguments(shared: Shared) -> None:
    run = shared.module.total.apply_async(kwargs={"numbers": [1, 2]})
    assert run.get(timeout=10) == 3
    shared.wait_for_note(run.id, "task_postrun")
    given = [[], {"numbers": [1, 2]}]
    assert dict(shared.notes(run.id)) == {
        "project __call__": given,
        "on_success": [3, *given],
        "task_success": [3, *given],
        "after_return": ["SUCCESS", *given],
        "task_postrun": ["SUCCESS", *given],
    }


def test_hooks_of_a_failure_get_the_error_and_the_arguments(shared: Shared) -> None:
    module = shared.module
    run = module.raises.apply_async(
        ("value",), link_error=[module.errback.s(), module.errback_with_error.s()]
    )
    with pytest.raises(ValueError, match="bad value"):
        run.get(timeout=10)
    wait_for(lambda: len(shared.notes(run.id, "errback")) == 2, what="both errbacks")
    shared.wait_for_note(run.id, "after_return")
    notes = dict(shared.notes(run.id))
    assert notes["on_failure"] == ["ValueError", ["value"], {}]
    assert notes["task_failure"] == ["ValueError", ["value"]]
    assert notes["after_return"] == ["FAILURE", ["value"], {}]
    assert ["ValueError", "bad value", ["value"]] in shared.notes(run.id, "errback")
    assert "id" in shared.notes(run.id, "errback")


def test_a_park_is_told_as_a_retry_and_can_be_told_from_an_error(shared: Shared) -> None:
    module = shared.module
    plain = module.retries.delay("countdown")
    assert plain.get(timeout=10) == 2
    assert shared.notes(plain.id, "on_retry") == [["Parked", ["countdown"], {}]] * 2
    for kind, what, cause in shared.notes(plain.id, "task_retry"):
        assert (kind, what) == ("Parked", "retry")
        assert cause.startswith("Parked(")

    failing = module.raises.delay("recoverable")
    assert failing.get(timeout=10) == 1
    assert shared.notes(failing.id, "on_retry") == [["RecoverableError", ["recoverable"], {}]]
    ((kind, what, cause),) = shared.notes(failing.id, "task_retry")
    assert (kind, what) == ("Parked", "retry")
    assert cause.startswith("RecoverableError(")
    assert not shared.notes(failing.id, "on_failure")


def test_a_run_that_always_takes_its_process_along_fails_in_the_end(shared: Shared) -> None:
    module = shared.module
    run = module.suicide.apply_async((99,), link_error=module.errback_with_error.s())
    with pytest.raises(RunLost, match="durable_max_recoveries"):
        run.get(timeout=30)
    assert run.state == "FAILURE"
    assert len(shared.notes(run.id, "claim")) == 2  # the first, and a recovery
    kind, _, args = shared.wait_for_note(run.id, "errback")
    assert (kind, args) == ("RunLost", [99])
    assert shared.notes(run.id, "on_failure") == [["RunLost", [99], {}]]
    assert shared.notes(run.id, "task_failure") == [["RunLost", [99]]]
    wait_for(lambda: shared.query(TOLD, run.id), what="the end to be confirmed")


def test_a_run_past_its_deadline_fails_and_the_hooks_hear_of_it(shared: Shared) -> None:
    run = shared.module.parked.apply_async(deadline="0.5s")
    with pytest.raises(TimeoutError, match="deadline"):
        run.get(timeout=10)
    assert shared.wait_for_note(run.id, "on_failure") == ["DeadlineExceeded", [], {}]
    wait_for(lambda: shared.query(TOLD, run.id), what="the end to be confirmed")


def test_hooks_are_not_called_twice_for_one_end(shared: Shared) -> None:
    run = shared.module.total.apply_async(([4],), link=shared.module.total.si([1]))
    assert run.get(timeout=10) == 4
    wait_for(lambda: shared.query(TOLD, run.id), what="the end to be confirmed")
    assert len(shared.notes(run.id, "on_success")) == 1
