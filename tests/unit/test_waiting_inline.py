"""What the waiting verbs do without a worker: in direct calls, outside of a run, in a step."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from celery import Celery

import durable
from durable import Durable, Workflow, step
from durable.errors import NotInWorkflow, OptionError

VERBS: dict[str, Callable[[], Any]] = {
    "sleep": lambda: durable.sleep(3600),
    "sleep_until": lambda: durable.sleep_until(datetime(2020, 1, 1, tzinfo=timezone.utc)),
    "wait_for_event": lambda: durable.wait_for_event("approval"),
    "wait_for_event with a schema": lambda: durable.wait_for_event("approval", schema=int),
}
WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: durable.sleep(-1), "is negative"),
    (lambda: durable.sleep("2030-01-01"), "is not a duration"),
    (lambda: durable.sleep_until(datetime(2030, 1, 1)), "give an aware datetime"),  # noqa: DTZ001
    (lambda: durable.sleep_until("2030-01-01"), "give an aware datetime"),  # type: ignore[arg-type]
    (lambda: durable.sleep_until(datetime.max.replace(tzinfo=timezone.utc)), "hundred years"),
    (lambda: durable.wait_for_event(""), "the type of an event is text of 1 to 255"),
    (lambda: durable.wait_for_event("approval", timeout=-1), "is negative"),
    (lambda: durable.wait_for_event("approval", schema=7), "cannot check a payload"),
]


def call_inline(body: Callable[[], Any]) -> Any:
    app = Celery("inline", set_as_current=False)
    Durable(app, database_url="postgresql://nowhere/none")

    @app.task(base=Workflow, shared=False, name="inline.run")
    def run() -> Any:
        return body()

    return run()


@pytest.mark.parametrize("verb", ["sleep", "sleep_until"])
def test_a_sleep_is_skipped(verb: str) -> None:
    assert call_inline(VERBS[verb]) is None


@pytest.mark.parametrize("verb", ["wait_for_event", "wait_for_event with a schema"])
def test_waiting_for_an_event_is_refused(verb: str) -> None:
    with pytest.raises(NotInWorkflow, match=r"inline .* where nothing can be waited for"):
        call_inline(VERBS[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_outside_of_a_run_they_say_so(verb: str) -> None:
    with pytest.raises(NotInWorkflow, match=verb.partition(" ")[0]):
        VERBS[verb]()


@pytest.mark.parametrize("verb", VERBS)
def test_in_a_step_they_say_what_to_do(verb: str) -> None:
    @step(name=f"inline.{verb}")
    def waits() -> None:
        VERBS[verb]()

    with pytest.raises(NotInWorkflow, match=r"belongs in the body .* Wait between two steps"):
        call_inline(waits)


@pytest.mark.parametrize(("call", "complaint"), WRONG)
def test_wrong_options_are_told(call: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        call_inline(call)
