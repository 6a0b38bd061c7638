"""Tasks that the body of a workflow starts, and what it hears of them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS
from tests.harness import wait_for
from tests.harness.postgres import PostgresServer

RESULTS = (
    "SELECT count(*) FROM durable.step_attempts WHERE workflow_run_id = %s AND kind = 'result'"
)


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("children")
    with running("tests.apps.children", postgres_server, directory, backend=True) as shared:
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


def script(shared: Shared, name: str, *args: Any, timeout: float = 30) -> Any:
    """Run a script in a body; JSON of what it returned."""
    return shared.module.runs_script.delay(name, *args).get(timeout=timeout)


# --- started once


def test_whatever_is_started_in_a_body_is_started_once(shared: Shared) -> None:
    run = shared.module.starts_everything.delay()
    seen = run.get(timeout=60)
    passes = shared.notes(run.id, "seen")
    assert len(passes) > 5
    for each in passes:
        assert each == {way: seen[way] for way in each}, "another id on replay"
    ids = [each for way in seen.values() for each in way]
    assert len(ids) == len(set(ids))
    quiet(shared)
    executions = {each: len(shared.notes(each, "ran")) for each in ids}
    ours = {each for each in ids if shared.notes(each)}
    assert {each for each in ours if executions[each] != 1} == set()
    assert len(ours) > 40
    callbacks = [parent for parent, _ in shared.notes(run.id, "called_back")]
    errors = [*seen["link_error"], *seen["plain link_error"]]
    assert sorted(callbacks) == sorted([*seen["durable link"], *seen["plain link"], *errors])


def test_options_reach_what_a_body_starts(shared: Shared) -> None:
    seen = shared.module.starts_everything.delay().get(timeout=60)
    quiet(shared)
    [headers] = shared.notes(seen["durable headers"][0], "ran")
    assert headers == {"mine": 1}
    [[headers, _, _]] = shared.notes(seen["plain headers"][0], "ran")
    assert headers["mine"] == 1
    [[_, stamps, _]] = shared.notes(seen["plain stamped"][0], "ran")
    assert stamps == {"maker": "the body"}
    [[_, _, priority]] = shared.notes(seen["plain priority"][0], "ran")
    assert priority == 3


def quiet(shared: Shared) -> None:
    """Wait until the worker has nothing left to do."""
    open_runs = "SELECT count(*) FROM durable.workflow_runs WHERE completed_at IS NULL"

    def over() -> bool:
        (requests,) = shared.app.control.inspect(timeout=2, limit=1).active().values()
        (reserved,) = shared.app.control.inspect(timeout=2, limit=1).reserved().values()
        (scheduled,) = shared.app.control.inspect(timeout=2, limit=1).scheduled().values()
        return not (requests or reserved or scheduled or shared.query(open_runs))

    wait_for(over, what="the worker to be idle", timeout=30)


def test_each_outcome_comes_to_the_body(shared: Shared) -> None:
    run = shared.module.waits_for_everything.delay()
    values = run.get(timeout=90)
    for way, value in values.items():
        expected = EXPECTED.get(way, EXPECTED.get(way.partition(" ")[2], 3))
        assert (way, value) == (way, expected)


EXPECTED: dict[str, Any] = {
    "ignored": None,
    "chunks": [[4], [6]],
    "link_error": ["ValueError", "a child's error"],
    "plain link_error": ["KeyError", '"a plain task\'s error"'],
    "group": [2, 4],
    "generated group": [0, 2],
    "group with a countdown": [2, 4],
    "stamped group": [2, 4],
    "group of the ignored": [None, None],
    "chain": 6,
    "chain by name": 4,
    "chord": 6,
    "chord of its own body": 2,
    "chain of groups": [4, 4],
    "chain to a chord": 14,
    "nested": [2, 2, 4],
    "map": [2, 4],
    "starmap": [3, 7],
    "empty group": [],
}


def test_a_signature_can_be_started_again_and_is_not_changed(shared: Shared) -> None:
    (first, second), values = script(shared, "used again")
    assert values == [[2, 8]] * 2
    assert not set(first) & set(second)
    members = shared.module.REUSED.tasks
    assert "headers" not in str([dict(each) for each in members])
    assert "task_id" not in str([dict(each) for each in members])


def test_a_step_that_is_repeated_starts_the_same_tasks_again(shared: Shared) -> None:
    run = shared.module.runs_script.delay("starts in step")
    ids = run.get(timeout=30)
    attempts = shared.notes(None, "in step")  # type: ignore[arg-type]
    assert attempts == [ids, ids]
    quiet(shared)
    started = shared.query(
        "SELECT count(*) FROM durable.workflow_runs WHERE id::text = ANY(%s)", ids
    )
    assert started == 4  # add, total, a member of the group, one of the header
    plain = [each for each in ids if len(shared.notes(each, "ran")) == 2]
    assert len(plain) == 1, "a plain member of the group is sent by each attempt"


# --- failures


@pytest.mark.parametrize(
    ("script_args", "expected"),
    [
        (("outcome", "fails"), ["ValueError", "a child's error"]),
        (("outcome", "plain_fails"), ["KeyError", '"a plain task\'s error"']),
        (("outcome", "too_late"), ["DeadlineExceeded", "the run did not end before its deadline"]),
        (("outcome", "hangs"), ["TimeLimitExceeded", "TimeLimitExceeded(1,)"]),
        (("outcome", "plain_retries"), 2),
        (("outcome", "plain_ignores"), None),
        (("outcome", "plain_rejects"), ["Reject", "('not for me', False)"]),
        (("outcome", "plain_dies_once"), "alive"),
        (("outcome", "dies_once", 7), 7),
        (("outcome", "slow_add", 1, 2), 3),
        (("outcome", "plain_replaced", "durable"), 3),
        (("outcome", "plain_replaced", "plain"), 3),
        (("outcome", "plain_replaced", "chain"), 3),
        (("outcome", "plain_replaced", "group"), [3, 7]),
        (("waiting for an expired one",), ["TaskRevokedError", "expired"]),
        (("times out",), ["timeout", "timeout", 3]),
        (("gets in step", "allowed"), 2),
        (("outcome", "plain_gets", "allowed"), 2),
    ],
)
def test_how_a_child_ended_is_told(shared: Shared, script_args: Any, expected: Any) -> None:
    assert script(shared, *script_args) == expected


@pytest.mark.parametrize(
    ("script_args", "error", "text"),
    [
        (("outcome", "plain_unstorable"), "PayloadError", "the result of task .*plain_unstorable"),
        (("outcome", "plain_dies"), "WorkerLostError", "SIGKILL"),
        (("outcome", "plain_hangs"), "TimeLimitExceeded", "1"),
        (("unknown",), "NotRegistered", "nobody_has_this"),
        (("bad argument", "durable"), "PayloadError", "object"),
        (("bad argument", "plain"), "StepError", "EncodeError: .*not JSON serializable"),
        (("gets in step", "refused"), "RuntimeError", "Never call result.get"),
        (("outcome", "plain_gets", "refused"), None, "Never call result.get"),
    ],
)
def test_what_went_wrong_is_told(
    shared: Shared, script_args: Any, error: str | None, text: str
) -> None:
    name, message = script(shared, *script_args)
    assert error is None or re.fullmatch(error, name), (name, message)
    assert re.search(text, message), (name, message)


def test_a_child_that_is_canceled_is_told_of(shared: Shared) -> None:
    run = shared.module.runs_script.delay("waiting for", "waits")
    child = shared.wait_for_note(run.id, "child")
    shared.wait_for_status(child, "waiting")
    shared.app.AsyncResult(child).cancel("not needed")
    assert run.get(timeout=20) == ["TaskRevokedError", "not needed"]


def test_a_plain_task_that_is_revoked_is_told_of(shared: Shared) -> None:
    run = shared.module.runs_script.delay("waiting for a revoked one")
    child = shared.wait_for_note(run.id, "child")
    shared.app.control.revoke(child)
    assert run.get(timeout=20) == ["TaskRevokedError", "revoked"]


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("durable", ["ValueError", "a child's error"]),
        ("plain", ["KeyError", '"a plain task\'s error"']),
    ],
)
def test_a_chain_fails_for_whoever_waits_for_its_end(
    shared: Shared, how: str, error: list[str]
) -> None:
    assert script(shared, "broken chain", how) == [error, error, error, 2]


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("durable", ["ValueError", "a child's error"]),
        ("plain", ["KeyError", '"a plain task\'s error"']),
    ],
)
def test_a_chord_fails_for_whoever_waits_for_its_body(
    shared: Shared, how: str, error: list[str]
) -> None:
    from_header, of_chord, first = script(shared, "broken chord", how)
    assert from_header == error
    assert of_chord[0] == "ChordError"
    assert error[0] in of_chord[1]
    assert first == 2


def test_a_group_fails_with_its_first_member_that_fails(shared: Shared) -> None:
    caught, first, *others = script(shared, "broken group")
    assert caught == ["KeyError", '"a plain task\'s error"']
    assert first == 2
    assert others == [caught, ["TaskRevokedError", "revoked"]]


def test_any_sort_of_handle_parks(shared: Shared) -> None:
    run = shared.module.runs_script.delay("sets")
    joined, again, native, called, pairs, *single = run.get(timeout=30)
    assert joined == again == [2, [6, 8], 4]
    assert native == [2, 4]
    assert called == []
    assert pairs == [2, 4]
    assert single == [4, 4, 2]


def test_a_run_that_somebody_else_has_started_is_not_waited_for_in_vain(shared: Shared) -> None:
    theirs = shared.module.add.apply_async((5, 5), task_id=str(uuid.uuid4()))
    task_id, (name, text) = script(shared, "of others", theirs.id)
    assert task_id == theirs.id
    assert name == "UnsupportedByDurable"
    assert "started" in text


def test_a_chord_in_a_body_counts_members_that_sleep_and_are_killed(shared: Shared) -> None:
    value, ids = script(shared, "chord of the unsteady")
    assert value == 10
    body = ids[-1]
    assert len(shared.notes(body, "ran")) == 1


def test_waiting_costs_what_the_documentation_says(shared: Shared) -> None:
    """A chain that is waited for at its end wakes the run once; each task is one row."""
    run = shared.module.runs_script.delay("get", "slow_add", 1, 2)
    assert run.get(timeout=20) == 3
    assert len(shared.notes(run.id, "pass")) == 2
    assert shared.query(RESULTS, run.id) == 1
