"""What a body hears of the tasks that it started, in every pool."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from tests.harness import WorkerNode, every_pool


@pytest.fixture
def app_name() -> str:
    return "tests.apps.children"


@every_pool
def test_outcomes_come_to_the_body(
    app_module: ModuleType, celery_worker: WorkerNode, worker_pool: str
) -> None:
    def script(*args: Any) -> Any:
        return app_module.runs_script.delay(*args).get(timeout=30)

    joined, *_ = script("sets")
    assert joined == [2, [6, 8], 4]
    assert script("outcome", "plain_fails") == ["KeyError", '"a plain task\'s error"']
    assert script("outcome", "plain_rejects")[0] == "Reject"
    assert script("outcome", "plain_retries") == 2
    assert script("outcome", "plain_replaced", "plain") == 3
    assert script("waiting for an expired one") == ["TaskRevokedError", "expired"]
    if worker_pool != "gevent":  # where Celery lets a task wait
        assert script("gets in step", "refused")[0] == "RuntimeError"
    if worker_pool in {"prefork", "gevent"}:  # the others know no hard time limit
        assert script("outcome", "plain_hangs")[0] == "TimeLimitExceeded"
