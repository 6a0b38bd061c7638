"""Celery's calls and options on durable tasks, as the user knows them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import celery.exceptions
import pytest

from durable.errors import OptionError, StepError, UnsupportedByDurable
from durable.result import DurableResult
from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS
from tests.harness import wait_for
from tests.harness.postgres import PostgresServer


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("options")
    with running("tests.apps.options", postgres_server, directory, worker=None) as shared:
        queues = [f"{shared.queue}{suffix}" for suffix in ("", ".own", ".routed")]
        args = ("--without-mingle", "--without-gossip", "--task-events")
        shared.start_worker(queues=queues, concurrency=4, args=args)
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


# --- calls -----------------------------------------------------------------


def test_every_call_of_celery_starts_a_run(shared: Shared) -> None:
    total, app = shared.module.total, shared.app
    results = [
        total.delay([1, 2]),
        total.apply_async(([1, 2],)),
        total.apply_async(kwargs={"numbers": [1, 2]}),
        total.s([1, 2]).delay(),
        total.si([1, 2]).apply_async(),
        total.signature(kwargs={"numbers": [1, 2]}).delay(),
        app.signature(total.name, args=([1, 2],)).delay(),
        app.send_task(total.name, args=([1, 2],)),
        app.send_task(total.name, kwargs={"numbers": [1, 2]}),
    ]
    assert [type(result) for result in results] == [DurableResult] * len(results)
    assert [result.get(timeout=10) for result in results] == [3] * len(results)
    assert {result.run().status for result in results} == {"succeeded"}
    assert [step.name for step in results[0].steps()] == ["tests.apps.options.add"] * 2


def test_celery_call_starts_a_run(shared: Shared) -> None:
    run_id = shared.celery("call", shared.module.total.name, "--args", "[[2, 3]]")
    assert shared.app.AsyncResult(run_id).get(timeout=10) == 5


def test_a_process_that_does_not_know_the_task_starts_a_run_by_its_name(shared: Shared) -> None:
    sent = shared.python(
        "import json, os\n"
        "from celery import Celery\n"
        "settings = json.loads(os.environ['DURABLE_TEST_SETTINGS'])\n"
        "app = Celery(broker=settings['broker_url'])\n"
        "keys = 'broker_transport_options', 'task_default_queue'\n"
        "app.conf.update({key: settings[key] for key in keys})\n"
        "send = lambda **options: print(app.send_task('custom.name', [1], {'k': 2},"
        " headers={'tenant': 'other', 'trace': 'abc'}, **options).id)\n"
        "send()\n"
        "send(countdown=0.2)\n"
        "print(app.send_task('tests.apps.options.total', [], {'wrong': 1}).id)\n"
    ).split()
    for run_id in sent[:2]:
        seen = DurableResult(run_id, app=shared.app).get(timeout=10)
        assert (seen["args"], seen["kwargs"]) == ([1], {"k": 2})
        assert (seen["tenant"], seen["headers"]["trace"]) == ("other", "abc")
    assert shared.status(sent[2]) is None
    assert f"{sent[2]} for tests.apps.options.total is refused" in shared.worker.logs()


def test_a_direct_call_and_a_call_in_another_workflow_are_plain_calls(shared: Shared) -> None:
    run = shared.module.parent.delay([1, 2])
    assert run.get(timeout=10) == ["3", "2"]
    assert len(run.steps()) == 3
    assert shared.module.total([1, 2, 3]) == 6
    assert shared.module.parent([1, 2]) == ["3", "2"]


def test_a_plain_task_beside_durable_ones_is_celerys_alone(shared: Shared) -> None:
    result = shared.module.plain.delay(1)
    assert not isinstance(result, DurableResult)
    assert shared.query("SELECT count(*) FROM durable.workflow_runs WHERE id = %s", result.id) == 0
    retried = shared.module.plain_retries.delay()
    shared.wait_for_note(retried.id, "on_retry")
    shared.wait_for_note(retried.id, "on_success")


# --- what the body sees ----------------------------------------------------


def test_the_body_and_the_projects_task_class_see_the_request(shared: Shared) -> None:
    introspect = shared.module.introspect
    run = introspect.apply_async((1, "a"), {"k": [2]}, priority=7, headers={"x-trace": "t"})
    assert run.get(timeout=10) == {
        "name": "custom.name",
        "made_by_project": True,
        "id": run.id,
        "args": [1, "a"],
        "kwargs": {"k": [2]},
        "retries": 0,
        "root_id": run.id,
        "parent_id": None,
        "group": None,
        "hostname": shared.worker.hostname(),
        "queue": shared.queue,
        "priority": 7,
        "tenant": "acme",
        "headers": {"tenant": "acme", "x-trace": "t"},
        "stamps": {},
        "directly": False,
        "eager": False,
    }
    assert shared.notes(run.id, "project __call__") == [[[1, "a"], {"k": [2]}]]


def test_a_parked_run_comes_back_with_everything_it_was_sent_with(shared: Shared) -> None:
    run = shared.module.parked_once.s()
    run.stamp(customer="c-1")
    result = run.apply_async(priority=3, headers={"x-trace": "t"}, shadow="other-name")
    seen = result.get(timeout=10)
    assert seen["retries"] == 1
    assert seen["priority"] == 3
    assert seen["headers"] == {"tenant": "acme", "x-trace": "t"}
    assert seen["stamps"] == {"customer": "c-1"}
    assert seen["root_id"] == result.id


def test_queues_of_the_call_the_task_and_the_routes(shared: Shared) -> None:
    module, queue = shared.module, shared.queue
    assert module.own_queue.delay().get(timeout=10) == f"{queue}.own"
    assert shared.app.send_task(module.own_queue.name).get(timeout=10) == f"{queue}.own"
    assert module.own_queue.apply_async(queue=queue).get(timeout=10) == queue
    assert module.routed.delay().get(timeout=10) == f"{queue}.routed"
    assert module.routed.apply_async(queue=queue).get(timeout=10) == queue


def test_pydantic_models_go_in_and_out(shared: Shared) -> None:
    order, model = shared.module.order, shared.module.models.Order
    assert order.delay({"sku": "a", "count": 2}).get(timeout=10) == {"total": 20}
    assert order.delay(model(sku="a", count=3)).get(timeout=10) == {"total": 30}
    bad = order.delay({"sku": "a"})
    with pytest.raises(Exception, match="count"):
        bad.get(timeout=10)


def test_shared_task_and_workflow_decorator(shared: Shared) -> None:
    module = "tests.apps.shared_tasks"
    worker = shared.start_worker(
        args=("--without-mingle", "--without-gossip", "-I", module),
        queues=[f"{shared.queue}.shared"],
        concurrency=1,
    )
    out = shared.python(
        f"from tests.apps.options import app; from {module} import greet, part\n"
        f"queue = {shared.queue + '.shared'!r}\n"
        "print(greet.apply_async(('you',), queue=queue).get(timeout=10))\n"
        "print(part.apply_async(('x',), queue=queue).get(timeout=10))\n"
        "print(greet('me'))\n"
    )
    assert out.splitlines() == ["hello you", "shared: x True", "hello me"]
    assert worker.stop() == 0


# --- time ------------------------------------------------------------------


def test_no_message_waits_in_a_worker_for_a_countdown_or_an_eta(shared: Shared) -> None:
    total = shared.module.total
    soon = total.apply_async(([1],), countdown=0.3)
    then = total.apply_async(
        ([2],), eta=datetime.now(timezone.utc) + timedelta(seconds=0.3), priority=1
    )
    past = total.apply_async(([3],), eta=datetime.now(timezone.utc) - timedelta(days=1))
    later = total.apply_async(([4],), countdown=3600)
    assert later.state == "PENDING"
    assert [soon.get(timeout=2), then.get(timeout=2), past.get(timeout=1)] == [1, 2, 3]
    row = soon.run()
    assert row.started_at is not None
    assert row.started_at - row.created_at >= timedelta(seconds=0.3)
    scheduled = shared.app.control.inspect(timeout=1, limit=1).scheduled()
    assert scheduled == {shared.worker.hostname(): []}
    assert later.run().status == "sleeping"
    later.revoke()
    assert later.state == "REVOKED"


def test_expiry_counts_until_the_first_claim(shared: Shared) -> None:
    total = shared.module.total
    late = total.apply_async(([1],), countdown=0.5, expires=0.2)
    with pytest.raises(celery.exceptions.TaskRevokedError, match="expired"):
        late.get(timeout=10)

    woken = shared.module.retries.apply_async(("countdown",), expires=0.15)
    assert woken.get(timeout=10) == 2
    in_an_hour = datetime.now(timezone.utc) + timedelta(hours=1)
    assert total.apply_async(([1],), expires=in_an_hour).get(timeout=10) == 1


def test_a_rate_limit_is_kept(shared: Shared) -> None:
    results = [shared.module.limited.delay() for _ in range(4)]
    for result in results:
        result.get(timeout=10)
    started = sorted(result.run().started_at for result in results)
    assert started[-1] - started[0] > timedelta(seconds=0.9)


def test_a_hard_time_limit_fails_the_run(shared: Shared) -> None:
    module = shared.module
    run = module.too_long.apply_async(link_error=module.errback_with_error.s())
    with pytest.raises(celery.exceptions.TimeLimitExceeded):
        run.get(timeout=10)
    name, _, args = shared.wait_for_note(run.id, "errback")
    assert (name, args) == ("TimeLimitExceeded", [])
    assert run.run().attempt <= 3  # claimed, ended from outside, told

    bare = module.too_long.delay()
    with pytest.raises(celery.exceptions.TimeLimitExceeded):
        bare.get(timeout=10)
    shared.wait_for_note(bare.id, "on_failure")
    assert module.total.delay([5]).get(timeout=10) == 5


@pytest.mark.parametrize("where", ["body", "step"])
def test_a_soft_time_limit_can_be_caught(shared: Shared, where: str) -> None:
    assert shared.module.softly_limited.delay(where).get(timeout=10) == f"caught in the {where}"


def test_a_time_limit_of_the_call_goes_before_the_tasks(shared: Shared) -> None:
    run = shared.module.softly_limited.apply_async(("step",), soft_time_limit=0.2)
    assert run.get(timeout=0.9) == "caught in the step"
    hard = shared.module.gated.apply_async(("/does/not/exist",), time_limit=0.5)
    with pytest.raises(celery.exceptions.TimeLimitExceeded):
        hard.get(timeout=5)


# --- results and failures --------------------------------------------------


def test_an_ignored_result_is_not_encoded(shared: Shared) -> None:
    module = shared.module
    run = module.ignored.delay()
    assert run.get() is None
    shared.wait_for_status(run.id, "succeeded")
    assert run.run().output is None
    asked = module.total.apply_async(([1],), ignore_result=True)
    shared.wait_for_status(asked.id, "succeeded")
    assert asked.run().output is None


def test_an_ignored_result_still_goes_to_what_follows(shared: Shared) -> None:
    module = shared.module
    run = module.total.apply_async(([1, 2],), ignore_result=True, link=module.introspect.s())
    shared.wait_for_status(run.id, "succeeded")
    assert run.run().output == "3"


def test_expected_exceptions_are_logged_quietly(shared: Shared) -> None:
    run = shared.module.throws_expected.delay()
    with pytest.raises(KeyError, match="expected"):
        run.get(timeout=10)

    def logged(*words: str) -> list[str]:
        lines = shared.worker.logs().splitlines()
        return [line for line in lines if run.id in line and all(word in line for word in words)]

    wait_for(lambda: logged("INFO", "raised expected"), what="the line in the log")
    assert not logged("ERROR")


def test_a_late_ack_survives_the_death_of_its_process(shared: Shared, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = shared.module.acked_late.delay(str(go))
    shared.wait_for_note(run.id, "waits")
    pid = shared.query("SELECT child_pid FROM durable.workflow_runs WHERE id = %s", run.id)
    shared.worker.kill_child(pid)
    wait_for(lambda: len(shared.notes(run.id, "waits")) == 2, what="the run to go on")
    go.touch()
    assert run.get(timeout=10) is True
    assert not shared.notes(run.id, "task_failure")


def test_a_state_of_its_own_is_seen_without_a_result_backend(
    shared: Shared, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = shared.module.reports.delay(str(go))
    shared.wait_for_note(run.id, "reported")
    assert (run.state, run.info) == ("COOKING", {"done": 1, "of": 3})
    assert not run.ready()
    go.touch()
    assert run.get(timeout=10) == "served"
    assert run.state == "SUCCESS"


# --- retries ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["countdown", "eta", "throw=False", "raw", "raw eta", "swallowed"])
def test_self_retry_parks_and_counts(shared: Shared, how: str) -> None:
    run = shared.module.retries.delay(how)
    assert run.get(timeout=10) == 2
    assert shared.notes(run.id, "attempt") == [0, 1, 2]
    assert len(run.steps()) == 1
    assert run.run().retries == 2


def test_retries_end_at_their_limit_with_the_given_error(shared: Shared) -> None:
    retries = shared.module.retries
    run = retries.delay("limit")
    with pytest.raises(ValueError, match="enough"):
        run.get(timeout=10)
    assert shared.notes(run.id, "attempt") == [0, 1]
    bare = retries.delay("bare limit")
    with pytest.raises(celery.exceptions.MaxRetriesExceededError, match="0 retries"):
        bare.get(timeout=10)


def test_a_raw_retry_counts_too(shared: Shared) -> None:
    run = shared.module.retries.delay("raw without end")
    with pytest.raises(celery.exceptions.MaxRetriesExceededError, match="3 retries"):
        run.get(timeout=10)
    assert shared.notes(run.id, "attempt") == [0, 1, 2, 3]


def test_a_stray_exception_that_is_no_exception_fails_the_run_once(shared: Shared) -> None:
    run = shared.module.retries.delay("stray")
    with pytest.raises(RuntimeError, match=r"raised CancelledError\(\), which is no Exception"):
        run.get(timeout=10)
    assert shared.notes(run.id, "attempt") == [0]


@pytest.mark.parametrize(
    ("how", "text"), [("args", "cannot change the run's arguments"), ("options", "queue")]
)
def test_a_retry_that_would_change_the_run_is_refused(shared: Shared, how: str, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        shared.module.retries.delay(how).get(timeout=10)


def test_autoretry_repeats_the_failed_step_and_keeps_the_others(shared: Shared) -> None:
    run = shared.module.autoretried.delay(1)
    assert run.get(timeout=10) == 1
    assert shared.notes(run.id, "step") == [0, 1]
    assert shared.notes(run.id, "on_retry") == [["Hiccup", [1], {}]]
    gave_up = shared.module.autoretried.delay(5)
    with pytest.raises((shared.module.Hiccup, StepError), match="retry 1"):
        gave_up.get(timeout=10)
    assert shared.notes(gave_up.id, "step") == [0, 1]


@pytest.mark.parametrize("how", ["transient", "recoverable"])
def test_the_retry_classes_count_in_the_body_too(shared: Shared, how: str) -> None:
    assert shared.module.raises.delay(how).get(timeout=10) == 1


# --- control flow ----------------------------------------------------------


def test_ignore_ends_the_run_without_a_result(shared: Shared) -> None:
    run = shared.module.raises.delay("ignore")
    shared.wait_for_status(run.id, "succeeded")
    assert run.get(timeout=5) is None
    assert run.run().reason == "ignored"
    assert not shared.notes(run.id, "on_success")


def test_reject_ends_the_run_as_failed(shared: Shared) -> None:
    module = shared.module
    run = module.raises.apply_async(("reject",), link_error=module.errback_with_error.s())
    with pytest.raises(celery.exceptions.Reject, match="no good"):
        run.get(timeout=10)
    assert shared.wait_for_note(run.id, "errback")[0] == "Reject"
    told = "SELECT available_at = 'infinity' FROM durable.workflow_runs WHERE id = %s"
    wait_for(lambda: shared.query(told, run.id), what="the end to be confirmed")


def test_reject_with_requeue_puts_the_run_back(shared: Shared) -> None:
    run = shared.module.raises.delay("requeue")
    assert run.get(timeout=10) == "taken at last"


@pytest.mark.parametrize("how", ["replace", "add_to_chord"])
def test_what_has_no_meaning_for_a_run_is_refused(shared: Shared, how: str) -> None:
    with pytest.raises(UnsupportedByDurable, match=rf"self\.{how}\(\)"):
        shared.module.raises.delay(how).get(timeout=10)


# --- revoke ----------------------------------------------------------------


def revoked_ids(shared: Shared) -> Any:
    (answer,) = shared.app.control.inspect(timeout=2, limit=1).revoked().values()
    return answer


def test_a_parked_run_can_be_revoked(shared: Shared) -> None:
    run = shared.module.parked.delay()
    shared.wait_for_status(run.id, "sleeping")
    assert run.state == "RETRY"
    run.revoke()
    assert run.state == "REVOKED"
    with pytest.raises(celery.exceptions.TaskRevokedError, match="revoked"):
        run.get(timeout=1)
    assert revoked_ids(shared) == []


def test_a_queued_run_can_be_revoked(shared: Shared) -> None:
    run = shared.module.total.apply_async(([1],), queue=f"{shared.queue}.nobody")
    assert run.state == "PENDING"
    run.revoke()
    assert run.state == "REVOKED"
    assert run.run().started_at is None
    assert revoked_ids(shared) == []


def test_celery_control_revoke_reaches_a_parked_run(shared: Shared) -> None:
    run = shared.module.parked.delay()
    shared.wait_for_status(run.id, "sleeping")
    here = ("--timeout", "5", "--destination", shared.worker.hostname())
    out = shared.celery("control", *here, "revoke", run.id)
    assert "canceled" in out
    assert run.state == "REVOKED"
    assert revoked_ids(shared) == []


def test_a_running_run_ends_at_its_next_step(shared: Shared, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = shared.module.gated.delay(str(go))
    shared.wait_for_note(run.id, "gate")
    run.revoke()
    go.touch()
    with pytest.raises(celery.exceptions.TaskRevokedError):
        run.get(timeout=10)
    assert [(step.name, step.status) for step in run.steps()] == [
        ("tests.apps.options.gate", "succeeded")
    ]


def test_a_running_run_can_be_terminated(shared: Shared) -> None:
    run = shared.module.gated.delay("/does/not/exist")
    shared.wait_for_note(run.id, "gate")
    run.revoke(terminate=True, signal="SIGKILL")
    with pytest.raises(celery.exceptions.TaskRevokedError):
        run.get(timeout=10)
    assert len(shared.notes(run.id, "gate")) == 1
    assert revoked_ids(shared) == []


def test_runs_can_be_revoked_by_a_stamped_header(shared: Shared) -> None:
    run = shared.module.total.s([1])
    run.stamp(batch="b-1")
    shared.app.control.revoke_by_stamped_headers({"batch": ["b-1"]}, reply=True, timeout=2, limit=1)
    result = run.apply_async()
    with pytest.raises(celery.exceptions.TaskRevokedError):
        result.get(timeout=10)
    assert result.run().status == "canceled"


# --- lost processes --------------------------------------------------------


def test_a_lost_process_is_no_failure_while_the_run_can_go_on(shared: Shared) -> None:
    module = shared.module
    run = module.suicide.apply_async((1,), link_error=module.errback_with_error.s())
    assert run.get(timeout=15) == 2
    assert not shared.notes(run.id, "task_failure")
    assert not shared.notes(run.id, "errback")


# --- watching --------------------------------------------------------------


def test_inspect_shows_what_runs_with_its_arguments(shared: Shared, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = shared.module.gated.delay(str(go))
    shared.wait_for_note(run.id, "gate")
    (active,) = shared.app.control.inspect(timeout=2, limit=1).active().values()
    (mine,) = [request for request in active if request["id"] == run.id]
    assert mine["name"] == shared.module.gated.name
    assert str(go) in str(mine["args"])
    here = ("--timeout", "5", "--destination", shared.worker.hostname())
    assert run.id in shared.celery("inspect", *here, "active")
    assert "pong" in shared.celery("inspect", *here, "ping")
    go.touch()
    assert run.get(timeout=10) == "through"


def test_events_tell_of_a_park_as_a_retry(shared: Shared) -> None:
    seen: list[dict[str, Any]] = []
    listening = threading.Event()
    connection = shared.app.connection_for_read()
    receiver = shared.app.events.Receiver(connection, handlers={"*": seen.append})
    receiver.on_consume_ready = lambda *_, **__: listening.set()
    listener = threading.Thread(target=receiver.capture, kwargs={"limit": None})
    listener.start()
    try:
        assert listening.wait(5)
        wait_for(lambda: seen, what="a heartbeat")  # Redis is asked for events a moment later
        run = shared.module.retries.delay("countdown")
        assert run.get(timeout=10) == 2

        def types() -> list[str]:
            return [event["type"] for event in seen if event.get("uuid") == run.id]

        wait_for(lambda: "task-succeeded" in types(), what="the event of the end")
    finally:
        receiver.should_stop = True
        listener.join()
        connection.close()
    told = [each for each in types() if each in {"task-started", "task-retried", "task-succeeded"}]
    assert told == [*["task-started", "task-retried"] * 2, "task-started", "task-succeeded"]
    received = next(event for event in seen if event["type"] == "task-received")
    assert received["args"] == "('countdown',)"
    assert {event["hostname"] for event in seen if event["type"] == "task-retried"} == {
        shared.worker.hostname()
    }


# --- refused calls ---------------------------------------------------------


def test_a_task_id_that_is_no_uuid_is_refused(shared: Shared) -> None:
    with pytest.raises(OptionError, match=r"uuid\.uuid5"):
        shared.module.total.apply_async(([1],), task_id="order-42")


def test_arguments_that_do_not_fit_are_refused_by_name_too(shared: Shared) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        shared.module.total.delay(wrong=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        shared.app.send_task(shared.module.total.name, kwargs={"wrong": 1})
