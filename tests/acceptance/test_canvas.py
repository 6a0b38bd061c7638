"""Canvas of durable and plain tasks, with Celery's Redis result backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery.exceptions
import pytest
from celery import chain, chord, group

from durable.errors import PayloadError
from durable.result import DurableResult
from durable.store.dispatch import Doorbell
from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS
from tests.harness import wait_for
from tests.harness.postgres import PostgresServer

TOLD = "SELECT available_at = 'infinity' FROM durable.workflow_runs WHERE id = %s"
STARTED = "SELECT count(*) FROM durable.workflow_runs WHERE workflow_name = %s"


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("canvas")
    with running("tests.apps.canvas", postgres_server, directory, backend=True) as shared:
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


def test_links_are_called_with_the_result(shared: Shared) -> None:
    module = shared.module
    run = module.add.apply_async((1, 2), link=[module.double.s(), module.plain_double.s()])
    assert run.get(timeout=10) == 3
    assert shared.wait_for_note(run.id, "double") == 6
    assert shared.wait_for_note(run.id, "plain_double") == 6


def test_a_chain_of_durable_and_plain_tasks(shared: Shared) -> None:
    module = shared.module
    result = (module.add.s(1, 2) | module.plain_double.s() | module.double.s()).delay()
    assert result.get(timeout=10) == 12
    middle, first = result.parent, result.parent.parent
    assert [first.get(timeout=5), middle.get(timeout=5)] == [3, 6]
    assert isinstance(first, DurableResult)
    assert shared.notes(first.id, "double") == [12]  # the root of all three is the first
    assert shared.notes(result.id, "from") == [[middle.id, None, None]]


def test_a_chain_stops_at_its_first_failure(shared: Shared) -> None:
    module = shared.module
    result = chain(module.add.s(1, 2), module.fails.s(), module.double.s()).apply_async(
        link_error=module.errback.s()
    )
    with pytest.raises(ValueError, match="no: 3"):
        result.get(timeout=10)
    assert result.parent.state == "FAILURE"
    assert shared.query(STARTED.replace("workflow_name", "id::text"), result.id) == 0
    assert shared.wait_for_note(result.parent.id, "errback") == "no: 3"


def test_a_group_of_durable_tasks(shared: Shared) -> None:
    module = shared.module
    result = group(module.add.s(n, n) for n in range(5)).delay()
    assert result.get(timeout=10) == [0, 2, 4, 6, 8]
    assert all(isinstance(child, DurableResult) for child in result)
    assert result.successful()
    one = group(module.double.s(1), module.double.s(2)).delay()
    assert one.get(timeout=10) == [2, 4]
    froms = [shared.notes(child.id, "from") for child in one]
    assert froms == [[[None, one.id, 0]], [[None, one.id, 1]]]
    mixed = group(module.add.s(1, 1), module.plain_double.s(2), module.retried.s(5)).delay()
    assert mixed.get(timeout=10) == [2, 4, 5]


def test_a_group_one_of_whose_runs_fails(shared: Shared) -> None:
    module = shared.module
    result = group(module.add.s(1, 1), module.fails.s(7)).delay()
    with pytest.raises(ValueError, match="no: 7"):
        result.get(timeout=10)
    wait_for(result.ready, what="both to end")
    assert result.failed()
    assert result.completed_count() == 1


def test_a_chord_counts_each_durable_member_once(shared: Shared) -> None:
    module = shared.module
    header = [module.add.s(1, 1), module.plain_double.s(2), module.retried.s(5)]
    result = chord(header, module.total.s()).delay()
    assert result.get(timeout=10) == 11
    bodies = shared.query(STARTED, module.total.name)
    again = chord([module.add.s(n, 0) for n in range(10)])(module.total.s())
    assert again.get(timeout=10) == 45
    assert shared.query(STARTED, module.total.name) == bodies + 1


def test_a_chord_in_a_chain(shared: Shared) -> None:
    module = shared.module
    flow = module.add.s(1, 2) | group(module.double.s(), module.plain_double.s()) | module.total.s()
    assert (flow | module.double.s()).delay().get(timeout=10) == 24


def test_a_chord_fails_with_its_member(shared: Shared) -> None:
    module = shared.module
    body = module.total.s().on_error(module.errback.s())
    result = chord([module.add.s(1, 1), module.fails.s(3)])(body)
    with pytest.raises(celery.exceptions.ChordError, match="no: 3"):
        result.get(timeout=10, follow_parents=False)
    shared.wait_for_note(result.id, "errback")


def test_a_chord_outlives_a_lost_process(shared: Shared, tmp_path: Path) -> None:
    module = shared.module
    result = chord([module.add.s(1, 1), module.dies_once.s(3)])(module.total.s())
    assert result.get(timeout=20) == 5


FLOWS = (
    "chain",
    "group",
    "header of a chord",
    "body of a chord",
    "header and body",
    "chord in a chord",
    "chain of groups",
    "chain to a chord",
    "with plain members",
)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("where", ["outside", "in a body"])
def test_a_flow_of_runs_that_do_not_go_straight_through(
    shared: Shared, flow: str, where: str
) -> None:
    """They sleep, back off, retry, wait for an event and are killed; each goes on once."""
    module = shared.module
    start, expected = module.FLOWS[flow]
    before = shared.query("SELECT now()")
    if where == "outside":
        result = start().apply_async(countdown=0.01)
    else:
        result = module.flow_in_a_body.delay(flow, 0.01)
    assert with_events(shared, result) == expected
    ids = "SELECT array_agg(id::text) FROM durable.workflow_runs WHERE created_at > %s"
    goes = shared.query(f"{ids} AND workflow_name = %s", before, module.goes.name)
    assert [len(shared.notes(each, "end")) for each in goes] == [1] * len(goes)
    bodies = shared.query(f"{ids} AND workflow_name = %s", before, module.total.name) or ()
    assert len(bodies) == repr(start()).count("total(")


def with_events(shared: Shared, result: Any) -> Any:
    """Send each run that waits for an event one; the result."""
    waiting = (
        "SELECT id::text FROM durable.workflow_runs WHERE status = 'waiting'"
        " AND workflow_name = %s AND NOT EXISTS (SELECT FROM durable.workflow_events e"
        " WHERE e.workflow_run_id = workflow_runs.id) LIMIT 1"
    )

    def over() -> bool:
        run_id = shared.query(waiting, shared.module.goes.name)
        if run_id is not None:
            shared.app.durable.send_event(run_id, "go")
        return bool(result.ready())

    wait_for(over, what="the flow to end", timeout=40)
    return result.get(timeout=5)


@pytest.mark.parametrize("where", ["link", "link_error", "chain", "header", "group"])
def test_a_run_that_fails_after_a_pause_is_told_of_once(shared: Shared, where: str) -> None:
    module = shared.module
    bad, after = module.goes.s(1, "fails"), module.goes.s("sleeps")
    if where == "link":
        result = module.goes.apply_async((1, "dies"), link=after)
        assert result.get(timeout=20) == 1
        [callback] = wait_for(lambda: result.children, what="the callback")
        assert callback.get(timeout=20) == 1
        return
    if where == "link_error":
        result = bad.apply_async(link_error=module.durable_errback.s())
        shared.wait_for_note(result.id, "durable_errback")
        wait_for(lambda: shared.query(TOLD, result.id), what="the end to be confirmed")
        assert len(shared.notes(result.id, "durable_errback")) == 1
        return
    flow = {
        "chain": chain(bad, after, after),
        "header": chord([bad, module.goes.s(1, "sleeps")], module.total.s()),
        "group": group(bad, module.goes.s(1, "sleeps")),
    }[where]
    with pytest.raises(ValueError, match="no: 1"):
        flow.apply_async().get(timeout=20)


def test_a_chord_hears_of_a_run_that_is_canceled_while_parked(shared: Shared) -> None:
    module = shared.module
    result = chord([module.add.s(1, 1), module.parked.s()])(module.total.s())
    parked = next(child for child in result.parent if shared.wait_for_name(child.id) == "parked")
    shared.wait_for_status(parked.id, "sleeping")
    parked.revoke()
    with pytest.raises(celery.exceptions.ChordError, match="revoked"):
        result.get(timeout=10, follow_parents=False)


def test_celerys_backend_has_what_the_row_says(shared: Shared) -> None:
    module, backend = shared.module, shared.app.backend
    done = module.add.delay(1, 2)
    assert done.get(timeout=10) == 3
    wait_for(lambda: backend.get_state(done.id) == "SUCCESS", what="the result in Redis")
    assert backend.get_result(done.id) == 3

    failed = module.fails.delay(1)
    with pytest.raises(ValueError, match="no: 1"):
        failed.get(timeout=10)
    wait_for(lambda: backend.get_state(failed.id) == "FAILURE", what="the failure in Redis")

    parked = module.parked.delay()
    wait_for(lambda: backend.get_state(parked.id) == "RETRY", what="the park in Redis")
    parked.revoke()
    wait_for(lambda: backend.get_state(parked.id) == "REVOKED", what="the end in Redis")
    assert parked.state == "REVOKED"


def test_a_result_that_celerys_backend_cannot_store_fails_the_run_and_says_so(
    shared: Shared,
) -> None:
    run = shared.module.unique.apply_async(([1, 1],), link_error=shared.module.errback.s())
    with pytest.raises(PayloadError, match=r"Celery's result backend: .*; return plain"):
        run.get(timeout=10)
    wait_for(lambda: shared.query(TOLD, run.id), what="the end to be confirmed")


def test_a_hook_that_fails_does_not_have_the_end_told_again(shared: Shared) -> None:
    run = shared.module.fails_with_its_hook.delay()
    with pytest.raises(ValueError, match="no"):
        run.get(timeout=10)
    wait_for(lambda: shared.query(TOLD, run.id), what="the end to be confirmed")


def test_a_late_message_does_not_change_what_celerys_backend_says(shared: Shared) -> None:
    module, backend = shared.module, shared.app.backend
    run = module.tracked.delay()
    wait_for(lambda: backend.get_state(run.id) == "FAILURE", what="the failure in Redis")
    assert shared.notes(run.id, "state") == ["STARTED"]
    message = shared.query("SELECT message::text FROM durable.workflow_runs WHERE id = %s", run.id)
    before = shared.worker.logs().count(f"{run.id}] received")
    shared.app.durable.starter.ring(Doorbell(run.id, module.tracked.name, message))
    wait_for(
        lambda: (
            shared.worker.logs().count(f"{run.id}] received") > before
            and all(run.id not in each for each in active(shared))
        ),
        what="the late message to be dealt with",
    )
    assert backend.get_state(run.id) == "FAILURE"


def active(shared: Shared) -> list[str]:
    (requests,) = shared.app.control.inspect(timeout=2, limit=1).active().values()
    return [request["id"] for request in requests]


def test_an_errback_can_be_a_run_of_its_own(shared: Shared) -> None:
    module = shared.module
    before = shared.query(STARTED, module.durable_errback.name)
    run = module.fails.apply_async((1,), link_error=module.durable_errback.s())
    shared.wait_for_note(run.id, "durable_errback")
    assert shared.query(STARTED, module.durable_errback.name) == before + 1


def test_forget_leaves_the_run(shared: Shared) -> None:
    run = shared.module.add.delay(1, 2)
    assert run.get(timeout=10) == 3
    backend = shared.app.backend
    wait_for(lambda: backend.get_state(run.id) == "SUCCESS", what="the result in Redis")
    run.forget()
    assert backend.get_state(run.id) == "PENDING"
    assert run.get(timeout=1) == 3


def test_an_app_result_serves_runs_and_plain_tasks(shared: Shared) -> None:
    module, app = shared.module, shared.app
    run, plain = module.add.delay(1, 2), module.plain_double.delay(4)
    own_id = module.plain_double.apply_async((5,), task_id="an id of my own")
    by_name = app.send_task(module.plain_double.name, (6,))
    assert app.AsyncResult(run.id).get(timeout=10) == 3
    assert app.AsyncResult(plain.id).get(timeout=10) == 8
    assert app.AsyncResult(own_id.id).get(timeout=10) == 10
    assert by_name.get(timeout=10) == 12
    assert app.AsyncResult(plain.id).state == "SUCCESS"
    bad = app.AsyncResult(module.plain_fails.delay().id)
    with pytest.raises(KeyError):
        bad.get(timeout=10)
    assert bad.failed()
    assert "KeyError" in bad.traceback
