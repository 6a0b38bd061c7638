"""Masked values, in real runs: they are in no log line, no message, no event, no answer of a worker."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from celery import Celery

from durable import Secret
from tests.apps.private import SECRET
from tests.harness import wait_for


@pytest.fixture
def app_name() -> str:
    return "tests.apps.private"


@pytest.fixture
def app_settings(app_settings: dict[str, Any]) -> dict[str, Any]:
    return {
        **app_settings,
        "durable_mask": ["password", "card_number"],
        "task_send_sent_event": True,
        "worker_send_task_events": True,
        # Celery can be told to log arguments too.
        "worker_task_log_format": "%(asctime)s %(message)s",
    }


@contextmanager
def events_of(app: Celery) -> Iterator[list[dict[str, Any]]]:
    """Celery's events, as Flower gets them."""
    found: list[dict[str, Any]] = []
    stopped, ready = threading.Event(), threading.Event()

    def receive() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": found.append})
            options = {"callbacks": [receiver._receive], "accept": ["json"], "no_ack": True}
            with connection.Consumer([receiver.queue], **options):
                ready.set()
                while not stopped.is_set():
                    with suppress(TimeoutError):
                        connection.drain_events(timeout=0.1)

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield found
    finally:
        stopped.set()
        thread.join(10)


def test_a_masked_value_is_seen_nowhere_and_is_not_lost(
    app: Celery, app_module: Any, start_worker: Any, tmp_path: Any, trace: Any
) -> None:
    worker = start_worker()
    with events_of(app) as events:
        results = [
            app_module.signs_in.delay("ada", SECRET),
            app_module.signs_in.delay("ada", password=SECRET, card_number=SECRET),
            app_module.signs_in.delay("ada", Secret(SECRET)),
            # A producer that knows nothing of workflows: Celery's own message.
            Celery.send_task(app, "private.signs_in", ["ada", SECRET], {"card_number": SECRET}),
            app_module.quotes.delay([{"Password": SECRET, "user": "ada"}]),
        ]
        found = [result.get(timeout=20) for result in results]
        gated = app_module.gated.delay([str(tmp_path / "gate")], SECRET)
        wait_for(lambda: "gate" in trace.lines(), what="the run to be at its gate")
        [active] = app.control.inspect(timeout=10, limit=1).active().values()
        (tmp_path / "gate").touch()
        gated.get(timeout=20)
        succeeded = lambda: [e for e in events if e["type"] == "task-succeeded"]  # noqa: E731
        wait_for(lambda: len(succeeded()) >= len(results) + 1, what="the events")
    # Whole, where it belongs.
    assert [each["password"] for each in found[:2]] == [SECRET, SECRET]
    assert found[2]["password"] == Secret(SECRET)
    assert found[3]["password"] == SECRET
    assert found[4] == {"quoted": [{"Password": SECRET, "user": "ada"}]}
    assert SECRET in results[0].run().input
    # Masked, where people look.
    assert [task["args"] for task in active] == [f"(['{tmp_path / 'gate'}'], '***')"]
    sent = [event for event in events if event["type"] == "task-sent"]
    assert SECRET not in json.dumps([e for e in events if e not in sent], default=repr)
    # That producer's own words are not ours.
    assert [e["uuid"] for e in sent if SECRET in repr(e)] == [results[3].id]
    assert SECRET not in worker.logs()
    assert "{'user': 'ada', 'password': '***'}" in worker.logs()
    assert "'quoted': [{'Password': '***', 'user': 'ada'}]" in worker.logs()
    shown = {event["uuid"]: event for event in events if event["type"] == "task-received"}
    assert shown[results[0].id]["args"] == "('ada', '***')"
    assert json.dumps(shown[results[1].id]["kwargs"]).count("***") == 2


def test_the_message_of_a_run_and_its_row_show_nothing(
    app: Celery, app_module: Any, query: Any
) -> None:
    """No worker is there: the message waits in the broker."""
    result = app_module.signs_in.delay("ada", SECRET, card_number=SECRET)
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue](connection.channel())
        message = wait_for(queue.get, what="the message")
    text = json.dumps([message.headers, message.properties], default=repr) + str(message.body)
    assert message.headers["id"] == result.id
    assert SECRET not in text
    assert message.headers["argsrepr"] == "('ada', '***')"
    stored = query("SELECT message::text FROM durable.workflow_runs WHERE id = %s", result.id)
    assert SECRET not in stored
    assert "***" in stored


def test_what_failed_in_a_fan_out_is_described_without_it(
    app_module: Any, celery_worker: Any
) -> None:
    result = app_module.guards.delay([SECRET, "bad"])
    with pytest.raises(Exception, match="it is bad") as caught:
        result.get(timeout=20)
    notes = "\n".join(caught.value.__notes__)
    assert "guarded_card('***')" in notes
    assert SECRET not in notes
