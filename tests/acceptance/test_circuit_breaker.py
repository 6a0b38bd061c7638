"""A circuit breaker between two workers: no calls while it is open, one probe, then all is well."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import WorkerNode, wait_for

CALLERS = 8
# A refusal parks for the rest of the 60 s; the service's own error for less than a second.
REFUSED = (
    "SELECT count(*) FROM durable.workflow_runs"
    " WHERE status = 'sleeping' AND available_at > now() + interval '20 s'"
)
PROBER = (
    "SELECT child_pid FROM durable.workflow_runs WHERE status = 'running' AND child_pid = ANY(%s)"
)
TIME_PASSES = """
WITH breaker AS (UPDATE durable.circuit_breakers SET next_probe_at = now()),
     run AS (UPDATE durable.workflow_runs SET available_at = now() WHERE status = 'sleeping')
SELECT pg_notify('durable', 'default')
"""


@pytest.fixture
def app_name() -> str:
    return "tests.apps.breaker"


def test_a_service_that_is_down_is_left_alone_and_found_again(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    def until_refused(number: int) -> None:
        wait_for(lambda: query(REFUSED) == number, what=f"{number} runs to be refused")

    def serve(word: str) -> None:
        app_module.WORD.write_text(word)

    workers = [start_worker(wait=False) for _ in range(2)]
    runs = [app_module.asks.delay(f"caller {number}") for number in range(CALLERS)]

    until_refused(CALLERS)
    calls = len(trace.lines())
    assert 2 <= calls <= 5  # the threshold, and what the other three processes had begun by then
    assert app_module.breaker.state == "open"

    serve("hold")
    query(TIME_PASSES)
    until_refused(CALLERS - 1)
    assert len(trace.lines()) == calls + 1  # of all runs, one is let through
    assert app_module.breaker.state == "half_open"

    _kill_the_prober(workers, query)
    until_refused(CALLERS)  # nobody goes in its place before its time is over
    assert len(trace.lines()) == calls + 1

    serve("up")

    def all_answered() -> bool:
        query(TIME_PASSES)  # who came during the probe was refused once more
        return all(run.ready() for run in runs)

    wait_for(all_answered, what="an answer for everybody")
    assert [run.get() for run in runs] == [f"an answer for caller {n}" for n in range(CALLERS)]
    assert len(trace.lines()) == calls + 1 + CALLERS
    assert app_module.breaker.state == "closed"


def test_an_async_step_is_guarded_too(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace
) -> None:
    run = app_module.knocks.delay(["ada", "grace"])
    assert run.get(timeout=10) == ["ConnectionError", "CircuitOpen"]
    assert trace.lines() == ["ada"]


def _kill_the_prober(workers: list[WorkerNode], query: Query) -> None:
    for worker in workers:
        pid = query(PROBER, worker.children())
        if pid is not None:
            worker.kill_child(pid)
