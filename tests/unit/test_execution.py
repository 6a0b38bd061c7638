"""What a run promises, shown on a journal in memory: first run, retries, replay, stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

import durable
from durable import PermanentError, RecoverableError, TransientError, run_step
from durable.errors import (
    NonDeterministicWorkflow,
    NotInWorkflow,
    PayloadError,
    StepError,
    StoreError,
    Suspend,
)
from durable.execution import Execution
from durable.journal import Parking
from durable.retry import RetryPolicy
from durable.steps import Step
from durable.store.steps import Written
from tests.harness.ledger import Ledger


@dataclass(frozen=True)
class Receipt:
    number: int


class Declined(Exception):
    """Of a module that is trusted."""


@dataclass(frozen=True)
class Immutable(Exception):
    code: int


class Shop:
    """Steps that count how often their bodies ran."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def step(self, name: str, body: Callable[..., Any] = lambda: None, **options: Any) -> Any:
        def function(*args: Any) -> Any:
            self.ran[name] += 1
            return body(*args)

        return Step(function, name, RetryPolicy.from_options(**options))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def shop() -> Shop:
    return Shop()


def failing(*errors: Exception) -> Callable[..., str]:
    """A body that raises these one after the other and then returns."""
    left = list(errors)

    def body(*args: Any) -> str:
        if left:
            raise left.pop(0)
        return "done"

    return body


# --- values and exceptions


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ((1, 2), [1, 2]),
        ({"b": 1, "a": 1e16}, {"b": 1, "a": 1e16}),
        (Decimal("9.90"), Decimal("9.90")),
        (Receipt(7), Receipt(7)),
        (None, None),
    ],
)
def test_a_value_is_the_same_on_the_first_run_and_on_replay(
    ledger: Ledger, shop: Shop, value: object, seen: object
) -> None:
    charge = shop.step("charge", lambda: value)
    first, again = ledger.run(charge).value, ledger.run(charge).value
    assert first == again == seen
    assert type(first) is type(again) is type(seen)
    assert repr(first) == repr(again)
    assert shop.ran["charge"] == 1


def test_what_a_step_gives_out_is_not_the_object_that_its_body_returned(
    ledger: Ledger, shop: Shop
) -> None:
    kept: list[int] = []
    load = shop.step("load", lambda: kept)
    ledger.run(load).value.append(1)
    assert kept == []
    assert ledger.run(load).value == []


@pytest.mark.parametrize(
    ("error", "seen"), [(Declined("no funds", 3), Declined), (KeyError("sku"), KeyError)]
)
def test_an_exception_is_the_same_on_the_first_run_and_on_replay(
    ledger: Ledger, shop: Shop, error: Exception, seen: type[Exception]
) -> None:
    charge = shop.step("charge", failing(error), dont_autoretry_for=(Exception,))
    first, again = ledger.run(charge).error, ledger.run(charge).error
    assert type(first) is type(again) is seen
    assert first is not None
    assert again is not None
    assert first.args == again.args == error.args
    assert shop.ran["charge"] == 1


def test_an_exception_that_is_not_rebuilt_stands_in_both_times(ledger: Ledger, shop: Shop) -> None:
    class Local(Exception):
        pass

    charge = shop.step("charge", failing(Local("no")), dont_autoretry_for=(Exception,))
    first, again = ledger.run(charge).error, ledger.run(charge).error
    assert type(first) is type(again) is StepError
    assert str(first) == str(again)


def test_an_exception_that_takes_no_attributes_is_itself_all_the_same(
    ledger: Ledger, shop: Shop
) -> None:
    charge = shop.step("charge", failing(Immutable(402)), dont_autoretry_for=(Exception,))

    def body() -> int:
        try:
            return int(charge())
        except Immutable as exc:
            return exc.code

    assert [ledger.run(body).value for _ in range(2)] == [402, 402]


def test_a_failure_that_the_body_catches_is_caught_on_replay_too(
    ledger: Ledger, shop: Shop
) -> None:
    charge = shop.step("charge", failing(Declined("no")), dont_autoretry_for=(Exception,))
    refund = shop.step("refund", lambda: "refunded")

    def body() -> Any:
        try:
            return charge()
        except Declined:
            return refund()

    assert [ledger.run(body).value for _ in range(3)] == ["refunded"] * 3
    assert shop.ran == {"charge": 1, "refund": 1}


def test_only_what_was_not_recorded_runs_again(ledger: Ledger, shop: Shop) -> None:
    steps = [shop.step(f"s{n}", lambda n=n: n) for n in range(4)]

    def crash() -> None:
        raise KeyboardInterrupt

    def two_then_crash() -> None:
        steps[0]()
        steps[1]()
        crash()

    with pytest.raises(KeyboardInterrupt):
        ledger.run(two_then_crash)
    assert ledger.run(lambda: [step() for step in steps]).value == [0, 1, 2, 3]
    assert set(shop.ran.values()) == {1}


def test_two_calls_of_one_step_are_two_places(ledger: Ledger, shop: Shop) -> None:
    add = shop.step("add", lambda a, b: a + b)
    assert [ledger.run(lambda: [add(1, 2), add(3, 4)]).value for _ in range(2)] == [[3, 7]] * 2
    assert shop.ran["add"] == 2


# --- writes that fail


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (Exception,), "max_retries": None}])
def test_a_failed_write_is_no_failure_of_the_step(
    ledger: Ledger, shop: Shop, options: dict[str, Any]
) -> None:
    ledger.answers = [StoreError("Postgres refused a statement")]
    charge = shop.step("charge", **options)

    def body() -> str:
        try:
            charge()
        except Exception:  # noqa: BLE001 - what users write
            return "swallowed"
        return "went on"

    attempt = ledger.run(body)
    suspension = attempt.execution.suspension
    assert suspension is not None
    assert (suspension.reason, type(suspension.cause)) == ("unstorable", StoreError)
    assert attempt.value is None
    assert shop.ran["charge"] == 1
    assert ledger.rows == []
    assert ledger.parks == []


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("options", [{}, {"autoretry_for": (Exception,)}])
def test_a_result_that_cannot_be_stored_fails_the_step_for_good(
    ledger: Ledger, shop: Shop, options: dict[str, Any], session: bool
) -> None:
    def body() -> object:
        if session:
            durable.session()
        return {"total": float("nan")}

    charge = shop.step("charge", body, **options)
    for _ in range(2):
        error = ledger.run(charge).error
        assert isinstance(error, PayloadError)
        assert "the result of step 'charge' cannot be stored: $.total: nan" in str(error)
    assert shop.ran["charge"] == 1
    assert ledger.names() == [("charge", 1, "failed")]
    assert all(each.rolled_back for each in ledger.transactions)


# --- retries


def test_a_recoverable_error_parks_and_the_next_claim_tries_again(
    ledger: Ledger, shop: Shop
) -> None:
    charge = shop.step("charge", failing(RecoverableError("busy")), retry_backoff=4)
    first = ledger.run(charge)
    assert first.stopped == "retry"
    [park] = ledger.parks
    assert (park.status, park.retry) == ("sleeping", False)
    assert park.delay is not None
    assert 0 < park.delay <= 4
    assert ledger.run(charge).value == "done"
    assert ledger.names() == [("charge", 1, "failed"), ("charge", 2, "succeeded")]


def test_a_transient_error_is_tried_again_at_once_each_attempt_recorded(
    ledger: Ledger, shop: Shop
) -> None:
    charge = shop.step("charge", failing(TransientError("a"), TransientError("b")))
    assert ledger.run(charge).value == "done"
    assert [name[1:] for name in ledger.names()] == [(1, "failed"), (2, "failed"), (3, "succeeded")]
    assert len(ledger.time.slept) == 2
    assert all(0 < pause < 1 for pause in ledger.time.slept)
    assert ledger.parks == []


def test_a_budget_is_the_steps_own_and_comes_from_the_history(ledger: Ledger, shop: Shop) -> None:
    errors = [RecoverableError(str(n)) for n in range(10)]
    charge = shop.step("charge", failing(*errors), max_retries=2)
    claims = [ledger.run(charge) for _ in range(3)]
    assert [claim.stopped for claim in claims] == ["retry", "retry", None]
    assert isinstance(claims[2].error, RecoverableError)
    assert str(claims[2].error) == "2"
    assert isinstance(ledger.run(charge).error, RecoverableError)  # settled: no fourth attempt
    assert shop.ran["charge"] == 3


def test_claims_that_fail_no_attempt_use_up_nothing(ledger: Ledger, shop: Shop) -> None:
    charge = shop.step("charge", failing(RecoverableError("busy")), max_retries=1)

    def crash_before() -> None:
        raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            ledger.run(crash_before)
    assert ledger.run(charge).stopped == "retry"
    assert ledger.run(charge).value == "done"


def test_the_budget_of_one_step_is_not_that_of_the_next(ledger: Ledger, shop: Shop) -> None:
    one = shop.step("one", failing(RecoverableError("x")), max_retries=1)
    two = shop.step("two", failing(RecoverableError("y")), max_retries=1)

    def body() -> list[str]:
        return [one(), two()]

    assert [ledger.run(body).stopped for _ in range(2)] == ["retry", "retry"]
    assert ledger.run(body).value == ["done", "done"]


def test_a_permanent_error_is_raised_at_once_as_itself(ledger: Ledger, shop: Shop) -> None:
    charge = shop.step("charge", failing(PermanentError("card is gone")))
    error = ledger.run(charge).error
    assert isinstance(error, PermanentError)
    assert isinstance(error.__cause__, PermanentError)
    assert shop.ran["charge"] == 1


# --- stops are sticky


def swallowing(step: Callable[[], Any], after: Callable[[], Any]) -> Callable[[], Any]:
    def body() -> Any:
        with suppress(BaseException):  # what a user's bare except does
            step()
        return after()

    return body


def in_finally(step: Callable[[], Any], after: Callable[[], Any]) -> Callable[[], Any]:
    def body() -> Any:
        try:
            step()
        finally:
            after()

    return body


@pytest.mark.parametrize("in_the_way", [swallowing, in_finally])
def test_a_stop_that_user_code_swallows_is_raised_again_by_the_next_verb(
    ledger: Ledger, shop: Shop, in_the_way: Any
) -> None:
    charge = shop.step("charge", failing(RecoverableError("busy")))
    refund = shop.step("refund")
    attempt = ledger.run(in_the_way(charge, refund))
    assert attempt.stopped == "retry"
    assert shop.ran["refund"] == 0


def test_the_mark_counts_even_if_no_verb_follows(ledger: Ledger, shop: Shop) -> None:
    charge = shop.step("charge", failing(RecoverableError("busy")))
    attempt = ledger.run(swallowing(charge, lambda: "all is well"))
    assert (attempt.value, attempt.stopped) == ("all is well", "retry")


@pytest.mark.parametrize(
    "verb",
    [
        durable.now,
        durable.uuid4,
        durable.random,
        lambda: durable.set_progress(1),
        lambda: run_step("x", len, ()),
    ],
)
def test_every_verb_refuses_to_go_on_after_a_stop(
    ledger: Ledger, shop: Shop, verb: Callable[[], Any]
) -> None:
    charge = shop.step("charge", failing(RecoverableError("busy")))
    reached = []

    def after() -> None:
        try:
            verb()
        except Suspend:
            reached.append("stopped")
            raise

    ledger.run(swallowing(charge, after))
    assert reached == ["stopped"]


# --- the run is lost, or is to end


def test_a_fenced_worker_stops_at_its_write(ledger: Ledger, shop: Shop) -> None:
    one, two = shop.step("one"), shop.step("two")
    ledger.answers = [Written.FENCED]
    assert ledger.run(lambda: (one(), two())).stopped == "fenced"
    assert shop.ran == {"one": 1}


def test_a_fenced_worker_that_wants_to_park_is_not_told_that_the_run_waits(
    ledger: Ledger, shop: Shop
) -> None:
    ledger.parking = Parking.FENCED
    charge = shop.step("charge", failing(RecoverableError("busy")))
    assert ledger.run(charge).stopped == "fenced"


def test_a_run_that_was_asked_to_stop_keeps_its_step_and_starts_no_other(
    ledger: Ledger, shop: Shop
) -> None:
    one, two = shop.step("one"), shop.step("two")
    ledger.answers = [Written.CANCEL]
    assert ledger.run(lambda: (one(), two())).stopped == "cancel"
    assert ledger.names() == [("one", 1, "succeeded")]
    assert shop.ran == {"one": 1}


def test_a_stop_at_the_last_step_counts_at_the_end_of_the_body(ledger: Ledger, shop: Shop) -> None:
    ledger.answers = [Written.CANCEL]
    attempt = ledger.run(shop.step("one", lambda: 1))
    assert (attempt.value, attempt.stopped) == (1, "cancel")


def test_no_body_starts_without_the_journals_leave(ledger: Ledger, shop: Shop) -> None:
    def refuse(execution: Execution) -> None:
        raise execution.suspend("lease missed")

    ledger.may_start = refuse
    one = shop.step("one")
    assert ledger.run(one).stopped == "lease missed"
    assert ledger.run(durable.now).stopped == "lease missed"
    assert shop.ran == {}


def test_what_is_recorded_is_replayed_without_leave(ledger: Ledger, shop: Shop) -> None:
    one = shop.step("one", lambda: 1)
    ledger.run(one)

    def refuse(execution: Execution) -> None:
        raise execution.suspend("lease missed")

    ledger.may_start = refuse
    assert ledger.run(one).value == 1


# --- changed code


def test_another_step_than_the_recorded_one_pauses_the_run_and_names_both(
    ledger: Ledger, shop: Shop
) -> None:
    load, charge = shop.step("load"), shop.step("charge")
    ledger.run(load)
    attempt = ledger.run(charge)
    assert attempt.stopped == "paused"
    [park] = ledger.parks
    assert park.status == "paused"
    assert park.reason.startswith(
        "the history has step 'load' at position 0, the code now asks for 'charge'. A workflow must"
    )
    assert isinstance(attempt.execution.suspension, object)
    assert ledger.names() == [("load", 1, "succeeded")]
    assert shop.ran == {"load": 1}


def test_the_error_reaches_celerys_hooks_as_the_cause(ledger: Ledger, shop: Shop) -> None:
    ledger.run(shop.step("load"))
    suspension = ledger.run(shop.step("charge")).execution.suspension
    assert suspension is not None
    assert isinstance(suspension.cause, NonDeterministicWorkflow)


def test_a_draw_that_a_new_version_adds_moves_no_step(ledger: Ledger, shop: Shop) -> None:
    # It took a place of its own: the step behind it was not found, and ran again.
    one, two = shop.step("one"), shop.step("two")
    ledger.run(lambda: (one(), two()))
    ledger.run(lambda: (one(), durable.uuid4(), two()))
    assert shop.ran == {"one": 1, "two": 1}


# --- verbs that are remembered


def test_chance_and_time_are_the_same_on_replay(ledger: Ledger, shop: Shop) -> None:
    one = shop.step("one")

    def body() -> list[object]:
        values: list[object] = [durable.uuid4(), durable.uuid4(), durable.random()]
        one()
        return [*values, durable.uuid4(), durable.random(), durable.now()]

    first, again = ledger.run(body).value, ledger.run(body).value
    assert first == again
    assert len({str(value) for value in first}) == len(first)
    assert first[0].version == 4
    assert isinstance(first[-1], datetime)
    assert first[-1].tzinfo is not None


def test_chance_differs_between_runs() -> None:
    assert Ledger().run(durable.random).value != Ledger().run(durable.random).value


def test_in_a_step_the_time_is_read_and_chance_is_refused(ledger: Ledger, shop: Shop) -> None:
    moment = shop.step("moment", durable.now)
    assert isinstance(ledger.run(moment).value, datetime)
    dice = shop.step("dice", durable.uuid4)
    error = Ledger().run(dice).error
    assert isinstance(error, NotInWorkflow)
    assert str(error) == (
        "durable.uuid4() and durable.random() belong in the body of a workflow; in a step use the"
        " standard library: the step's result is recorded anyway"
    )


def test_an_idempotency_key_is_the_same_on_every_attempt_and_no_others(
    ledger: Ledger, shop: Shop
) -> None:
    keys: list[str] = []
    errors = [RecoverableError("x"), TransientError("y")]

    def body() -> None:
        keys.append(durable.idempotency_key())
        if errors:
            raise errors.pop(0)

    charge, refund = shop.step("charge", body), shop.step("refund", body)

    def workflow() -> None:
        charge()
        refund()
        charge()

    ledger.run(workflow)
    ledger.run(workflow)
    assert len(keys) == 5
    assert len(set(keys)) == 3
    assert keys[0] == keys[1] == keys[2]
    Ledger().run(workflow)
    assert len(set(keys)) == 6


def test_progress_goes_through_the_codec(ledger: Ledger) -> None:
    ledger.run(lambda: durable.set_progress(3, 10, file="a.csv"))
    assert ledger.progress == [
        '{"state":"PROGRESS","meta":{"current":3,"total":10,"file":"a.csv"}}'
    ]
    assert isinstance(ledger.run(lambda: durable.set_progress(float("nan"))).error, PayloadError)


def test_is_replaying_until_the_last_recorded_step(ledger: Ledger, shop: Shop) -> None:
    one, two = shop.step("one"), shop.step("two")
    seen: list[bool] = []

    def body() -> None:
        for step in (one, two):
            seen.append(durable.is_replaying())
            step()
        seen.append(durable.is_replaying())

    ledger.run(body)
    ledger.run(body)
    assert seen == [False, False, False, True, True, False]
    assert durable.is_replaying() is False


def test_current_tells_the_place(ledger: Ledger, shop: Shop) -> None:
    where = shop.step("where", lambda: (durable.current().step, durable.current().step_attempt))
    assert ledger.run(where).value == ["where", 1]
    current = ledger.run(durable.current).value
    assert (current.id, current.workflow, current.attempt, current.step) == (
        ledger.id,
        "shop.order",
        2,
        None,
    )


# --- nesting


def test_a_step_in_a_step_is_a_plain_call(ledger: Ledger, shop: Shop) -> None:
    inner = shop.step("inner", lambda: (1, 2))
    outer = shop.step("outer", inner)
    assert ledger.run(outer).value == [1, 2]
    assert ledger.names() == [("outer", 1, "succeeded")]
    kept = shop.step("kept", lambda: type(inner()).__name__)
    assert Ledger().run(kept).value == "tuple"  # nothing of it went through the codec


def test_run_step_in_a_step_is_a_plain_call(ledger: Ledger, shop: Shop) -> None:
    outer = shop.step("outer", lambda: run_step("inner", sorted, [2, 1]))
    assert ledger.run(outer).value == [1, 2]
    assert ledger.names() == [("outer", 1, "succeeded")]


def test_run_step_is_remembered_under_its_name(ledger: Ledger) -> None:
    calls: list[int] = []

    def body() -> None:
        run_step("note", calls.append, 1)

    ledger.run(body)
    ledger.run(body)
    assert calls == [1]
    assert ledger.names() == [("note", 1, "succeeded")]


# --- sessions


def test_a_session_is_committed_with_the_step(ledger: Ledger, shop: Shop) -> None:
    reserve = shop.step("reserve", lambda: durable.session() is durable.session())
    assert ledger.run(reserve).value is True
    assert len(ledger.transactions) == 1
    assert ledger.names() == [("reserve", 1, "succeeded")]


def test_a_session_of_a_failed_body_is_rolled_back(ledger: Ledger, shop: Shop) -> None:
    def body() -> None:
        durable.session()
        raise RecoverableError("busy")

    ledger.run(shop.step("reserve", body))
    assert [each.rolled_back for each in ledger.transactions] == [1]


def test_a_constraint_that_fails_at_the_commit_is_the_steps_failure(
    ledger: Ledger, shop: Shop
) -> None:
    ledger.commits = [RecoverableError("serialization")]
    reserve = shop.step("reserve", lambda: durable.session() and None)
    assert ledger.run(reserve).stopped == "retry"
    assert ledger.names() == [("reserve", 1, "failed")]


@pytest.mark.parametrize("committed", [True, False])
def test_a_lost_answer_to_a_commit_is_looked_into(
    ledger: Ledger, shop: Shop, committed: bool
) -> None:
    ledger.commits, ledger.was_committed = [None], committed
    reserve = shop.step("reserve", lambda: durable.session() and None)
    attempt = ledger.run(reserve)
    assert (attempt.error, attempt.stopped) == (None, None)
    assert shop.ran["reserve"] == (1 if committed else 2)
    assert ledger.names() == ([] if committed else [("reserve", 1, "succeeded")])


def test_a_fenced_session_stops_the_run(ledger: Ledger, shop: Shop) -> None:
    ledger.commits = [Written.FENCED]
    reserve = shop.step("reserve", lambda: durable.session() and None)
    assert ledger.run(reserve).stopped == "fenced"
