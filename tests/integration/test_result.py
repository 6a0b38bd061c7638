"""``AsyncResult`` of a run, answered from Postgres, with no result backend and no worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError

from durable import Durable, Workflow
from durable.codec import Codec
from durable.errors import RunNotFound, StepError
from durable.failures import encode_failure
from durable.store.runs import Park
from tests.harness.store import Store

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def fulfil(store_url: str) -> Iterator[Any]:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.durable_database_url = store_url  # goes before the environment
    Durable(app)

    @app.task(shared=False, base=Workflow, name="shop.fulfil")
    def fulfil(order_id: str) -> None: ...

    yield fulfil
    app.durable.close()
    app.close()


def test_a_start_is_in_postgres_before_delay_returns(fulfil: Any, store: Store) -> None:
    result = fulfil.delay("o-42")
    row = store.row(result.id)
    assert (row["status"], row["workflow_name"]) == ("pending", "shop.fulfil")
    assert row["input"] == '{"args":["o-42"],"kwargs":{}}'
    assert (result.state, result.result, result.ready()) == ("PENDING", None, False)


def test_the_same_id_starts_one_run(fulfil: Any, store: Store) -> None:
    for order in ("o-42", "o-43"):
        assert fulfil.apply_async((order,), task_id=UNKNOWN).id == UNKNOWN
    assert store.row(UNKNOWN)["input"] == '{"args":["o-42"],"kwargs":{}}'


def test_the_states_are_celerys(fulfil: Any, store: Store) -> None:
    result = fulfil.delay("o-42")
    seen = [result.state]
    claim = store.hold(result.id)
    seen.append(result.state)
    store.park(claim, Park("sleeping", "retry", delay=60.0))
    seen.append(result.state)
    store.set(result.id, status="'pending'")
    store.finish(store.hold(result.id), output='{"paid":true}')
    seen.append(result.state)
    assert seen == ["PENDING", "STARTED", "RETRY", "SUCCESS"]
    assert result.get(timeout=1) == {"paid": True}


def test_progress_is_shown_while_it_runs_and_then_the_outcome(fulfil: Any, store: Store) -> None:
    result = fulfil.delay("o-42")
    claim = store.hold(result.id)
    store.set(result.id, progress='\'{"state": "PROGRESS", "meta": {"current": 1}}\'')
    assert (result.state, result.info) == ("PROGRESS", {"current": 1})
    store.finish(claim, output="1")
    assert (result.state, result.info) == ("SUCCESS", 1)


def test_a_failure_is_raised_with_its_traceback(fulfil: Any, store: Store) -> None:
    class Local(Exception):
        pass

    error = encode_failure(Local("declined"), Codec(), trusted_packages=())
    result = fulfil.delay("o-42")
    store.finish(store.hold(result.id), "failed", error=error)
    with pytest.raises(StepError, match="declined"):
        result.get(timeout=1)
    assert isinstance(result.get(timeout=1, propagate=False), StepError)
    assert "Local: declined" in str(result.traceback)


def test_cancel_says_whether_there_was_something_to_cancel(fulfil: Any) -> None:
    result = fulfil.delay("o-42")
    assert result.cancel("out of stock")
    assert not result.cancel()
    assert result.state == "REVOKED"
    with pytest.raises(TaskRevokedError, match="out of stock"):
        result.get(timeout=1)


def test_waiting_has_an_end_and_names_the_run(fulfil: Any) -> None:
    result = fulfil.delay("o-42")
    with pytest.raises(CeleryTimeoutError) as caught:
        result.get(timeout=0.01)
    assert str(caught.value) == f"run {result.id} did not end within 0.01 s"


def test_the_row_and_the_steps_of_a_run(fulfil: Any) -> None:
    result = fulfil.delay("o-42")
    assert (result.run().name, result.steps()) == ("shop.fulfil", [])


@pytest.mark.parametrize("run_id", [UNKNOWN, "order-42"])
def test_an_unknown_id_is_pending_as_in_celery_and_has_no_row(fulfil: Any, run_id: str) -> None:
    result = fulfil.app.AsyncResult(run_id)
    assert (result.state, result.steps()) == ("PENDING", [])
    with pytest.raises(RunNotFound, match=run_id):
        result.run()
