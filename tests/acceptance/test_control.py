"""Pause, resume, restart and settle, with a real worker at the other end."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest
from celery.exceptions import TaskRevokedError

import durable
from durable.errors import NotAllowed
from tests.acceptance.conftest import Query, Trace
from tests.conftest import StartWorker
from tests.harness import WorkerNode, wait_for


def test_a_paused_run_stops_before_its_next_step_and_goes_on_when_resumed(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = app_module.gates.delay(3, str(go), 1)
    wait_for(lambda: "gate 1" in trace.lines(), what="the second step to run")
    assert run.pause(reason="the shop is closed", actor="ada")
    assert not run.pause()
    go.touch()
    wait_for(lambda: run.run().status == "paused", what="the run to pause")
    assert (run.run().reason, run.state) == ("the shop is closed", "RETRY")
    assert trace.lines() == ["gate 0", "gate 1"]  # what ran is kept, nothing more has begun

    assert run.resume(actor="bob")
    assert run.get(timeout=10) == [0, 1, 2]
    assert trace.lines() == ["gate 0", "gate 1", "gate 2"]
    assert [(done.action, done.actor) for done in run.actions()] == [
        ("pause", "ada"),
        ("resume", "bob"),
    ]


def test_a_run_paused_in_its_sleep_sleeps_to_the_same_time(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace
) -> None:
    began = time.monotonic()
    run = app_module.naps.delay(1.5)
    wait_for(lambda: run.run().status == "sleeping", what="the run to sleep")
    run.pause()
    assert run.run().status == "paused"
    run.resume()
    assert run.get(timeout=10) == 3
    assert 1.4 < time.monotonic() - began < 3
    assert trace.lines() == ["add 1 1", "add 2 1"]


def test_a_pause_that_is_taken_back_in_time_changes_nothing(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = app_module.gates.delay(2, str(go), 0)
    wait_for(lambda: "gate 0" in trace.lines(), what="the first step to run")
    run.pause()
    run.resume()
    go.touch()
    assert run.get(timeout=10) == [0, 1]
    assert trace.lines() == ["gate 0", "gate 1"]


def test_a_failed_run_is_repaired_and_restarted_where_it_failed(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    account = tmp_path / "account"
    run = app_module.pays.delay(1, str(account))
    with pytest.raises(durable.PermanentError):
        run.get(timeout=10)
    account.touch()
    assert run.restart(reason="the account is back")
    assert run.get(timeout=10) == 3
    assert trace.lines() == ["add 1 1", "pay 2", "pay 2", "add 2 1"]


def test_a_step_that_was_done_by_hand_is_settled_and_not_tried_again(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    run = app_module.pays.delay(1, str(tmp_path / "none"))
    with pytest.raises(durable.PermanentError):
        run.get(timeout=10)
    run.settle("tests.apps.basic.pay", 40, reason="paid by bank transfer")
    run.restart()
    assert run.get(timeout=10) == 41
    assert trace.lines() == ["add 1 1", "pay 2", "add 40 1"]


def test_a_restart_from_a_step_does_again_what_follows_it(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace
) -> None:
    run = app_module.total.delay([1, 2, 3])
    assert run.get(timeout=10) == 6
    run.restart(from_step="tests.apps.basic.add", ordinal=1)
    wait_for(lambda: len(trace.lines()) == 5, what="two steps to run again")
    assert run.get(timeout=10) == 6
    assert trace.lines()[3:] == ["add 1 2", "add 3 3"]


def test_a_child_that_failed_is_started_anew_when_its_parent_is_restarted(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    account = tmp_path / "account"
    run = app_module.asks.delay(str(account))
    with pytest.raises(durable.PermanentError):
        run.get(timeout=10)
    account.touch()
    run.restart()
    assert run.get(timeout=10) == 3
    assert trace.count()["pay 2"] == 2
    outcomes = [step.status for step in run.steps() if step.kind == "result"]
    assert outcomes == ["succeeded"]  # the other one is set aside


def test_a_restarted_run_delivers_its_callbacks_at_its_new_end(
    app_module: ModuleType, celery_worker: WorkerNode, trace: Trace, tmp_path: Path
) -> None:
    account = tmp_path / "account"
    run = app_module.pays.apply_async((1, str(account)), link=app_module.plain.s())
    with pytest.raises(durable.PermanentError):
        run.get(timeout=10)
    account.touch()
    run.restart()
    wait_for(lambda: "plain 3" in trace.lines(), what="the callback")


def test_a_revoked_run_can_be_restarted_under_its_id(
    app_module: ModuleType, celery_worker: WorkerNode
) -> None:
    run = app_module.naps.delay(3600)
    wait_for(lambda: run.run().status == "sleeping", what="the run to sleep")
    run.revoke()
    with pytest.raises(TaskRevokedError):
        run.get(timeout=10)
    run.restart(from_beginning=True)
    wait_for(lambda: run.run().status == "sleeping", what="the run to sleep again")
    assert run.cancel()


def test_a_pause_outlives_the_worker_that_was_asked(
    app_module: ModuleType, celery_worker: WorkerNode, query: Query, trace: Trace, tmp_path: Path
) -> None:
    run = app_module.gates.delay(2, str(tmp_path / "go"), 0)
    wait_for(lambda: "gate 0" in trace.lines(), what="the first step to run")
    run.pause()
    celery_worker.kill_child(
        query("SELECT child_pid FROM durable.workflow_runs WHERE id = %s", run.id)
    )
    wait_for(lambda: run.run().status == "paused", what="the run to be paused")
    (tmp_path / "go").touch()
    run.resume()
    assert run.get(timeout=10) == [0, 1]


def test_many_runs_at_once(app_module: ModuleType, start_worker: StartWorker) -> None:
    """Bulk actions need no worker."""
    control = app_module.app.durable.control
    naps = [app_module.naps.delay(3600) for _ in range(5)]
    others = [app_module.noop.delay() for _ in range(2)]
    which = durable.control.Which(statuses=["pending"], name="basic.naps")
    done = list(control.many("pause", which, actor="ada"))
    assert {change.run_id for change, error in done if error is None} == {each.id for each in naps}
    assert [each.run().status for each in others] == ["pending", "pending"]
    done = list(control.many("restart", [each.id for each in (*naps, *others)]))
    assert sum(isinstance(error, NotAllowed) for _, error in done) == 2
