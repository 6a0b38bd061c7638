"""Heartbeats and steps that may run at most once, on a journal in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import durable
from durable import PermanentError, RecoverableError, TransientError
from durable.errors import NotInWorkflow, OptionError, PayloadError
from durable.retry import RetryPolicy
from durable.steps import Step
from durable.store.steps import Written
from tests.harness.ledger import Ledger


class Killed(BaseException):
    """The process dies."""


def a_step(body: Callable[..., Any], name: str = "load", **options: Any) -> Any:
    once = options.pop("at_most_once", False)
    return Step(body, name, RetryPolicy.from_options(**options), at_most_once=once)


def crash(ledger: Ledger, body: Callable[[], Any]) -> None:
    with pytest.raises(Killed):
        ledger.run(body)


def test_an_attempt_that_was_cut_off_goes_on_with_what_it_reported() -> None:
    ledger, seen = Ledger(), []

    def body() -> int:
        where = durable.current()
        seen.append((where.step_attempt, durable.heartbeat_details()))
        begin = durable.heartbeat_details() or 0
        for number in range(begin, begin + 2):
            durable.heartbeat(number + 1)
        if len(seen) < 3:
            raise Killed
        durable.heartbeat()
        return begin

    step = a_step(body)
    crash(ledger, step)
    crash(ledger, step)
    assert ledger.names() == [("load", 1, "running")]
    assert ledger.run(step).value == 4
    assert seen == [(1, None), (1, 2), (1, 4)], "the same attempt, which uses up no retry"
    assert ledger.names() == [("load", 1, "succeeded")]
    assert ledger.run(step).value == 4


def test_a_failed_attempt_hands_its_details_over_to_the_next_one() -> None:
    ledger, seen = Ledger(), []

    def body() -> str:
        seen.append(durable.heartbeat_details())
        if len(seen) < 3:
            durable.heartbeat({"rows": len(seen)})
        if len(seen) == 1:
            raise TransientError("tried again here")
        if len(seen) == 2:
            raise RecoverableError("the run parks")
        return "done"

    step = a_step(body)
    assert ledger.run(step).stopped == "retry"
    assert ledger.run(step).value == "done"
    assert seen == [None, {"rows": 1}, {"rows": 2}]
    assert [row[1:] for row in ledger.names()] == [(1, "failed"), (2, "failed"), (3, "succeeded")]


def test_crashes_of_a_step_that_reports_use_up_no_retries() -> None:
    ledger, tries = Ledger(), []

    def body() -> None:
        tries.append(1)
        durable.heartbeat(len(tries))
        if len(tries) % 2:
            raise Killed
        raise RecoverableError("fails")

    step = a_step(body, max_retries=1)
    crash(ledger, step)
    assert ledger.run(step).stopped == "retry"
    crash(ledger, step)
    assert str(ledger.run(step).error) == "fails"
    assert len(tries) == 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(Written.FENCED, "fenced"), (Written.CANCEL, "cancel"), (Written.PAUSE, "pause")],
)
def test_a_step_is_left_at_the_heartbeat_when_the_run_is_to_stop(
    answer: Written, reason: str
) -> None:
    ledger, after = Ledger(answers=[answer]), []

    def body() -> None:
        try:
            durable.heartbeat(1)
        except BaseException:  # noqa: BLE001 - it comes again at the next one
            durable.heartbeat(2)
        after.append(1)

    attempt = ledger.run(a_step(body))
    assert (attempt.stopped, attempt.value, after) == (reason, None, [])
    assert [row.status for row in ledger.rows] == ([] if reason == "fenced" else ["running"])


def test_heartbeats_belong_in_steps_and_take_what_can_be_stored() -> None:
    ledger = Ledger()
    for verb in (durable.heartbeat, durable.heartbeat_details):
        with pytest.raises(NotInWorkflow):
            verb()
        assert isinstance(ledger.run(verb).error, NotInWorkflow)
    error = ledger.run(a_step(lambda: durable.heartbeat(object()))).error
    assert isinstance(error, PayloadError)
    assert "the heartbeat details of step 'load'" in str(error)


# --- at most once


def test_a_step_that_was_cut_off_is_not_run_again_and_the_reason_says_what_to_do() -> None:
    ledger, ran = Ledger(), []

    def body() -> None:
        ran.append(1)
        raise Killed

    step = a_step(body, "charge", at_most_once=True)
    crash(ledger, step)
    assert ledger.names() == [("charge", 1, "running")]
    for _ in range(2):
        assert ledger.run(step).stopped == "paused"
    assert ran == [1]
    assert ledger.parks[0].status == "paused"
    for word in ("'charge'", "not known", "result.settle('charge', value, ordinal=0)", "restart("):
        assert word in ledger.parks[0].reason


def test_its_result_is_remembered_like_any_other() -> None:
    ledger, ran = Ledger(), []
    step = a_step(lambda: ran.append(1) or 7, "charge", at_most_once=True)
    assert [ledger.run(step).value for _ in range(2)] == [7, 7]
    assert ran == [1]


@pytest.mark.parametrize("error", [TransientError("a"), RecoverableError("b"), PermanentError("c")])
def test_its_error_is_final(error: Exception) -> None:
    ledger, ran = Ledger(), []

    def body() -> None:
        ran.append(1)
        raise error

    step = a_step(body, "charge", at_most_once=True)
    for _ in range(2):
        assert str(ledger.run(step).error) == str(error)
    assert ran == [1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(Written.FENCED, "fenced"), (Written.CANCEL, "cancel"), (Written.PAUSE, "pause")],
)
def test_it_is_not_begun_by_a_run_that_is_to_stop(answer: Written, reason: str) -> None:
    ledger, ran = Ledger(answers=[answer]), []
    step = a_step(lambda: ran.append(1), "charge", at_most_once=True)
    assert ledger.run(step).stopped == reason
    assert (ran, ledger.rows) == ([], [])


def test_once_begun_it_is_left_to_end_whatever_its_heartbeats_hear() -> None:
    ledger = Ledger(answers=[Written.RECORDED, Written.PAUSE, Written.PAUSE, Written.PAUSE])

    def body() -> int:
        durable.heartbeat(1)
        durable.heartbeat(2)
        return 3

    attempt = ledger.run(a_step(body, "charge", at_most_once=True))
    assert (attempt.value, attempt.stopped) == (3, "pause")
    assert ledger.names() == [("charge", 1, "succeeded")]


def test_a_commit_of_its_session_that_came_to_nothing_is_not_repeated() -> None:
    ledger, ran = Ledger(commits=[None]), []

    def body() -> None:
        ran.append(1)
        durable.session()

    assert ledger.run(a_step(body, "charge", at_most_once=True)).stopped == "paused"
    assert ran == [1]


def test_options_of_a_second_attempt_are_refused() -> None:
    with pytest.raises(OptionError, match="leave out max_retries, retry_backoff"):
        durable.step(at_most_once=True, max_retries=1, retry_backoff=2)(lambda: None)
    with pytest.raises(OptionError, match="at_most_once"):
        durable.step(name="unit.word", at_most_once="yes")(lambda: None)
    made = durable.step(name="unit.once", at_most_once=True, timeout="1s")(lambda: None)
    assert (made.at_most_once, made.timeout) == (True, 1.0)
