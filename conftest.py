"""What the examples in docstrings take for granted: an app that has `Durable`, and the names.

An example that starts a run gets a database too, and a worker with the first message.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, _state
from celery.contrib.testing.worker import start_worker
from celery.signals import after_task_publish

import durable
from durable import embedded, steps

_STARTS_A_RUN = (".delay(", ".apply_async(")


@pytest.fixture(scope="session")
def _examples_url() -> Iterator[str]:
    with embedded.temporary() as server:
        yield server.url


@pytest.fixture(autouse=True)
def _examples(
    request: pytest.FixtureRequest,
    doctest_namespace: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    monkeypatch.setattr(steps, "_registered", {})
    # A shared task goes to all apps there are and will be, and another example has one of its name.
    monkeypatch.setattr(_state, "_on_app_finalizers", _state._on_app_finalizers.copy())  # noqa: SLF001
    monkeypatch.setattr(_state, "_apps", weakref.WeakSet())
    monkeypatch.delenv("DURABLE_DATABASE_URL", raising=False)
    url = "postgresql://127.0.0.1:1/shop"
    if any(call in each.source for each in request.node.dtest.examples for call in _STARTS_A_RUN):
        url = request.getfixturevalue("_examples_url")
    app = Celery("shop", broker="memory://")
    # The queues of memory:// are the process's, and so are what other tests leave in them.
    app.conf.task_default_queue = "examples"
    app.conf.broker_transport_options = {"polling_interval": 0.01}
    durable.Durable(app, database_url=url)
    names = {name: getattr(durable, name) for name in ("run_step", "step", "workflow")}
    doctest_namespace.update({"durable": durable, **names})
    with _worker_at_first_message(app):
        yield
    app.durable.close()
    app.close()
    app.set_default()


@contextlib.contextmanager
def _worker_at_first_message(app: Celery) -> Iterator[None]:
    """Start a worker in this process when a message is there, and the example's tasks are too."""
    with contextlib.ExitStack() as stack:

        def start(**_: Any) -> None:
            after_task_publish.disconnect(start)
            stack.enter_context(start_worker(app, pool="solo", perform_ping_check=False))
            stack.callback(app.control.shutdown)  # else it ends when its wait for messages does

        after_task_publish.connect(start, weak=False)
        stack.callback(after_task_publish.disconnect, start)
        yield
