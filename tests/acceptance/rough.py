"""What the tests of rough times share: short settings, questions, checks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.acceptance.conftest import Query
from tests.harness import WorkerNode, wait_for

APP = "tests.apps.rough"
LEASE = 2.5
PUBLISH_TIMEOUT = 1.0

UNFINISHED = "SELECT count(*) FROM durable.workflow_runs WHERE status <> 'succeeded'"
COUNT = "SELECT count(*) FROM durable.workflow_runs WHERE status = %s"
BEATS = "SELECT json_object_agg(id, beat) FROM durable.workers"
WORKERS = "SELECT count(*) FROM durable.workers"
HOLDER = "SELECT split_part(worker_id, '@', 1) FROM durable.workflow_runs WHERE id = %s"
CHILD = "SELECT child_pid FROM durable.workflow_runs WHERE id = %s AND status = 'running'"


def short_settings(database_url: str, trace: Path) -> dict[str, Any]:
    """Settings under which a recovery takes seconds."""
    return {
        "durable_database_url": database_url,
        "durable_lease": LEASE,
        "durable_poll_interval": 0.5,
        "durable_ring_interval": 1,
        "durable_publish_timeout": PUBLISH_TIMEOUT,
        "trace": str(trace),
    }


def pass_time(seconds: float) -> None:
    """Let a lease run out: nothing else tells that it did."""
    end = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() > end, timeout=seconds + 1)


def assert_nobody_was_buried(*workers: WorkerNode) -> None:
    for worker in workers:
        assert "is dead" not in worker.logs()


def moved(query: Query, before: dict[str, int]) -> bool:
    """Whether every worker has beaten since."""
    now = query(BEATS)
    return now.keys() == before.keys() and all(now[each] > before[each] for each in before)
