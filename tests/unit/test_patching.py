"""``patched``, on a journal in memory: each run keeps the way that it once took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import durable
from durable import run_step
from durable.errors import NotInWorkflow, OptionError
from durable.store.steps import Written
from tests.harness.ledger import Ledger

Body = Callable[[], Any]


def step(name: str) -> str:
    return run_step(name, lambda: name)


def stopping_before(ledger: Ledger, name: str) -> None:
    """Have the worker die before the body of a step."""

    def may_start(execution: Any) -> None:
        if len([row for row in ledger.rows if row.kind == "run"]) == int(name):
            raise execution.suspend("lease missed")

    ledger.may_start = may_start


def old() -> list[str]:
    return [step("load"), step("charge"), step("ship")]


def new() -> list[str]:
    done = [step("load")]
    if durable.patched("check"):
        done.append(step("check"))
    return [*done, step("charge"), step("ship")]


OLD_WAY = ["load", "charge", "ship"]
NEW_WAY = ["load", "check", "charge", "ship"]


@pytest.mark.parametrize(("recorded", "way"), [(0, NEW_WAY), (1, NEW_WAY), (2, OLD_WAY)])
def test_a_run_of_the_old_code_takes_the_new_way_unless_it_is_past_the_place(
    recorded: int, way: list[str]
) -> None:
    ledger = Ledger()
    stopping_before(ledger, str(recorded))
    assert ledger.run(old).stopped == "lease missed"
    ledger.may_start = lambda _: None
    assert [ledger.run(new).value for _ in range(3)] == [way] * 3
    assert [row.name for row in ledger.rows if row.kind == "patch"] == ["check"] * (way is NEW_WAY)


def test_a_new_run_keeps_its_way_wherever_it_is_interrupted() -> None:
    for recorded in range(5):
        ledger = Ledger()
        stopping_before(ledger, str(recorded))
        ledger.run(new)
        ledger.may_start = lambda _: None
        assert ledger.run(new).value == NEW_WAY
        assert [row.ordinal for row in ledger.rows if row.kind == "run"] == [0, 1, 2, 3]


def test_the_call_can_go_when_no_old_run_is_left() -> None:
    def later() -> list[str]:
        return [step(name) for name in NEW_WAY]

    for recorded in range(5):
        ledger = Ledger()
        stopping_before(ledger, str(recorded))
        ledger.run(new)
        ledger.may_start = lambda _: None
        assert ledger.run(later).value == NEW_WAY


def test_back_to_the_old_code_is_noticed_once_the_new_way_was_taken() -> None:
    ledger = Ledger()
    ledger.run(new)
    assert ledger.run(old).stopped == "paused"
    assert ledger.parks[-1].reason.startswith(
        "the history has step 'check' at position 1, the code now asks for 'charge'."
    )


def test_patches_at_one_place_do_not_mind_their_order() -> None:
    def body(*patches: str) -> list[bool]:
        ways = [durable.patched(each) for each in patches]
        step("load")
        return ways

    ledger = Ledger()
    assert ledger.run(lambda: body("a", "b")).value == [True, True]
    assert ledger.run(lambda: body("b", "a", "c")).value == [True, True, False]


def test_a_step_may_have_the_name_of_a_patch() -> None:
    def body() -> tuple[bool, str]:
        return durable.patched("load"), step("load")

    ledger = Ledger()
    assert [ledger.run(body).value for _ in range(2)] == [(True, "load")] * 2


def test_what_is_drawn_around_a_place_does_not_depend_on_it() -> None:
    def without() -> list[float]:
        return [durable.random(), durable.random()]

    def within() -> list[float]:
        first = durable.random()
        durable.patched("a")
        return [first, durable.random()]

    ledger = Ledger()
    assert ledger.run(without).value == ledger.run(within).value == ledger.run(within).value


def test_a_worker_that_lost_the_run_decides_nothing() -> None:
    ledger = Ledger(answers=[Written.FENCED])
    assert ledger.run(lambda: durable.patched("a")).stopped == "fenced"


@pytest.mark.parametrize("name", ["", " ", 1, "a\n", "a" * 256])
def test_no_name_is_refused(name: Any) -> None:
    with pytest.raises(OptionError, match=r"durable\.patched"):
        raise Ledger().run(lambda: durable.patched(name)).error or AssertionError


def test_a_step_is_not_patched() -> None:
    attempt = Ledger().run(lambda: run_step("load", lambda: durable.patched("a")))
    assert isinstance(attempt.error, NotInWorkflow)


def test_a_patch_ahead_is_nothing_to_replay() -> None:
    def body() -> list[bool]:
        step("load")
        durable.patched("a")
        return [durable.is_replaying()]

    ledger = Ledger()
    assert [ledger.run(body).value for _ in range(2)] == [[False]] * 2
