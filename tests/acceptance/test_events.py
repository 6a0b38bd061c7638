"""Events to runs in real workers: consumed once, wherever a process dies."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest

import durable
from durable.errors import OptionError, PayloadError, RunEnded, RunNotFound
from durable.testing.crashes import VARIABLE, CrashBoard, CrashPoint
from tests.acceptance.conftest import Trace
from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS, StartWorker
from tests.harness import every_broker, every_pool, wait_for
from tests.harness.postgres import PostgresServer

APP = "tests.apps.waits"

# As the documentation says.
EVENT = """
INSERT INTO durable.workflow_events (workflow_run_id, namespace_id, event_type, payload)
VALUES (%s, 'default', 'approval', '1')
"""


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("events")
    with running(APP, postgres_server, directory, durable_max_payload_bytes=16_384) as shared:
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


# --- to and fro


def test_an_event_wakes_the_run_that_waits_for_it(shared: Shared) -> None:
    run = shared.module.approves.delay()
    shared.wait_for_status(run.id, "waiting")
    assert run.run().reason == "event approval"
    event_id = run.send_event("approval", {"by": "Ada"})
    assert run.get(timeout=10) == {"by": "Ada"}
    assert [note for note, _ in shared.notes(run.id)] == ["body", "before", "body", "after"]
    [event] = run.events()
    assert (event.id, event.type, event.payload) == (event_id, "approval", '{"by":"Ada"}')
    assert event.consumed_by == "step 1: wait for 'approval'"
    assert event.consumed_at is not None
    assert event.received_at <= event.consumed_at
    consumed = run.steps()[event.ordinal]
    assert (consumed.name, consumed.kind, consumed.output) == ("approval", "event", event.payload)


def test_events_that_come_before_the_run_are_taken_in_order(shared: Shared) -> None:
    run = shared.module.collects.apply_async((3,), countdown=0.2)
    for number in range(4):
        shared.app.durable.send_event(run.id, "item", number)
    run.send_event("other", "of no concern")
    assert run.get(timeout=10) == [0, 1, 2]
    assert [(event.payload, event.ordinal) for event in run.events()] == [
        ("0", 0),
        ("1", 1),
        ("2", 2),
        ("3", None),  # not consumed: kept, and seen
        ('"of no concern"', None),
    ]


def test_the_module_level_verb_sends_too(shared: Shared) -> None:
    run = shared.module.collects.delay(1)
    shared.app.set_current()
    durable.send_event(run.id, "item", 1)
    assert run.get(timeout=10) == [1]


def test_a_timeout_is_the_same_on_every_replay_and_a_late_event_is_for_the_next_wait(
    shared: Shared,
) -> None:
    run = shared.module.times_out.delay(0.2)
    shared.wait_for_note(run.id, "timeout")
    run.send_event("approval", "late")
    first, second = run.get(timeout=10)
    assert first == ["EventTimeout", "approval", shared.notes(run.id, "timeout")[0]]
    assert second == "late"
    replays = shared.notes(run.id, "timeout")
    assert len(replays) >= 2
    assert len(set(replays)) == 1
    assert f"run {run.id} within 0.2" in replays[0]


def test_a_timeout_that_nobody_catches_fails_the_run(shared: Shared) -> None:
    with pytest.raises(durable.EventTimeout, match="no event 'approval' came"):
        shared.module.approves.delay(0).get(timeout=10)


# --- schemas


@pytest.mark.parametrize(
    ("kind", "misfits", "fits", "result"),
    [
        (
            "model",
            [{"granted": "perhaps"}, "yes"],
            {"granted": True},
            "Decision(granted=True, by='nobody')",
        ),
        ("dataclass", [{"height": 1}, []], {"weight": 7}, "Parcel(weight=7)"),
        ("list", ["abc", [1, "x"]], [1, "2"], "[1, 2]"),
        ("function", [{"number": 3}, {}, [], None, "x"], {"number": 4}, "2"),
    ],
)
def test_what_does_not_fit_the_schema_is_put_aside_with_the_reason(
    shared: Shared, kind: str, misfits: list[Any], fits: Any, result: str
) -> None:
    run = shared.module.checks.delay(kind)
    run.send_event("checked", misfits[0])
    shared.wait_for_status(run.id, "waiting")
    for payload in (*misfits[1:], fits):
        run.send_event("checked", payload)
    assert run.get(timeout=10) == result
    values = shared.notes(run.id, "payload")
    assert len(values) >= 2  # once, and in the replays
    assert set(values) == {result}
    *refused, taken = run.events()
    assert all(event.error for event in refused)
    assert [event.consumed_by for event in refused] == [taken.consumed_by] * len(misfits)
    assert (taken.error, taken.ordinal) == (None, 0)
    if kind == "function":
        assert [event.error for event in refused][:2] == ["3 is odd", "KeyError: 'number'"]


@pytest.mark.parametrize("schema", [7, "int", {"type": "object"}])
def test_a_schema_that_cannot_check_is_an_error_at_the_call(shared: Shared, schema: Any) -> None:
    run = shared.module.checks_with.apply_async((schema,), countdown=0.2)
    run.send_event("checked", 1)
    with pytest.raises(OptionError, match=r"schema=.* cannot check a payload"):
        run.get(timeout=10)
    assert run.events()[0].consumed_at is None


# --- from a workflow


def test_what_a_body_sends_is_sent_once_and_what_a_step_sends_is_too(shared: Shared) -> None:
    receiver = shared.module.collects.delay(2)
    sender = shared.module.tells.delay(receiver.id)
    ids = sender.get(timeout=10)
    assert len(shared.notes(sender.id, "body")) >= 2
    assert [step.status for step in sender.steps()][-2:] == ["failed", "succeeded"]
    assert receiver.get(timeout=10) == ["from the body", "attempt 1"]
    assert [event.id for event in receiver.events()] == ids


def test_a_run_can_send_to_itself(shared: Shared) -> None:
    assert shared.module.tells_itself.delay().get(timeout=10) == "mine"


def test_an_event_that_a_body_cannot_send_is_an_error_there(shared: Shared) -> None:
    over = shared.module.quick.delay("over")
    over.get(timeout=10)
    with pytest.raises(RunEnded, match=f"run {over.id} has ended"):
        shared.module.tells.delay(over.id).get(timeout=10)


# --- refused at the door


def test_nothing_is_sent_to_what_is_no_run(shared: Shared) -> None:
    send = shared.app.durable.send_event
    run = shared.module.quick.delay("over")
    run.get(timeout=10)
    with pytest.raises(RunEnded, match=rf"{run.id} has ended \(succeeded\)"):
        run.send_event("approval")
    for unknown in ("o-42", "", 7, None):
        with pytest.raises(RunNotFound, match="is not the id of a run"):
            send(unknown, "approval")
    missing = str(uuid.uuid4())
    with pytest.raises(RunNotFound, match=f"no run {missing} in namespace 'default'"):
        send(missing, "approval")


@pytest.mark.parametrize("spelled", [str.upper, lambda text: f"{{{text}}}", uuid.UUID])
def test_an_id_may_be_spelled_as_uuids_are(shared: Shared, spelled: Any) -> None:
    run = shared.module.collects.delay(1)
    shared.app.durable.send_event(spelled(run.id), "item", 1)
    assert run.get(timeout=10) == [1]


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (object(), "the payload of event 'approval' cannot be stored"),
        (float("nan"), "the payload of event 'approval' cannot be stored"),
        ("a\0b", "the payload of event 'approval' cannot be stored"),
        ("x" * 20_000, "16,?384"),
    ],
)
def test_a_payload_that_cannot_be_stored_is_refused(
    shared: Shared, payload: Any, complaint: str
) -> None:
    run = shared.module.collects.apply_async((1,), countdown=3600)
    with pytest.raises(PayloadError, match=complaint):
        run.send_event("approval", payload)
    assert run.events() == []


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\0b", "x" * 256, None, 7])
def test_a_type_and_a_key_are_names(shared: Shared, name: Any) -> None:
    run = shared.module.collects.apply_async((1,), countdown=3600)
    with pytest.raises(OptionError, match="type of an event is text of 1 to 255"):
        run.send_event(name)
    if name is not None:
        with pytest.raises(OptionError, match=r"idempotency_key=.*give text of 1 to 255"):
            run.send_event("approval", idempotency_key=name)
    assert run.events() == []


# --- without a worker, and with dying ones


class TestKilled:
    @pytest.fixture
    def app_name(self) -> str:
        return APP

    @pytest.fixture
    def app_settings(self, database_url: str, trace: Trace) -> dict[str, Any]:
        return {
            "durable_database_url": database_url,
            "durable_lease": 2.5,
            "durable_ring_interval": 1,
            "durable_poll_interval": 0.5,
            "trace": str(trace.path),
        }

    @every_pool
    def test_an_event_is_accepted_with_no_worker_up(
        self, app_module: ModuleType, start_worker: StartWorker
    ) -> None:
        run, later = app_module.approves.delay(), app_module.approves.delay()
        event_id = run.send_event("approval", 1)
        assert [event.id for event in run.events()] == [event_id]
        start_worker(concurrency=1)
        assert run.get(timeout=20) == 1
        wait_for(lambda: later.run().status == "waiting", what="the run to wait")
        later.send_event("approval", 2)
        assert later.get(timeout=10) == 2

    @every_broker
    def test_an_event_outlives_a_kill_at_the_moments_that_hurt(
        self,
        app_module: ModuleType,
        start_worker: StartWorker,
        trace: Trace,
        tmp_path: Path,
    ) -> None:
        board = CrashBoard(tmp_path / "crashes")
        env = {VARIABLE: str(board.directory)}
        worker = start_worker(concurrency=2, env=env)
        child_dies = {
            "after the claim that wakes it": CrashPoint(
                "child", "sql exec_prepared durable_claim", "after"
            ),
            "before the event is taken": CrashPoint("child", "sql waits._EVENT", "before"),
            "after the event was taken": CrashPoint("child", "sql waits._EVENT", "after"),
            "and the answer is lost": CrashPoint("child", "sql waits._EVENT", "lost"),
        }
        runs = {what: app_module.approves.delay() for what in (*child_dies, "main")}
        wait_for(
            lambda: all(run.run().status == "waiting" for run in runs.values()),
            what="the runs to wait",
        )
        for what, point in child_dies.items():
            run = runs[what]
            board.arm(run.id, point)
            run.send_event("approval", what)
            assert run.get(timeout=20) == what
            assert board.fired(run.id), what

        # Committed, marked as rung, and not rung.
        last = runs["main"]
        board.arm(last.id, CrashPoint("worker", "sql dispatch._DUE", "after"))
        last.send_event("approval", "main")
        wait_for(lambda: board.fired(last.id), what="the worker to die")
        worker.wait_gone()
        start_worker(concurrency=2)
        assert last.get(timeout=20) == "main"

        for run in runs.values():
            assert [event.ordinal for event in run.events()] == [1]
            steps = [(step.name.rpartition(".")[2], step.status) for step in run.steps()]
            done = [("mark", "succeeded"), ("approval", "succeeded"), ("mark", "succeeded")]
            assert steps == done
            for label in ("before", "after"):
                assert (
                    len([line for line in trace.lines() if f'"{run.id}", "{label}"' in line]) == 1
                )

    def test_an_event_written_by_sql_is_found(
        self, app_module: ModuleType, start_worker: StartWorker, database_url: str
    ) -> None:
        run = app_module.approves.delay()
        start_worker(concurrency=1)
        wait_for(lambda: run.run().status == "waiting", what="the run to wait")
        with psycopg.connect(database_url) as conn:
            conn.execute(EVENT, (run.id,))
            conn.execute("SELECT durable.wake(%s)", (run.id,))
        assert run.get(timeout=10) == 1
