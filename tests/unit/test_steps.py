"""``@step`` and ``run_step``: what they take, and what they refuse at import."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from celery import Celery

from durable import Workflow, run_step, step, steps
from durable.errors import NotInWorkflow, OptionError
from durable.steps import Step
from tests.harness.ledger import Ledger


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step names of this test alone."""
    monkeypatch.setattr(steps, "_registered", {})


def load(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("orders", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def charge(order_id: str, cents: int = 0) -> str:
    """Charge the card."""
    return f"{order_id}/{cents}"


def test_outside_a_run_it_is_the_plain_function() -> None:
    decorated = step(max_retries=5)(charge)
    assert decorated("o-42", cents=3) == "o-42/3"
    assert decorated.__doc__ == "Charge the card."
    assert decorated.policy.max_retries == 5
    assert repr(decorated) == f"<step {__name__}.charge>"


def test_the_defaults_are_celerys_and_stated() -> None:
    policy = step(charge).policy
    assert (policy.max_retries, policy.retry_backoff, policy.retry_backoff_max) == (3, 1, 600.0)
    assert (policy.retry_jitter, policy.transient_tries) == (True, 3)


def test_two_functions_under_one_name_are_refused_at_import_with_both_places(
    tmp_path: Path,
) -> None:
    path = tmp_path / "orders.py"
    path.write_text(
        "from durable import step\n"
        "@step\n"
        "def charge(): ...\n"
        "@step(name='orders.charge')\n"
        "def collect(): ...\n"
    )
    with pytest.raises(OptionError) as caught:
        load(path)
    assert str(caught.value) == (
        f"two functions are steps under the name 'orders.charge': one at {path}:2, one at"
        f" {path}:4. Give one of them another name with @step(name=...)"
    )


def test_a_module_that_is_imported_again_is_no_second_function(tmp_path: Path) -> None:
    path = tmp_path / "orders.py"
    path.write_text("from durable import step\n@step\ndef charge(): ...\n")
    load(path)
    load(path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_retrys": 5}, "Did you mean 'max_retries'?"),
        ({"retry_kwargs": {}}, "Give its entries as options of their own: max_retries=5."),
        ({"countdown": 3}, "Give retry_backoff (seconds before the first retry, then doubled)."),
        ({"colour": "red"}, "There are: "),
        ({"max_retries": -1}, "max_retries=-1: give a whole number from 0, or None."),
        ({"max_retries": "3"}, "max_retries='3': give a whole number from 0, or None."),
        ({"retry_backoff": 0.0000001}, "retry_backoff=1e-07: give seconds from 0.001, True for 1"),
        ({"retry_backoff_max": "90x"}, "retry_backoff_max='90x' is not a duration. Give a"),
        ({"retry_backoff_max": -1}, "retry_backoff_max=-1 is negative."),
        (
            {"retry_backoff_max": "99999999d"},
            "retry_backoff_max='99999999d' is longer than a hundred years.",
        ),
        ({"retry_jitter": "yes"}, "retry_jitter='yes': give True or False."),
        ({"autoretry_for": ("ValueError",)}, "give exception classes; 'ValueError' is none."),
        ({"classify": "transient"}, "give a function of the exception, or None."),
    ],
)
def test_a_wrong_option_is_refused_with_its_name_and_the_fix(
    options: dict[str, object], text: str
) -> None:
    with pytest.raises(OptionError) as caught:
        step(**options)(charge)  # type: ignore[arg-type]
    assert text in str(caught.value)
    assert all(name in str(caught.value) for name in options)


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "line\nbreak", "x" * 256, 7])
def test_a_name_that_cannot_be_stored_is_refused_before_anything_runs(name: object) -> None:
    text = "takes a name of 1 to 255 printable characters, not "
    with pytest.raises(OptionError, match=r"@step\(name=...\) " + text):
        step(name=name)(charge)  # type: ignore[arg-type]
    ran: list[int] = []
    error = Ledger().run(lambda: run_step(name, ran.append, 1)).error  # type: ignore[arg-type]
    assert isinstance(error, OptionError)
    assert f"run_step(name, function) {text}" in str(error)
    assert ran == []


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(OptionError, match="@step goes on a function, not on 'charge'; options are"):
        step("charge")  # type: ignore[call-overload]
    error = Ledger().run(lambda: run_step("charge", 7)).error  # type: ignore[arg-type]
    assert str(error) == ("run_step('charge', ...) takes a function as its second argument, not 7")


def test_a_forgotten_name_is_told() -> None:
    error = Ledger().run(lambda: run_step(charge, "o-42")).error  # type: ignore[arg-type]
    assert "run_step(name, function) takes a name" in str(error)


def test_run_step_outside_a_run_says_where_it_belongs() -> None:
    with pytest.raises(NotInWorkflow) as caught:
        run_step("charge", charge, "o-42")
    assert str(caught.value) == (
        "durable.run_step() needs a run: call it in a workflow (a task made with @workflow or"
        " base=durable.Workflow), or in a step that a workflow calls"
    )


async def fetch() -> None: ...


async def stream() -> AsyncIterator[int]:
    yield 1


def lines() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (stream, "does not take the generator function 'stream': make it return a list"),
        (lines, "does not take the generator function 'lines': make it return a list"),
    ],
)
def test_a_function_whose_call_runs_nothing_is_refused(
    function: Callable[..., object], text: str
) -> None:
    with pytest.raises(OptionError, match=f"@step {re.escape(text)}"):
        step(function)
    with pytest.raises(OptionError, match=f"@step {re.escape(text)}"):
        step(name="named")(function)
    error = Ledger().run(lambda: run_step("named", function)).error
    assert f"run_step('named', ...) {text}" in str(error)
    app = Celery("refused", set_as_current=False)
    with pytest.raises(OptionError, match=f"a workflow {re.escape(text)}"):
        type("Fetch", (Workflow,), {"app": app, "run": staticmethod(function)})


@pytest.mark.parametrize("function", [fetch, partial(fetch)])
def test_an_async_function_is_not_for_run_step(function: Callable[..., object]) -> None:
    error = Ledger().run(lambda: run_step("named", function)).error
    assert str(error).startswith("run_step('named', ...) does not take the async function")
    assert str(error).endswith("await durable.aio.run_step(...) in an `async def` workflow")


def test_what_has_no_name_is_asked_for_one() -> None:
    with pytest.raises(
        OptionError, match=r"no name of its own: give it one with @step\(name=...\)"
    ):
        step(partial(charge, "o-42"))
    assert step(name="charge o-42")(partial(charge, "o-42"))() == "o-42/0"


def test_a_step_in_a_class_is_its_method() -> None:
    class Shop:
        currency = "EUR"

        @step
        def charge(self, cents: int) -> str:
            return f"{cents} {self.currency}"

        @classmethod
        @step
        def refund(cls, cents: int) -> str:
            return f"-{cents} {cls.currency}"

    assert Shop().charge(3) == "3 EUR"
    assert Shop.refund(4) == "-4 EUR"
    assert isinstance(Shop.charge, Step)
    ledger = Ledger()
    assert ledger.run(lambda: (Shop().charge(3), Shop.refund(4))).value == ("3 EUR", "-4 EUR")
    assert [record.name.rpartition("Shop.")[2] for record in ledger.rows] == ["charge", "refund"]


def test_a_static_method_is_a_step_of_its_class() -> None:
    class Shop:
        @staticmethod
        def close() -> str:
            return "closed"

    decorated = step(Shop.close)
    assert isinstance(decorated, Step)
    assert decorated.name.endswith("Shop.close")
