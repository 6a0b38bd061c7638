"""Tasks that a body starts: recorded once, tried again as long as it takes, under the same ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult, GroupResult
from kombu.exceptions import EncodeError, OperationalError

from durable import context
from durable.errors import StepError
from durable.handles import ids_of, started_once
from tests.harness.ledger import Ledger


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("handles", set_as_current=False)
    yield app
    app.close()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


class Broker:
    """Notes which ids it was sent; refuses with these errors first."""

    def __init__(self, app: Celery, *errors: Exception) -> None:
        self.app = app
        self.errors = list(errors)
        self.sent: list[str] = []

    def start(self) -> Any:
        """What a body does; returns the handle."""
        execution = context.running.get()
        assert execution is not None
        return started_once(execution, self.app, "shop.mail", self._send)

    def _send(self) -> AsyncResult[Any]:
        execution = context.running.get()
        assert execution is not None
        self.sent.append(execution.new_task_id("shop.mail"))
        if self.errors:
            raise self.errors.pop(0)
        return AsyncResult(self.sent[-1], app=self.app)


def test_a_start_is_recorded_and_the_replay_gets_the_same_handle(app: Celery) -> None:
    ledger, broker = Ledger(), Broker(app)
    first = ledger.run(lambda: broker.start().id)
    again = ledger.run(lambda: broker.start().id)
    assert first.value == again.value == broker.sent[0]
    assert len(broker.sent) == 1


def test_two_starts_at_two_places_have_two_ids(app: Celery, ledger: Ledger) -> None:
    broker = Broker(app)
    ids = ledger.run(lambda: [broker.start().id, broker.start().id]).value
    assert len(set(ids)) == 2


def test_a_broker_that_is_away_parks_the_run_as_often_as_it_takes(
    app: Celery, ledger: Ledger
) -> None:
    broker = Broker(app, *[OperationalError("away") for _ in range(12)])
    for _ in range(12):
        assert ledger.run(lambda: broker.start().id).stopped == "retry"
    assert ledger.run(lambda: broker.start().id).value == broker.sent[0]
    assert len(set(broker.sent)) == 1, "each try is of the same task"


def test_what_can_never_be_sent_raises_in_the_body_and_on_each_replay(
    app: Celery, ledger: Ledger
) -> None:
    broker = Broker(app, EncodeError("no JSON"))
    for _ in range(2):
        error = ledger.run(broker.start).error
        assert isinstance(error, StepError)
        assert "no JSON" in str(error)
    assert len(broker.sent) == 1


def test_a_worker_that_dies_before_the_record_sends_again_under_the_same_id(app: Celery) -> None:
    broker = Broker(app)
    run_id = Ledger().id
    for _ in range(2):  # the first worker's record is lost with it
        Ledger(id=run_id).run(lambda: broker.start().id)
    assert len(set(broker.sent)) == 1


def test_the_tasks_of_a_handle_are_those_before_it_and_its_members(app: Celery) -> None:
    first = AsyncResult("first", app=app)
    group = GroupResult("group", [AsyncResult("a", app=app), AsyncResult("b", app=app)], app=app)
    group.parent = first
    assert [*ids_of(AsyncResult("body", app=app, parent=group))] == ["first", "a", "b", "body"]
