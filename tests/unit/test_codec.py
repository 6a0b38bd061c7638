from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter, OrderedDict, UserDict, defaultdict
from dataclasses import InitVar, dataclass, field, make_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, IntEnum
from http import HTTPStatus
from typing import Any, ClassVar, NamedTuple
from uuid import UUID, uuid4

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from durable.codec import Codec
from durable.errors import OptionError, PayloadError

codec = Codec()
NEW_YEAR = datetime(2024, 1, 1, tzinfo=timezone.utc)


def round_trip(value: object) -> Any:
    return codec.decode(codec.encode(value, "value"))


def refusal(value: object, codec: Codec = codec) -> str:
    with pytest.raises(PayloadError) as caught:
        codec.encode(value, "result of step 'tasks.orders.charge'")
    message = str(caught.value)
    assert message.startswith("result of step 'tasks.orders.charge' cannot be stored: $")
    return message


class Color(Enum):
    RED = "red"
    CRIMSON = "red"  # noqa: PIE796 - an alias, on purpose
    PAIR = (1, 2)


class Word(str, Enum):
    YES = "yes"


class Number(IntEnum):
    ONE = 1


class Rights(Flag):
    READ = 1
    WRITE = 2


@dataclass(frozen=True)
class Line:
    sku: str
    n: int = 1


@dataclass
class Order:
    lines: list[Line]
    at: datetime
    color: Color = Color.RED
    pair: tuple[int, ...] = ()
    total: Decimal = field(default=Decimal(0), init=False)
    kind: ClassVar[str] = "order"

    @dataclass
    class Note:
        text: str


@dataclass
class Doubling:
    cents: int

    def __post_init__(self) -> None:
        self.cents *= 2


@dataclass
class NeedsMore:
    path: str
    root: InitVar[str]


class Item(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)

    sku: str = pydantic.Field(alias="itemSku")
    site: pydantic.HttpUrl | None = None
    pair: tuple[int, int] = (1, 2)
    counts: dict[int, int] = {}
    color: Color = Color.RED


class Split(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(populate_by_name=True)

    sku: str = pydantic.Field(validation_alias="in_", serialization_alias="out")


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    on: date


class Secret(pydantic.BaseModel):
    password: str

    @pydantic.field_serializer("password")
    def hidden(self, password: str) -> str:
        return "***"


class Text(str):
    __slots__ = ()


class Registered(str):
    __slots__ = ()


class Precise(datetime):
    """As a pandas Timestamp: more than its isoformat() says."""

    nanosecond = 7

    def __eq__(self, other: object) -> bool:
        return type(other) is Precise

    __hash__ = datetime.__hash__


class OtherUUID(UUID):
    """As asyncpg returns it."""


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents


class Jsonable:
    def __json__(self) -> object:
        return {"plain": (1, 2)}


class Failing:
    def __json__(self) -> object:
        raise RuntimeError("no luck")


class Point(NamedTuple):
    x: int
    y: int


kombu_json.register_type(Money, "test-money", lambda money: money.cents, Money)
kombu_json.register_type(Registered, None, str)

# --- plain values -------------------------------------------------------------

texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"))
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
) | texts
keys = texts | st.sampled_from(["__type__", "__value__", "__set__"])
plain = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=10
)
typed = st.recursive(
    scalars
    | st.binary()
    | st.datetimes(timezones=st.none() | st.just(timezone.utc))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.uuids()
    | st.decimals(allow_nan=False)
    | st.sampled_from([*Color, *Word, *Number, *HTTPStatus, Rights.READ | Rights.WRITE, Rights(0)])
    | st.builds(Line, texts, st.integers())
    | st.frozensets(st.integers() | st.tuples(texts, st.integers())),
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
    max_leaves=10,
)


def shape(value: Any) -> Any:
    """The value with the types spelled out, for 1 == True == 1.0 and 0.0 == -0.0."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value), repr(value) if isinstance(value, float) else value


@settings(deadline=None)
@given(plain)
def test_plain_data_comes_back_exactly_and_in_order(value: object) -> None:
    assert shape(round_trip(value)) == shape(value)


@settings(deadline=None)
@given(typed)
def test_typed_data_comes_back_exactly(value: object) -> None:
    assert shape(round_trip(value)) == shape(value)


@settings(deadline=None)
@given(plain)
def test_the_second_trip_changes_nothing(value: object) -> None:
    text = codec.encode(value, "value")
    assert codec.encode(codec.decode(text), "value") == text


@pytest.mark.parametrize(
    "value", [2**53 + 1, -(2**200), 1e16, -0.0, 5e-324, 0.1, 1.7976931348623157e308, True, None]
)
def test_numbers_are_exact(value: object) -> None:
    again = round_trip(value)
    assert (type(again), repr(again)) == (type(value), repr(value))


def test_text_is_stored_as_it_reads() -> None:
    assert codec.encode({"city": "Zürich 🏔"}, "value") == '{"city":"Zürich 🏔"}'


def test_a_backslash_before_u0000_is_not_a_nul() -> None:
    assert round_trip({"re": r"[^\u0000]"}) == {"re": r"[^\u0000]"}


@pytest.mark.parametrize(
    "value",
    [
        {"__type__": "decimal", "__value__": "1"},
        {"__type__": "enum:http:HTTPStatus", "__value__": "OK"},
        {"__type__": {"__type__": 1}, "more": [{"__type__": None}]},
        {"__type__": "durable:dict", "__value__": [["a", 1]]},
        {"__value__": 1},
    ],
)
def test_users_data_that_looks_like_a_marker_stays_data(value: object) -> None:
    assert round_trip(value) == value
    assert round_trip([date(2024, 1, 1), value]) == [date(2024, 1, 1), value]


# --- types that become plainer, as documented -----------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2, 3)), [1, [2, 3]]),
        ({"a": (1,)}, {"a": [1]}),
        (Point(1, 2), [1, 2]),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (Jsonable(), {"plain": [1, 2]}),
        (Registered("x"), "x"),
        (type("float64", (float,), {"__module__": "numpy"})(0.1), 0.1),
    ],
)
def test_documented_types_become_plainer(value: object, expected: object) -> None:
    assert shape(round_trip(value)) == shape(expected)


def test_the_decoded_value_of_a_subclass_of_a_known_type_is_the_plain_type() -> None:
    value = uuid4()
    assert type(round_trip(OtherUUID(value.hex))) is UUID
    assert round_trip(OtherUUID(value.hex)) == value


def test_tuples_are_kept_on_request() -> None:
    text = codec.encode([(1, ("a",))], "value", keep_tuples=True)
    assert codec.decode(text) == [(1, ("a",))]


# --- types with a form of their own ----------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        datetime(2024, 2, 29, 12, 30, 1, 5),  # noqa: DTZ001
        datetime(2024, 2, 29, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        date(2024, 2, 29),
        time(1, 2, 3),
        Decimal("1.10"),
        b"text",
        b"\xff\x00",
        b"nul\x00inside",
        timedelta.max,
        timedelta(microseconds=-1),
        set(),
        {1, 2, 3},
        {"a", ("b", 1), frozenset({2})},
        frozenset({Line("a"), Color.RED}),
    ],
)
def test_values_of_known_types_come_back_equal(value: object) -> None:
    again = round_trip(value)
    assert (type(again), again) == (type(value), value)


@pytest.mark.parametrize(
    "member",
    [*Color, *Word, *Number, HTTPStatus.OK, Rights.READ, Rights.READ | Rights.WRITE, Rights(0)],
)
def test_an_enum_member_comes_back_as_that_member(member: Enum) -> None:
    assert round_trip([{"member": member}])[0]["member"] is member


def test_a_dataclass_comes_back_equal_with_all_that_is_in_it() -> None:
    order = Order([Line("a", 2)], NEW_YEAR, Color.PAIR, (1, (2,)))
    order.total = Decimal("9.90")
    assert round_trip({"order": order}) == {"order": order}
    assert round_trip(Order.Note("x")) == Order.Note("x")


def test_a_stored_dataclass_reads_well_in_sql() -> None:
    stored = json.loads(codec.encode(Line("a", 2), "value"))
    assert stored["__type__"] == f"dataclass:{__name__}:Line"
    assert stored["__value__"] == {"sku": "a", "n": 2}


def test_a_dataclass_may_gain_a_field_with_a_default_and_lose_one() -> None:
    text = codec.encode(Line("a", 2), "value")
    assert codec.decode(text.replace('"n"', '"gone"')) == Line("a", 1)


def test_a_dataclass_field_without_default_that_is_not_stored_is_an_error() -> None:
    text = codec.encode(Line("a"), "value").replace('"sku"', '"gone"')
    with pytest.raises(PayloadError, match="sku"):
        codec.decode(text)


@pytest.mark.parametrize(
    "model",
    [
        Item(itemSku="a", site="https://example.org/x", pair=(3, 4), counts={1: 2}),
        Split(sku="a"),
        Strict(on=date(2024, 1, 1)),
    ],
)
def test_a_pydantic_model_comes_back_equal(model: pydantic.BaseModel) -> None:
    again = round_trip([model])[0]
    assert (type(again), again) == (type(model), model)


def test_a_pydantic_model_still_knows_which_fields_were_set() -> None:
    model = Item(itemSku="a")
    assert round_trip(model).model_dump(exclude_unset=True) == {"sku": "a"}


def test_a_registered_type_comes_back_as_registered() -> None:
    assert round_trip({"price": Money(5)})["price"].cents == 5


def test_equal_sets_are_equal_text() -> None:
    # 0 and 8 fall into one slot, so the order of these sets is that of their making.
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)
    assert codec.encode(one, "value") == codec.encode(other, "value")


# --- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_refused_where_they_stand(number: float) -> None:
    message = refusal({"items": [{}, {}, {}, {"price": number}]})
    assert f": $.items[3].price: {number} is not a JSON number; use None or text." in message


def test_nul_in_text_is_refused() -> None:
    assert "$['a b'][0]: the text has a NUL" in refusal({"a b": ["x\0"]})
    assert "$.a: a key has a NUL" in refusal({"a": {"\0": 1}})


def test_a_lone_surrogate_is_refused() -> None:
    message = refusal(["ok", "\ud800"])
    assert "$[1]: the text has the lone surrogate '\\ud800'" in message
    assert "errors='replace'" in message
    assert "a key has the lone surrogate" in refusal({"\udfff": 1})


@pytest.mark.parametrize("key", [1, True, None, 1.5, (1,), Word.YES, Text("a"), date(2024, 1, 1)])
def test_a_key_that_is_no_plain_text_is_refused(key: object) -> None:
    message = refusal({"prices": {key: 1}})
    assert "$.prices: the key " in message
    assert "use a string key" in message


def test_a_value_that_contains_itself_is_refused() -> None:
    circle: list[object] = []
    circle.append({"again": circle})
    assert "$[0].again: it contains itself" in refusal(circle)


def test_the_same_value_twice_is_no_circle() -> None:
    shared = [date(2024, 1, 1)]
    assert round_trip([shared, shared]) == [shared, shared]


@pytest.mark.parametrize("leaf", [1, date(2024, 1, 1)])
def test_nesting_has_a_limit_that_does_not_depend_on_the_stack(leaf: object) -> None:
    def nested(depth: int) -> object:
        value = leaf
        for _ in range(depth):
            value = [value]
        return value

    assert round_trip(nested(99)) == nested(99)
    for depth in (101, 100_000):
        assert "it is nested more than 100 deep; flatten it" in refusal(nested(depth))


def test_an_int_too_long_for_text_is_refused() -> None:
    assert "$.n: " in refusal({"n": 10**5000})


def test_a_value_over_the_limit_is_refused_by_its_size_in_bytes() -> None:
    small = Codec(max_bytes=1024)
    assert small.encode("x" * 1022, "value")
    assert "it is 1025 bytes as JSON, more than the limit of 1024" in refusal("x" * 1023, small)
    assert "it is 1202 bytes" in refusal("ü" * 600, small)
    assert "durable_max_payload_bytes" in refusal([b"x" * 2000], small)


@pytest.mark.parametrize("max_bytes", [0, 1023, 1e6, True, None])
def test_a_senseless_limit_is_refused(max_bytes: Any) -> None:
    with pytest.raises(OptionError, match="max_bytes"):
        Codec(max_bytes=max_bytes)


@pytest.mark.parametrize("value", [object(), 1j, ..., range(3), bytearray(b"x"), UserDict(), Line])
def test_an_unknown_type_is_refused_with_the_way_to_register_it(value: object) -> None:
    message = refusal({"it": value})
    assert f"$.it: a {type(value).__module__}.{type(value).__qualname__} has no stored" in message
    assert "kombu.utils.json.register_type" in message


@pytest.mark.parametrize(
    "base", [type("T", (base,), {}) for base in (str, int, float, dict, list, tuple)]
)
def test_an_unregistered_subclass_of_a_builtin_is_refused(base: Any) -> None:
    plain = base.__mro__[1].__name__
    assert f"would come back as a plain {plain}; store {plain}(value), or" in refusal([base()])


def test_a_datetime_subclass_that_would_lose_something_is_refused() -> None:
    assert "would not come back equal as a plain datetime" in refusal(Precise(2024, 1, 1))


def test_a_class_inside_a_function_is_refused() -> None:
    class Local(Enum):
        A = 1

    assert "<locals>.Local is defined inside a function" in refusal(Local.A)


def test_a_class_that_is_not_found_under_its_name_is_refused() -> None:
    hidden = make_dataclass("Hidden", ["x"], namespace={"__module__": __name__})
    hidden.__module__ = __name__
    assert "is not what an import of that name gives" in refusal(hidden(1))


def test_a_class_of_the_started_script_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Line, "__module__", "__main__")
    assert "in the script that was started" in refusal(Line("a"))


def test_a_dataclass_that_would_not_come_back_equal_is_refused() -> None:
    assert "Doubling does not survive storing" in refusal({"it": Doubling(1)})
    assert "'root'" in refusal(NeedsMore("a", root="b"))


def test_the_path_leads_into_a_dataclass() -> None:
    order = Order([Line("a"), Line("b", n=object())], NEW_YEAR)  # type: ignore[arg-type]
    assert "$.order.lines[1].n: a builtins.object has no" in refusal({"order": order})


def test_a_model_that_hides_a_part_of_itself_is_refused() -> None:
    secret = Secret(password="x")
    assert "Secret does not survive its own JSON" in refusal(secret)


def test_a_form_that_fails_is_a_refusal_with_its_reason() -> None:
    assert "failed to give its stored form (RuntimeError: no luck)" in refusal(Failing())


# --- reading what the code no longer knows ---------------------------------------------


def unreadable(text: str) -> str:
    with pytest.raises(PayloadError) as caught:
        codec.decode(text)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["enum", "dataclass", "pydantic"])
def test_a_class_that_was_moved_is_named(kind: str) -> None:
    text = json.dumps({"__type__": f"{kind}:tasks.gone:Order", "__value__": {}})
    assert "the class tasks.gone:Order cannot be imported" in unreadable(text)
    text = json.dumps({"__type__": f"{kind}:{__name__}:Gone", "__value__": {}})
    assert f"the class {__name__}:Gone cannot be imported" in unreadable(text)


@pytest.mark.parametrize("kind", ["enum", "dataclass", "pydantic"])
@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "builtins:eval", "os:path"])
def test_a_marker_makes_nothing_but_enums_dataclasses_and_models(kind: str, name: str) -> None:
    text = json.dumps({"__type__": f"{kind}:{name}", "__value__": "true"})
    assert name in unreadable(text)


def test_an_enum_member_that_is_gone_is_an_error() -> None:
    text = codec.encode(Color.RED, "value").replace("RED", "BLUE")
    assert "BLUE" in unreadable(text)


def test_a_type_that_is_not_registered_here_is_an_error() -> None:
    message = unreadable('{"__type__": "money-of-another-app", "__value__": 1}')
    assert "money-of-another-app" in message
    assert "register_type" in message


@pytest.mark.parametrize(
    "text", ["", "{", "nope", '{"__type__": 1, "__value__": 2}', '{"__type__": [], "__value__": 2}']
)
def test_text_that_cannot_be_read_is_an_error(text: str) -> None:
    assert unreadable(text).startswith("a stored value cannot be read: ")


def test_the_codec_does_not_import_pydantic() -> None:
    program = (
        "import sys, durable.codec as c; c.Codec().encode({1}, 'x'); "
        "sys.exit('pydantic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
