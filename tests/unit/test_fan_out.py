"""``fan_out`` and ``gather``: what they take and refuse, and how they run inline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, chord, group

import durable
from durable import Durable, PermanentError, RecoverableError, Workflow, fan_out, gather, step
from durable._fan_out import Calls, _results
from durable.errors import NotInWorkflow, OptionError
from durable.failures import encode_failure
from durable.items import SIGNATURE, STEP, item_for
from durable.steps import Step, find_step, place_of

calls: list[Any] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


@step(name="unit.fan_out.double")
def double(number: int) -> int:
    calls.append(number)
    if number == 13:
        raise PermanentError("thirteen")
    return 2 * number


@step(name="unit.fan_out.flaky", retry_backoff=3600)
def flaky(number: int) -> int:
    calls.append(number)
    if len(calls) <= 2:
        raise RecoverableError("later")
    return number


@step(name="unit.fan_out.add")
def add(x: int, y: int = 0) -> int:
    return x + y


@step(name="unit.fan_out.power")
def power(x: int, y: int) -> int:
    return x**y


@step(name="unit.fan_out.inner")
def fans_out() -> Any:
    return fan_out(double, [1])


def made_inside() -> Step[Any, Any]:
    @step(name="unit.fan_out.local")
    def local(number: int) -> int:
        return number

    return local


app = Celery("fan_out", broker="memory://", set_as_current=False)
Durable(app)


@app.task(shared=False, base=Workflow, name="unit.call")
def call(function: Callable[[], Any]) -> Any:
    return function()


@app.task(shared=False, base=Workflow, name="unit.child")
def child(number: int) -> str:
    double(number)
    return durable.current().id


@app.task(shared=False, name="unit.plain")
def plain(number: int, more: int = 0) -> int:
    return number + 100 + more


@app.task(shared=False, name="unit.summed")
def summed(numbers: list[int]) -> int:
    return sum(numbers)


def test_inline_the_items_run_one_after_the_other_in_process() -> None:
    assert call(lambda: fan_out(double, iter([3, 1, 2]), max_concurrency=2)) == [6, 2, 4]
    assert calls == [3, 1, 2]
    assert call(lambda: fan_out(double, [])) == []


def test_inline_steps_have_their_retries() -> None:
    assert call(lambda: fan_out(flaky, [5, 6])) == [5, 6]
    assert calls == [5, 5, 5, 6]


def test_inline_a_workflow_is_a_run_of_its_own() -> None:
    def body() -> list[str]:
        return [durable.current().id, *fan_out(child, [1, 2])]

    assert len(set(call(body))) == 3


def test_inline_everything_that_celery_starts_is_gathered() -> None:
    def body() -> list[Any]:
        members = group(plain.s(3), plain.s(4))
        return gather(add.s(1, y=2), plain.s(2), members, chain(plain.s(1), plain.s(more=1)))

    assert call(body) == [3, 102, [103, 104], 202]


def test_inline_in_eager_mode_a_chain_and_a_chord_are_gathered_too() -> None:
    def body() -> list[Any]:
        parts = chord([plain.s(1), plain.s(2)], summed.s())
        return gather(chain(plain.s(1), plain.s(more=1)), parts)

    assert call.apply((body,)).get() == [202, 203]


def test_the_item_comes_before_the_arguments_of_a_signature() -> None:
    assert call(lambda: fan_out(plain.s(1000), [1, 2])) == [1101, 1102]
    assert call(lambda: fan_out(power.s(y=3), [1, 2])) == [1, 8]
    assert call(lambda: fan_out(power.s(2), [3, 4])) == [9, 16]


def test_things_that_cannot_be_iterated_over_are_refused() -> None:
    with pytest.raises(OptionError, match=r"'unit.fan_out.double'.*must be iterable.*not 5"):
        call(lambda: fan_out(double, 5))  # type: ignore[call-overload]


def test_an_item_erased_since_is_raised_unless_failures_are_asked_for() -> None:
    """A restarted parent reads the outcome of its fan-out again."""
    error = json.loads(
        encode_failure(PermanentError("gone"), app.durable.codec, trusted_packages=())
    )
    about = {"item": 1, "run": "r", "task": "t", "outcome": "failed", "reason": None}
    stored = json.dumps([{"about": about, "error": error}])
    outcome = SimpleNamespace(status="succeeded", output="[2, null]", error=stored)
    calls = Calls("fan_out", "double", [1, 2], lambda thing: item_for(double, thing))
    with pytest.raises(PermanentError, match="gone"):
        _results(app.durable.services, calls, outcome, False)
    two, gone = _results(app.durable.services, calls, outcome, True)
    assert (two, type(gone)) == (2, PermanentError)


def test_inline_the_first_failure_is_raised_with_a_note() -> None:
    with pytest.raises(PermanentError, match="thirteen") as caught:
        call(lambda: fan_out(double, [1, 13, 2]))
    assert calls == [1, 13]
    assert caught.value.__notes__[-1] == ("durable.fan_out(): item 1 of 3, unit.fan_out.double(13)")


def test_inline_failures_are_returned_if_asked_for() -> None:
    one, error, two = call(lambda: fan_out(double, [1, 13, 2], return_exceptions=True))
    assert (one, two) == (2, 4)
    assert isinstance(error, PermanentError)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "2"])
def test_a_limit_is_a_number_of_items(limit: Any) -> None:
    with pytest.raises(OptionError, match="give a number of items from 1 on"):
        call(lambda: fan_out(double, [1], max_concurrency=limit))


@pytest.mark.parametrize("given", [len, "unit.plain", None, lambda number: number])
def test_only_what_a_worker_can_find_is_taken(given: Any) -> None:
    with pytest.raises(OptionError, match=r"fan_out\(\) takes a step"):
        call(lambda: fan_out(given, [1]))


def test_a_step_that_another_worker_could_not_find_is_refused_at_the_call() -> None:
    local = made_inside()
    for body in (lambda: fan_out(local, [1]), lambda: gather(local.s(1))):
        with pytest.raises(OptionError, match=r"defined inside a function: move it to the top"):
            call(body)


def test_a_step_is_found_by_name_also_in_a_module_that_only_a_body_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_orders.py").write_text(
        "import durable\n@durable.step\ndef charge(n):\n    return n\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = find_step("late_orders.charge", "late_orders:charge")
    assert found is not None
    assert place_of(found) == "late_orders:charge"
    assert find_step("unit.fan_out.unknown", "no_such_module:charge") is None


def test_what_is_no_signature_is_refused_with_what_to_write() -> None:
    with pytest.raises(OptionError, match=r"write unit\.fan_out\.double\.s\(\.\.\.\)"):
        call(lambda: gather(double))
    with pytest.raises(OptionError, match="takes signatures"):
        call(lambda: gather(3))  # type: ignore[arg-type]


def test_outside_a_body_they_are_refused() -> None:
    with pytest.raises(NotInWorkflow, match=r"durable\.fan_out\(\) needs a run"):
        fan_out(double, [1])
    with pytest.raises(NotInWorkflow, match=r"durable\.gather\(\) needs a run"):
        gather(double.s(1))
    with pytest.raises(NotInWorkflow, match="belongs in the body of a workflow"):
        call(fans_out)


def test_a_step_signature_keeps_its_arguments() -> None:
    signature = add.s(1, y=2)
    assert (signature.step, signature.args, signature.kwargs) == (add, (1,), {"y": 2})
    with pytest.raises(AttributeError):
        signature.args = ()  # type: ignore[misc]


def test_every_app_has_the_runs_around_items() -> None:
    assert {STEP, SIGNATURE} <= app.tasks.keys()
    assert all(isinstance(app.tasks[name], Workflow) for name in (STEP, SIGNATURE))
