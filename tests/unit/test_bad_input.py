"""What is refused at the door: before anything is written, with the field and the fix.

The database of these apps does not exist, so whatever is refused here was
refused without it.
"""

from __future__ import annotations

import enum
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery, chain, group
from kombu import Exchange

from durable import Durable, Workflow, workflow
from durable.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    DurableError,
    OptionError,
    PayloadError,
)

NOWHERE = "postgresql://127.0.0.1:1/shop"


@pytest.fixture(autouse=True)
def _no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment goes before keywords, and may name a real one."""
    monkeypatch.delenv("DURABLE_DATABASE_URL", raising=False)


def make_app(**settings: Any) -> tuple[Celery, Any]:
    app = Celery("shop", broker="memory://", set_as_current=False)
    Durable(app, **settings)

    @app.task(shared=False, base=Workflow, name="shop.fulfil")
    def fulfil(order_id: Any, cents: Any = 0) -> None: ...

    return app, fulfil


@pytest.fixture
def fulfil() -> Any:
    return make_app(database_url=NOWHERE, max_payload_bytes=2048)[1]


class Text(str):
    """A subclass that would come back as something else."""

    __slots__ = ()


class Local(enum.Enum):
    A = 1


Local.__qualname__ = "nowhere.<locals>.Local"
CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("nan"), "$.args[0]: nan is not a JSON number; use None or text."),
        ([1, float("inf")], "$.args[0][1]: inf is not a JSON number; use None or text."),
        ("a\0b", "$.args[0]: the text has a NUL (\\u0000), which Postgres cannot store; remove"),
        ("\ud800", "$.args[0]: the text has the lone surrogate '\\ud800', which is not Unicode"),
        ({"sku": {7: 1}}, "$.args[0].sku: the key 7 is of type int; use a string key."),
        ({None: 1}, "$.args[0]: the key None is of type NoneType; use a string key."),
        ("x" * 3000, "more than the limit of 2048; keep the data elsewhere and store a reference"),
        (object(), "$.args[0]: a builtins.object has no stored form; store plain values, or"),
        (Text("a"), "would come back as a plain str; store str(value), or register the type"),
        (CIRCLE, "$.args[0][0]: it contains itself; break the circle, for example with an id."),
        (Local.A, "$.args[0]: "),
    ],
)
def test_an_argument_that_cannot_be_stored_is_refused(
    fulfil: Any, value: object, problem: str
) -> None:
    with pytest.raises(PayloadError) as caught:
        fulfil.delay(value)
    text = str(caught.value)
    assert text.startswith("the arguments of 'shop.fulfil' cannot be stored: ")
    assert problem in text


def test_a_keyword_argument_is_named(fulfil: Any) -> None:
    with pytest.raises(PayloadError, match=r"cannot be stored: \$\.kwargs\.cents: nan is not"):
        fulfil.delay("o-42", cents=float("nan"))


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "fulfil() missing 1 required positional argument: 'order_id'"),
        ((1, 2, 3), {}, "fulfil() takes from 1 to 2 positional arguments but 3 were given"),
        ((1,), {"colour": 1}, "fulfil() got an unexpected keyword argument 'colour'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_as_by_celery(
    fulfil: Any, args: tuple[Any, ...], kwargs: dict[str, Any], text: str
) -> None:
    with pytest.raises(TypeError) as caught:
        fulfil.delay(*args, **kwargs)
    assert str(caught.value) == text
    with pytest.raises(TypeError) as caught:
        fulfil.app.send_task("shop.fulfil", args, kwargs)
    assert str(caught.value) == text


@pytest.mark.parametrize("task_id", ["order-42", "42", "6f9619ff-8b86-d011-b42d-00cf4fc964", " "])
def test_a_task_id_that_is_no_uuid_is_refused_and_says_what_to_use(
    fulfil: Any, task_id: str
) -> None:
    with pytest.raises(OptionError) as caught:
        fulfil.apply_async(("o-42",), task_id=task_id)
    text = str(caught.value)
    assert text.startswith(f"task_id={task_id!r} is not a UUID, and the id of a run has to be one.")
    assert "str(uuid.uuid5(uuid.NAMESPACE_URL, 'order-42'))" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"countdown": "soon"}, "countdown='soon' is not a duration. Give a timedelta, a number"),
        ({"countdown": float("nan")}, "countdown=nan is not a duration."),
        ({"countdown": float("inf")}, "countdown=inf is longer than a hundred years."),
        ({"countdown": 1e13}, "countdown=10000000000000.0 is longer than a hundred years."),
        ({"countdown": timedelta(days=99_999)}, "is longer than a hundred years."),
        ({"eta": "tomorrow"}, "eta='tomorrow' is not a date: give an aware datetime"),
        ({"eta": 5}, "eta=5 is not a date: give an aware datetime"),
        (
            {"eta": datetime(9000, 1, 1, tzinfo=timezone.utc)},
            "eta=9000-01-01 00:00:00+00:00 is more than a hundred",
        ),
        ({"expires": "whenever"}, "expires='whenever' is not a date: give an aware datetime"),
        ({"expires": 1e13}, "expires=10000000000000.0 is longer than a hundred years."),
        ({"expires": [1]}, "expires=[1] is not a duration."),
        ({"deadline": "7 days"}, "deadline='7 days' is not a duration. Give a timedelta, a number"),
        ({"deadline": -1}, "deadline=-1 is negative."),
        ({"deadline": "200000d"}, "deadline='200000d' is longer than a hundred years."),
    ],
)
def test_an_absurd_time_is_refused_with_its_name(
    fulfil: Any, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(OptionError) as caught:
        fulfil.apply_async(("o-42",), **options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("option", "meant"),
    [("dedline", "deadline"), ("count_down", "countdown"), ("prioriti", "priority")],
)
def test_a_misspelt_option_of_a_call_is_refused(fulfil: Any, option: str, meant: str) -> None:
    with pytest.raises(OptionError) as caught:
        fulfil.apply_async(("o-42",), **{option: 1})
    assert str(caught.value) == (
        f"apply_async() does not know the option {option!r}. Did you mean {meant!r}?"
    )


@pytest.mark.parametrize("option", ["message_id", "timestamp", "mandatory", "x_tenant"])
def test_properties_of_the_message_and_stamps_are_no_misspelt_options(
    fulfil: Any, option: str
) -> None:
    with pytest.raises(DatabaseUnavailable):  # it got that far
        fulfil.apply_async(("o-42",), **{option: 1})


def test_an_exchange_may_be_given_as_an_object(fulfil: Any) -> None:
    with pytest.raises(DatabaseUnavailable):  # it got that far
        fulfil.apply_async(("o-42",), exchange=Exchange("orders"))


@pytest.mark.parametrize("canvas", [chain, group])
def test_canvas_refuses_the_same(fulfil: Any, canvas: Any) -> None:
    with pytest.raises(PayloadError, match=r"arguments of 'shop\.fulfil'"):
        canvas(fulfil.si(float("nan")), fulfil.si(2)).apply_async()


# --- where a workflow is defined


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"dedline": "7d"},
            "@workflow does not know the option 'dedline'. Did you mean 'deadline'",
        ),
        ({"max_retry": 3}, "@workflow does not know the option 'max_retry'. Did you mean 'max_ret"),
        ({"colour": 1}, "@workflow does not know the option 'colour'."),
        ({"deadline": "soon"}, "deadline='soon' is not a duration. Give a timedelta, a number of"),
        ({"deadline": -5}, "deadline=-5 is negative."),
    ],
)
def test_a_wrong_option_of_a_workflow_is_refused_at_import(
    options: dict[str, Any], text: str
) -> None:
    with pytest.raises(OptionError) as caught:
        workflow(**options)(lambda: None)
    assert text in str(caught.value)


def test_a_wrong_deadline_is_refused_with_base_too() -> None:
    app, _ = make_app(database_url=NOWHERE)
    with pytest.raises(OptionError, match="deadline='soon' is not a duration"):

        @app.task(shared=False, base=Workflow, deadline="soon", lazy=False)
        def late() -> None: ...


# --- settings


def test_no_database_is_told_at_the_first_start() -> None:
    _, fulfil = make_app()
    with pytest.raises(ConfigurationError) as caught:
        fulfil.delay("o-42")
    assert str(caught.value) == (
        "no database: set durable_database_url (app.conf, or Durable(app, database_url=...)) or the"
        " environment variable DURABLE_DATABASE_URL to a postgresql:// URL; the value 'embedded'"
        " starts a Postgres of its own"
    )


def test_a_wrong_setting_is_told_at_the_first_start() -> None:
    _, fulfil = make_app(database_url=NOWHERE, leese=3)
    with pytest.raises(ConfigurationError, match="keyword leese of Durable"):
        fulfil.delay("o-42")


def test_an_unreachable_database_is_told_with_the_setting() -> None:
    _, fulfil = make_app(database_url="postgresql://shop:s3cret@127.0.0.1:1/shop")
    with pytest.raises(DatabaseUnavailable) as caught:
        fulfil.delay("o-42")
    text = str(caught.value)
    assert text.startswith("no connection to Postgres: connection failed: connection to server at")
    assert text.endswith("Check that the server is up and that durable_database_url is right")
    assert "s3cret" not in text


def test_an_app_without_durable_says_what_to_write() -> None:
    app = Celery("bare", broker="memory://", set_as_current=False)

    @app.task(shared=False, base=Workflow, name="bare.task")
    def task() -> None: ...

    with pytest.raises(ConfigurationError) as caught:
        task()
    assert str(caught.value) == (
        "'bare.task' is a durable task, but its app has no Durable: put `Durable(app,"
        " database_url=...)` beside `app = Celery(...)`"
    )


def test_a_second_durable_for_an_app_is_refused() -> None:
    app, _ = make_app()
    with pytest.raises(ConfigurationError, match="called twice for the app 'shop'"):
        Durable(app)


def test_every_refusal_can_be_caught_as_one() -> None:
    for error in (OptionError, PayloadError, ConfigurationError, DatabaseUnavailable):
        assert issubclass(error, DurableError)


@pytest.mark.parametrize(
    ("misspelt", "meant"), [("dedline", "deadline"), ("max_retrys", "max_retries")]
)
def test_a_misspelt_option_of_an_app_task_is_refused(misspelt: str, meant: str) -> None:
    app = Celery("misspelt", set_as_current=False)
    with pytest.raises(OptionError, match=rf"'{misspelt}'\. Did you mean '{meant}'\?"):

        @app.task(base=Workflow, lazy=False, shared=False, **{misspelt: "7"})
        def fulfil() -> None: ...


def test_an_app_task_may_have_attributes_of_the_project_s_own() -> None:
    app = Celery("owned", set_as_current=False)

    @app.task(base=Workflow, lazy=False, shared=False, owner="the shop")
    def fulfil() -> None: ...

    assert fulfil.owner == "the shop"


def test_workflow_on_something_that_is_no_function_is_refused() -> None:
    with pytest.raises(OptionError, match=r"@workflow goes on a function, not on 'fulfil'"):
        workflow("fulfil")
