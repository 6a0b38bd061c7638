"""The code of a workflow changes while runs of the older code are under way."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import wait_for

ROW = "SELECT row_to_json(r) FROM durable.workflow_runs r WHERE id = %s"
HISTORY = """
SELECT json_agg(json_build_array(ordinal, kind, step_name, status) ORDER BY ordinal, attempt)
  FROM durable.step_attempts WHERE workflow_run_id = %s
"""
#: What an operator does once the code is mended.
RESUME = """
UPDATE durable.workflow_runs SET status = 'pending', available_at = now(), rung = false
 WHERE id = %s AND status = 'paused' RETURNING id
"""


@pytest.fixture
def app_name() -> str:
    return "tests.apps.changing"


def release(number: str) -> dict[str, dict[str, str]]:
    return {"env": {"RELEASE": number}}


def wait_for_status(query: Query, run: Any, status: str) -> None:
    wait_for(lambda: query(ROW, run.id)["status"] == status, what=f"the run to be {status}")


def test_a_patched_workflow_takes_the_way_that_each_run_can_take(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    order = app_module.order
    old = start_worker(**release("1"))
    before = order.delay("before")  # parked right after `early` and right before `late`
    wait_for_status(query, before, "waiting")
    old.stop()

    new = start_worker(**release("2"))
    after = order.delay("after")
    wait_for_status(query, after, "waiting")
    for run in (before, after):
        run.send_event("go", "went")
    assert before.get(timeout=20) == ["before load", "went", "before mail", "before ship"]
    assert after.get(timeout=20) == [
        "after load",
        "after check",
        "went",
        "after mail",
        "after ship",
    ]
    assert trace.count() == {
        "1 before load": 1,
        "2 before mail": 1,
        "2 before ship": 1,
        "2 after load": 1,
        "2 after check": 1,
        "2 after mail": 1,
        "2 after ship": 1,
    }
    patches = [[row[0], row[2]] for row in query(HISTORY, before.id) if row[1] == "patch"]
    assert patches == [[2, "late"]]
    assert new.is_running()


AT_0 = "the history has step 'charge' at position 0, the code now "
AT_1 = "the history has wait for event 'go' at position 1, the code now "
MISTAKES = {
    "other step": f"{AT_0}asks for 'refund'.",
    "raises": f"{AT_0}ends before it.",
    "ends": f"{AT_0}ends before it.",
    "other event": f"{AT_1}asks for wait for event 'stop'.",
    "other kind": f"{AT_1}asks for a sleep.",
}


def test_runs_that_meet_other_code_are_paused_and_go_on_once_it_is_mended(
    app_module: ModuleType, start_worker: StartWorker, query: Query, trace: Trace
) -> None:
    first = start_worker(**release("1"))
    runs = {mistake: app_module.broken.delay(mistake) for mistake in MISTAKES}
    for run in runs.values():
        wait_for_status(query, run, "waiting")
    histories = {run.id: query(HISTORY, run.id) for run in runs.values()}
    first.stop()

    second = start_worker(**release("2"))
    for mistake, run in runs.items():
        run.send_event("go")
        wait_for_status(query, run, "paused")
        assert query(ROW, run.id)["reason"].startswith(MISTAKES[mistake])
        assert query(HISTORY, run.id) == histories[run.id], "nothing is overwritten"
    assert "ValueError('a mistake" in query(ROW, runs["raises"].id)["reason"]
    second.stop()

    start_worker(**release("1"))
    assert all(query(RESUME, run.id) for run in runs.values())
    for run in runs.values():
        assert run.get(timeout=20) == ["charge", "ship"]
    assert trace.count() == {"1 charge": len(runs), "1 ship": len(runs)}
