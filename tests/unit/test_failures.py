from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from hypothesis import given, settings
from hypothesis import strategies as st

from durable.codec import Codec
from durable.errors import PermanentError, RecoverableError, StepError
from durable.failures import decode_failure, encode_failure

codec = Codec()
HERE = (__name__,)


class Declined(Exception):
    pass


class WithCode(Exception):
    """Its args are not what its __init__ takes."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class TwoArguments(Exception):
    """Cannot be made from its args at all."""

    def __init__(self, reason: str, *, response: object) -> None:
        super().__init__(reason)
        self.response = response


class Pickleable(Exception):
    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__()

    def __str__(self) -> str:
        return f"code {self.code}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code,)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Hostile(Exception):
    def __getattribute__(self, name: str) -> object:
        raise RuntimeError(name)


class Changing(Exception):
    """Looks different each time."""

    def __str__(self) -> str:
        return str(id(self))


def raised(exc: BaseException) -> BaseException:
    try:
        raise exc  # noqa: TRY301
    except BaseException as caught:  # noqa: BLE001
        return caught


def stored(exc: BaseException, *trusted: str, codec: Codec = codec) -> dict[str, Any]:
    text = encode_failure(exc, codec, trusted_packages=trusted or HERE)
    record = json.loads(text)
    assert isinstance(record, dict)
    return record


def again(exc: BaseException, *trusted: str) -> BaseException:
    return decode_failure(encode_failure(exc, codec, trusted_packages=trusted or HERE), codec)


# --- rebuilt -------------------------------------------------------------------


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("no such order"),
        KeyError("sku"),
        KeyError(("a", 1)),
        ZeroDivisionError(),
        FileNotFoundError(2, "No such file or directory", "/data/a.csv"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        SoftTimeLimitExceeded(5),
        PermanentError("no stock"),
        StepError("declined", "stripe.error.CardError"),
        Declined("card", 5, ("a", "b")),
        WithCode(7),
        TwoArguments("late", response={"status": 500}),
        Pickleable(7),
    ],
)
def test_an_exception_comes_back_with_its_type_args_and_text(exc: Exception) -> None:
    back = again(raised(exc))
    assert type(back) is type(exc)
    assert back.args == exc.args
    assert str(back) == str(exc)


def test_attributes_come_back_as_far_as_they_can_be_stored() -> None:
    exc = Declined("card")
    exc.code = 5  # type: ignore[attr-defined]
    exc.pair = (1, 2)  # type: ignore[attr-defined]
    exc.response = object()  # type: ignore[attr-defined]
    back = again(raised(exc))
    assert vars(back)["code"] == 5
    assert vars(back)["pair"] == (1, 2)
    assert not hasattr(back, "response")


def test_an_exception_without_its_init_keeps_its_attributes() -> None:
    assert vars(again(WithCode(7)))["code"] == 7
    assert vars(again(TwoArguments("x", response=1)))["response"] == 1


def test_retry_after_comes_back() -> None:
    back = again(RecoverableError("busy", retry_after="90s"))
    assert isinstance(back, RecoverableError)
    assert back.retry_after == "90s"


@given(st.lists(st.text() | st.integers() | st.none() | st.tuples(st.booleans())))
@settings(deadline=None, max_examples=50)
def test_any_storable_arguments_come_back(args: list[Any]) -> None:
    exc = Declined(*args)
    back = again(exc)
    if stored(exc)["rebuild"]:
        assert (type(back), back.args) == (Declined, exc.args)
    else:  # a NUL or a lone surrogate
        assert isinstance(back, StepError)


@pytest.mark.parametrize("exc", [WithCode(7), Declined((1,)), StepError("x", "y")])
def test_a_second_life_is_like_the_first(exc: Exception) -> None:
    back = again(again(raised(exc)))
    assert (type(back), back.args, str(back)) == (type(exc), exc.args, str(exc))


# --- not rebuilt ------------------------------------------------------------------


def test_an_exception_of_another_package_becomes_a_step_error() -> None:
    back = again(raised(Declined("card")), "tasks")
    assert isinstance(back, StepError)
    assert back.args == ("card", f"{__name__}.Declined")
    assert back.type_name == f"{__name__}.Declined"


def test_trust_is_by_whole_names() -> None:
    package, _, rest = __name__.partition(".")
    assert stored(Declined("x"), __name__)["rebuild"]
    assert stored(Declined("x"), package)["rebuild"]
    assert not stored(Declined("x"), __name__[:-1])["rebuild"]
    assert not stored(Declined("x"), f"{__name__}.inner")["rebuild"]
    assert rest


def test_a_local_class_becomes_a_step_error() -> None:
    class Local(Exception):
        pass

    back = again(Local("x"))
    assert isinstance(back, StepError)
    assert back.type_name.endswith("<locals>.Local")


def test_an_exception_that_would_come_back_different_becomes_a_step_error() -> None:
    assert isinstance(again(Changing("x")), StepError)


def test_arguments_that_cannot_be_stored_make_it_a_step_error() -> None:
    record = stored(Declined("card", object()))
    assert record["args"] is None
    assert not record["rebuild"]
    assert "card" in record["message"]


def test_an_untrusted_exception_still_shows_its_arguments_to_sql() -> None:
    exc = Declined("card", 5)
    exc.code = 7  # type: ignore[attr-defined]
    record = stored(exc, "tasks")
    assert (record["args"], record["attributes"]) == (["card", 5], {"code": 7})


# --- never an error of its own -------------------------------------------------------


@pytest.mark.parametrize("kind", [Mute, Hostile])
def test_an_exception_that_misbehaves_is_stored_all_the_same(kind: type[Exception]) -> None:
    back = again(raised(kind("x")))
    assert isinstance(back, StepError)
    assert back.type_name == f"{__name__}.{kind.__name__}"
    assert "RuntimeError" in str(back)


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_any_message_is_stored_without_what_postgres_refuses(message: str) -> None:
    text = encode_failure(Declined(message, "\0\ud800", object()), codec, trusted_packages=HERE)
    text.encode()
    assert "\\u0000" not in text.replace("\\\\", "")


@pytest.mark.parametrize("max_bytes", [1024, 3000, 20_000, 100_000])
@pytest.mark.parametrize("character", ["x", "\x01", "\0", "🏔", "\ud800", '"'])
def test_no_failure_is_larger_than_the_limit(max_bytes: int, character: str) -> None:
    exc = Declined(character * 200_000)
    exc.big = character * 200_000  # type: ignore[attr-defined]
    exc.__cause__ = Declined(character * 200_000)
    small = Codec(max_bytes=max_bytes)
    text = encode_failure(raised(exc), small, trusted_packages=HERE)
    assert len(text.encode()) <= max_bytes
    assert isinstance(decode_failure(text, small), StepError)


def test_a_class_that_is_gone_is_shown_as_a_step_error() -> None:
    text = encode_failure(Declined("card"), codec, trusted_packages=HERE)
    back = decode_failure(text.replace("Declined", "Deleted"), codec)
    assert str(back) == f"{__name__}.Deleted: card"


def test_only_exceptions_are_made_from_stored_text() -> None:
    record = stored(Declined("x"))
    back = decode_failure(json.dumps({**record, "type": "subprocess:Popen"}), codec)
    assert isinstance(back, StepError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"message": "stopped by hand"}', "stopped by hand"),
        ('"stopped by hand"', "stopped by hand"),
        ("{}", ""),
        ("no json", "no json"),
        ('{"message": "x", "args": {"__type__": "enum:gone:Color", "__value__": 1}}', "x"),
    ],
)
def test_an_error_written_by_hand_is_readable(text: str, message: str) -> None:
    assert str(decode_failure(text, codec)) == message


# --- what a person sees -----------------------------------------------------------------


def fail_with_a_secret() -> None:
    password = "hunter" + str(2)
    raise Declined(len(password))


def failure() -> BaseException:
    try:
        fail_with_a_secret()
    except Declined as exc:
        return exc
    raise AssertionError


def test_the_traceback_shows_the_place_and_no_values() -> None:
    text = stored(failure())["traceback"]
    assert "in fail_with_a_secret" in text
    assert "hunter2" not in text


def test_the_original_traceback_is_in_the_attribute_and_in_the_log() -> None:
    back = raised(again(failure()))
    assert "in fail_with_a_secret" in vars(back)["durable_traceback"]
    if sys.version_info >= (3, 11):
        assert "in fail_with_a_secret" in "".join(traceback.format_exception(back))


def test_a_second_life_shows_each_traceback_once() -> None:
    back = raised(again(raised(again(failure()))))
    text = vars(back)["durable_traceback"]
    assert text.count("in fail_with_a_secret") == 1
    assert text.count("raised again:") == 1


def test_of_a_long_traceback_the_end_is_kept() -> None:
    def dive(depth: int) -> None:
        if depth == 0:
            raise Declined("bottom")
        (dive if depth % 2 else dive_too)(depth - 1)

    def dive_too(depth: int) -> None:
        dive(depth)

    with pytest.raises(Declined) as caught:
        dive(400)
    text = stored(caught.value)["traceback"]
    assert len(text) < 17_000
    assert text.rstrip().endswith("Declined: bottom")


def test_notes_are_kept_once() -> None:
    exc = failure()
    vars(exc)["__notes__"] = ["order o-42"]
    twice = again(again(exc))
    assert [note.partition(":")[0] for note in vars(twice)["__notes__"]] == [
        "order o-42",
        "Traceback of the attempt that failed",
    ]


def test_the_causes_are_listed_nearest_first() -> None:
    exc, outage = Declined("card"), ConnectionError("down")
    exc.__cause__, outage.__context__ = outage, KeyError("root")
    assert stored(exc)["causes"] == [
        {"type": "builtins:ConnectionError", "message": "down", "link": "cause"},
        {"type": "builtins:KeyError", "message": "'root'", "link": "context"},
    ]


def test_a_circle_of_causes_ends() -> None:
    first, second = Declined("a"), Declined("b")
    first.__cause__, second.__cause__ = second, first
    assert [cause["message"] for cause in stored(first)["causes"]] == ["b"]


def test_a_long_chain_of_causes_is_cut() -> None:
    exc = Declined("last")
    for n in range(100):
        outer = Declined(n)
        outer.__cause__ = exc
        exc = outer
    assert len(stored(exc)["causes"]) == 8
