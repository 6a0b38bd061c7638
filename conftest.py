"""What the examples in docstrings take for granted: an app that has `Durable`, and the names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

import durable
from durable import steps


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
    monkeypatch.delenv("DURABLE_DATABASE_URL", raising=False)
    app = Celery("shop", broker="memory://")
    durable.Durable(app, database_url="postgresql://127.0.0.1:1/shop")
    names = {name: getattr(durable, name) for name in ("run_step", "step", "workflow")}
    doctest_namespace.update({"durable": durable, **names})
    yield
    app.close()
    app.set_default()
