"""A canceled run and the runs that it has started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from durable.errors import OptionError
from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS
from tests.harness import wait_for
from tests.harness.postgres import PostgresServer

CHILD_PID = "SELECT child_pid FROM durable.workflow_runs WHERE id = %s AND status = 'running'"


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("parents")
    with running("tests.apps.waits", postgres_server, directory, backend=True) as shared:
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


def family(shared: Shared, gate: Path, *, tied: bool) -> tuple[Any, Any, Any, Any]:
    """A parked parent, a child that runs, one that is parked, and its own child."""
    parent = shared.module.parent.delay(str(gate), tied)
    running, parked = shared.wait_for_note(parent.id, "children")
    grandchild = shared.wait_for_note(parked, "grandchild")
    shared.wait_for_note(running, "holds")
    for each in (parent.id, parked, grandchild):
        shared.wait_for_status(each, "waiting")
    return (parent, *map(shared.app.AsyncResult, (running, parked, grandchild)))


def test_tied_children_are_canceled_with_their_parent_and_celery_is_told(
    shared: Shared, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    parent, running, parked, grandchild = family(shared, gate, tied=True)
    assert parent.cancel("out of stock")
    assert [each.run().status for each in (parent, parked, grandchild)] == ["canceled"] * 3
    assert parked.run().reason == grandchild.run().reason == "its parent was canceled"
    for each in (parked, grandchild):
        wait_for(
            lambda run_id=each.id: shared.app.backend.get_state(run_id) == "REVOKED",
            what="Celery's result backend to be told",
        )
    assert running.run().status == "running"  # until its step is over
    gate.touch()
    shared.wait_for_status(running.id, "canceled")


def test_children_that_are_not_tied_go_on(shared: Shared, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    parent, running, parked, grandchild = family(shared, gate, tied=False)
    parent.revoke()
    gate.touch()
    shared.wait_for_status(running.id, "succeeded")
    assert parent.run().status == "canceled"
    assert parked.run().status == grandchild.run().status == "waiting"
    parked.revoke()  # which has a tied child itself
    assert grandchild.run().status == "canceled"


@pytest.mark.parametrize("end", ["the step is over", "its process dies"])
def test_a_parent_that_is_canceled_while_it_runs_takes_its_children_along_when_it_stops(
    shared: Shared, tmp_path: Path, end: str
) -> None:
    gate = tmp_path / "gate"
    parent = shared.module.busy_parent.delay(str(gate))
    child = shared.wait_for_note(parent.id, "child")
    shared.wait_for_note(parent.id, "holds")
    shared.wait_for_status(child, "waiting")
    assert parent.cancel()
    assert parent.run().status == "running"
    assert shared.status(child) == "waiting"
    if end == "the step is over":
        gate.touch()
    else:
        shared.worker.kill_child(shared.query(CHILD_PID, parent.id))
    shared.wait_for_status(child, "canceled")
    assert parent.run().status == "canceled"


@pytest.mark.parametrize(
    ("where", "policy", "complaint"),
    [
        ("body", "stop", r"on_parent_cancel='stop': give 'abandon' \(the default\) or 'cancel'"),
        ("body", True, r"on_parent_cancel=True"),
        ("step", "cancel", "outside its steps"),
        ("plain", "cancel", "is a plain task"),
    ],
)
def test_what_cannot_be_tied_is_refused(
    shared: Shared, where: str, policy: Any, complaint: str
) -> None:
    with pytest.raises(OptionError, match=complaint):
        shared.module.ties.delay(where, policy).get(timeout=10)


def test_only_a_workflow_has_children(shared: Shared) -> None:
    with pytest.raises(OptionError, match="that the body of a workflow starts"):
        shared.module.quick.apply_async(("x",), on_parent_cancel="cancel")
