"""What else than before is asked for at a place is noticed, whatever the two are."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

import durable
from durable import Durable, Workflow, run_step
from durable.errors import NonDeterministicWorkflow, NotInWorkflow, OptionError, PayloadError
from durable.history import History

KINDS = {
    "run": "step 'sleep'",
    "dispatch": "start of 'sleep'",
    "sleep": "a sleep",
    "event": "wait for event 'sleep'",
    "timer": "wait for a result with a timeout",
    "value": "'sleep'",
}


@pytest.mark.parametrize("asked", KINDS)
@pytest.mark.parametrize("recorded", KINDS)
def test_one_name_for_two_kinds_is_noticed(recorded: str, asked: str) -> None:
    history = History([("", 3, "sleep", 1, recorded, "succeeded", "null", None, None)])
    if recorded == asked:
        assert history.attempts("", 3, "sleep", asked)
        return
    with pytest.raises(NonDeterministicWorkflow) as caught:
        history.attempts("", 3, "sleep", asked)
    assert str(caught.value).startswith(
        f"the history has {KINDS[recorded]} at position 3, the code now asks for {KINDS[asked]}."
    )


def test_the_branch_is_named() -> None:
    history = History([("0.1", 3, "load", 1, "run", "succeeded", "null", None, None)])
    with pytest.raises(NonDeterministicWorkflow, match=r"at position 3 of branch 0\.1,"):
        history.attempts("0.1", 3, "charge", "run")


# --- beginning anew, inline


@pytest.fixture
def app() -> Any:
    app = Celery("changing", set_as_current=False)
    Durable(app, database_url="postgresql://127.0.0.1:1/none")
    yield app
    app.durable.close()


def test_an_inline_run_begins_anew(app: Celery) -> None:
    seen = []

    @app.task(shared=False, base=Workflow)
    def count(done: int, of: int) -> int:
        seen.append((durable.current().passes, durable.uuid4(), durable.current().id))
        if done < of:
            durable.continue_as_new(done + 1, of=of)
        return done

    assert count(0, of=1000) == 1000
    assert [each[0] for each in seen] == list(range(1001))
    assert len({each[1] for each in seen}) == 1001
    assert len({each[2] for each in seen}) == 1


def test_arguments_are_checked_where_the_body_can_see_it(app: Celery) -> None:
    caught = []

    @app.task(shared=False, base=Workflow)
    def count(done: object) -> object:
        for args in ((), (float("nan"),)):
            try:
                durable.continue_as_new(*args)
            except (TypeError, PayloadError) as exc:
                caught.append(type(exc).__name__)
        return done

    assert count(0) == 0
    assert caught == ["TypeError", "PayloadError"]


def test_a_step_cannot_begin_the_run_anew(app: Celery) -> None:
    @app.task(shared=False, base=Workflow)
    def count() -> None:
        run_step("again", durable.continue_as_new)

    with pytest.raises(NotInWorkflow, match=r"continue_as_new\(\) belongs in the body"):
        count()


def test_outside_a_run_there_is_nothing_to_begin_anew() -> None:
    with pytest.raises(NotInWorkflow):
        durable.continue_as_new()


# --- versions


@pytest.mark.parametrize(
    "options",
    [
        {"version": 2},
        {"version": ""},
        {"version": "a b"},
        {"version": "a@b"},
        {"version": "x" * 64},
        {"accepts": "1"},
        {"accepts": [1]},
        {"accepts": None},
    ],
)
def test_what_is_no_version_is_refused_at_import(app: Celery, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        make(app, **options)
    with pytest.raises(OptionError):
        durable.workflow(**options)


def test_a_misspelt_option_is_pointed_out(app: Celery) -> None:
    with pytest.raises(OptionError, match="'accepts'"):
        make(app, acccepts=["1"])


def make(app: Celery, **options: Any) -> None:
    def wrong() -> None: ...

    app.task(shared=False, base=Workflow, **options)(wrong)
    app.finalize()


def test_code_runs_its_own_version_and_those_that_it_accepts(app: Celery) -> None:
    @app.task(shared=False, base=Workflow, version="3", accepts=["1", "2", "3"])
    def newest() -> None: ...

    @app.task(shared=False, base=Workflow)
    def any_code() -> None: ...

    assert newest.runs_versions() == ("3", "1", "2")
    assert any_code.runs_versions() == ()
