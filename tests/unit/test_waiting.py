from __future__ import annotations

import pytest

from tests.harness import wait_for


def test_it_returns_what_came_true() -> None:
    answers = iter([None, 0, "", "here"])
    assert wait_for(lambda: next(answers)) == "here"


def test_its_failure_says_what_was_awaited_and_the_last_answer() -> None:
    with pytest.raises(AssertionError, match=r"waited 0 s for: the parcel \(last answer: \[\]\)"):
        wait_for(list, timeout=0, what="the parcel")


def test_an_error_of_the_condition_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        wait_for(lambda: 1 / 0)
