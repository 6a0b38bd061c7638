"""What a circuit breaker accepts, and where it may be used."""

from __future__ import annotations

import re
from typing import Any

import pytest
from celery import Celery

import durable
from durable import CircuitBreaker, CircuitOpen, Durable, step
from durable.errors import ConfigurationError, NotInWorkflow, OptionError
from durable.steps import find_step, place_of

breaker = CircuitBreaker("unit.service", failure_threshold=1)


@step(name="unit.breaker.under")
@breaker
def under(x: int) -> int:
    """Adds one."""
    return x + 1


@breaker
@step(name="unit.breaker.above", max_retries=7)
def above(x: int) -> int:
    return x + 1


@pytest.fixture
def app() -> Celery:
    app = Celery("unit", broker="memory://", set_as_current=False)
    Durable(app, database_url="postgresql://127.0.0.1:1/nowhere")
    return app


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": ""}, "printable characters, not ''"),
        ({"name": None}, "printable characters, not None"),
        ({"name": "a\nb"}, "printable characters"),
        ({"failure_threshold": 0}, "failure_threshold=0: give a whole number from 1"),
        ({"failure_threshold": 1.5}, "failure_threshold=1.5"),
        ({"reset_timeout": 0}, "reset_timeout=0 would never"),
        ({"reset_timeout": "soon"}, "reset_timeout='soon' is not a duration"),
        ({"expected": "ValueError"}, "expected='ValueError': give exception classes"),
        ({"ignore": [1]}, "ignore=(1,): give exception classes; 1 is none"),
    ],
)
def test_a_bad_option_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=re.escape(problem)):
        CircuitBreaker(**{"name": "service", **options})


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(OptionError, match="goes on a function, not on 7"):
        breaker(7)  # type: ignore[call-overload]

    def rows() -> Any:
        yield 1

    with pytest.raises(OptionError, match="does not take the generator function"):
        breaker(rows)


def test_a_step_stays_a_step_above_and_under_it(app: Celery) -> None:
    assert isinstance(above, type(under))
    assert (above.name, above.policy.max_retries) == ("unit.breaker.above", 7)
    assert under.__doc__ == "Adds one."
    for each in (above, under):  # as another worker finds it, for an item of a fan-out
        assert find_step(each.name, place_of(each)) is each
        assert each.function.__closure__ is not None


def test_two_functions_behind_it_may_not_share_a_name() -> None:
    with pytest.raises(OptionError, match=r"two functions are steps under the name 'unit\.breaker"):

        @step(name="unit.breaker.under")
        @breaker
        def another() -> None: ...


def test_inline_runs_need_no_database(app: Celery) -> None:
    @app.task(base=durable.Workflow, shared=False)
    def both(x: int) -> int:
        return under(x) + above(x)

    assert both(1) == 4


def test_in_the_body_of_a_workflow_it_is_refused(app: Celery) -> None:
    @app.task(base=durable.Workflow, shared=False)
    def careless() -> None:
        with breaker:
            pass

    with pytest.raises(NotInWorkflow, match="belongs in a step"):
        careless()


def test_without_an_app_it_says_what_is_missing() -> None:
    plain = Celery("plain", broker="memory://")
    plain.set_current()
    with pytest.raises(ConfigurationError, match="needs a Celery app with Durable"):
        under.function(1)
    plain.close()


def test_its_refusal_survives_storage() -> None:
    from durable.codec import Codec
    from durable.failures import decode_failure, encode_failure

    error = CircuitOpen("closed", breaker="service", retry_after=1.5)
    again = decode_failure(encode_failure(error, Codec(), trusted_packages=()), Codec())
    assert isinstance(again, CircuitOpen)
    assert (str(again), again.breaker, again.retry_after) == ("closed", "service", 1.5)
