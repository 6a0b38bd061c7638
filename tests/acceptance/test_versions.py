"""A run of a version is executed by workers that have it; the others hand its message on."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import brokers, every_broker, every_pool, wait_for

REASON = "SELECT reason FROM durable.workflow_runs WHERE id = %s"
VERSION = "SELECT version FROM durable.workflow_runs WHERE id = %s"
STATUS = "SELECT status FROM durable.workflow_runs WHERE id = %s"
FAST = {
    "durable_lease": 2,
    "durable_heartbeat_interval": 0.5,
    "durable_poll_interval": 0.5,
}


@pytest.fixture
def app_name() -> str:
    return "tests.apps.changing"


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, object]:
    return {"durable_database_url": database_url, "trace": str(trace.path), **FAST}


def release(number: str) -> dict[str, dict[str, str]]:
    return {"env": {"RELEASE": number}}


@every_broker
def test_two_versions_side_by_side_each_execute_their_own_runs(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    old = start_worker(**release("1"))
    new = start_worker(**release("2"))
    versioned, quick = app_module.versioned, app_module.quick

    old_run = versioned.delay()
    wait_for(lambda: query(STATUS, old_run.id) == "waiting", what="the old run to wait")
    quick.version = versioned.version = "2"  # as a producer of the new release has it
    new_run = versioned.delay()
    wait_for(lambda: query(STATUS, new_run.id) == "waiting", what="the new run to wait")
    assert [query(VERSION, run.id) for run in (old_run, new_run)] == ["1", "2"]
    old_run.send_event("go")
    new_run.send_event("go")
    assert old_run.get(timeout=20) == ["1", "1"]
    assert new_run.get(timeout=20) == ["2", "2"]
    assert trace.count() == {"1 begin": 1, "2 begin": 1}

    # No storm, and no lottery: a message goes astray once at most.
    runs = [quick.delay(number) for number in range(20)]
    assert [run.get(timeout=30) for run in runs] == ["2"] * 20
    assert {trace.count()[f"effect {number}"] for number in range(20)} == {1}
    # Chance decides which of them go astray; here it is no more than once, and not where they belong.
    astray = [old.logs().count(f"run {run.id} goes to a worker") for run in runs]
    assert max(astray) <= 1, astray
    assert not any(f"run {run.id} goes to a worker" in new.logs() for run in runs)


def test_newer_code_goes_on_with_versions_that_it_accepts(
    app_module: ModuleType, start_worker: StartWorker, query: Query
) -> None:
    worker = start_worker(**release("1"))
    run = app_module.versioned.delay()
    wait_for(lambda: query(STATUS, run.id) == "waiting", what="the run to wait")
    worker.stop()

    other = start_worker(**release("2"))
    run.send_event("go")
    expected = "lacking code: no live worker has version 1 of changing.versioned"
    wait_for(lambda: query(REASON, run.id) == expected, what="the reason")
    assert query(STATUS, run.id) == "pending"
    other.stop()

    start_worker(**release("3"))
    assert run.get(timeout=20) == ["3", "1"]
    assert query(REASON, run.id) is None

    # An endless run gets to the newer version with its next pass.
    endless = app_module.counting.delay(0, 2)
    assert query(VERSION, endless.id) == "1"
    assert endless.get(timeout=20)[:3] == [2, 1, "3"]
    # A message that came without a run is of the version of the worker that makes it one.
    plain = app_module.app.durable.starter._send_task("changing.quick", [7])
    wait_for(lambda: query(VERSION, plain.id) == "3", what="the run")


@pytest.fixture
def no_own_queues(rabbitmq_vhost: str) -> Iterator[None]:
    """A RabbitMQ whose user may not make the workers' own queues."""
    if rabbitmq_vhost == "/":
        pytest.skip("needs rabbitmqctl")
    brokers.permit(rabbitmq_vhost, r"^(?!durable\.).*")
    yield
    brokers.permit(rabbitmq_vhost, ".*")


@pytest.mark.usefixtures("no_own_queues")
@pytest.mark.parametrize("celery_broker", ["rabbitmq"], indirect=True)
def test_a_broker_that_refuses_the_queues_costs_time_alone(
    app_module: ModuleType, start_worker: StartWorker, trace: Trace
) -> None:
    start_worker(**release("lacks"))
    worker = start_worker(**release("1"))
    runs = [app_module.quick.delay(number) for number in range(12)]
    assert [run.get(timeout=60) for run in runs] == ["1"] * 12
    assert {trace.count()[f"effect {number}"] for number in range(12)} == {1}
    assert "the broker does not let this worker have the queue" in worker.logs()
    assert worker.is_running()


@every_pool
def test_a_worker_without_the_task_hands_its_messages_on(
    app_module: ModuleType, start_worker: StartWorker, trace: Trace
) -> None:
    lacks = start_worker(**release("lacks"))
    start_worker(**release("1"))
    runs = [app_module.quick.delay(number) for number in range(20)]
    assert [run.get(timeout=30) for run in runs] == ["1"] * 20
    assert {trace.count()[f"effect {number}"] for number in range(20)} == {1}
    astray = lacks.logs().count("does not have the task")
    assert 0 < astray <= 20, "each message goes astray once at most"
