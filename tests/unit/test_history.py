"""The recorded steps of a run by their place."""

from __future__ import annotations

import pytest

from durable.errors import NonDeterministicWorkflow
from durable.history import History

FAILED = '{"class": "recoverable", "retry_in": 1.0}'
FINAL = '{"class": "permanent", "final": true}'


def row(ordinal: int, name: str, attempt: int = 1, status: str = "succeeded", **rest: str) -> tuple:  # type: ignore[type-arg]
    context = rest.get("context")
    return (rest.get("branch", ""), ordinal, name, attempt, "run", status, "1", None, context)


def test_attempts_come_oldest_first() -> None:
    rows = [row(0, "charge", 2), row(0, "charge", 1, "failed", context=FAILED)]  # in any order
    history = History(rows)
    assert [each.attempt for each in history.attempts("", 0, "charge")] == [1, 2]


@pytest.mark.parametrize(
    ("status", "context", "settled"),
    [("succeeded", None, True), ("failed", FAILED, False), ("failed", FINAL, True)],
)
def test_a_step_is_settled_by_a_result_or_a_last_error(
    status: str, context: str | None, settled: bool
) -> None:
    rest = {} if context is None else {"context": context}
    [step] = History([row(0, "charge", 1, status, **rest)]).attempts("", 0, "charge")
    assert step.settled is settled


def test_another_name_at_a_place_names_both_and_the_place() -> None:
    with pytest.raises(NonDeterministicWorkflow) as caught:
        History([row(0, "load"), row(1, "charge")]).attempts("", 1, "refund")
    assert str(caught.value) == (
        "the history has step 'charge' at position 1, the code now asks for 'refund'. A workflow"
        " must take the same steps in the same order on every replay: has it changed since the run"
        " started, or does it branch on time, chance or outside state that is not itself a step?"
    )


def test_branches_do_not_see_each_other() -> None:
    history = History([row(0, "left", branch="1"), row(0, "right", branch="2")])
    assert history.attempts("1", 0, "left")
    assert history.attempts("2", 0, "right")
    assert history.attempts("", 0, "other") == ()
    assert not history.covers("", 0)


def test_it_covers_what_lies_ahead() -> None:
    history = History([row(3, "charge")])
    assert [history.covers("", ordinal) for ordinal in (0, 3, 4)] == [True, True, False]


def test_a_branch_that_ends_before_a_recorded_step_is_refused_by_its_name() -> None:
    history = History([("", 0, "load", 1, "run", "succeeded", "7", None, None)])
    history.check_end("", 1)
    with pytest.raises(NonDeterministicWorkflow, match=r"step 'load' at position 0.*ends before"):
        history.check_end("", 0)
