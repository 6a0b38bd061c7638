from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Annotated, Any, Literal, NewType

import pydantic
import pytest
from typing_extensions import TypedDict

from durable.errors import OptionError
from durable.schemas import MISFIT, describe, reader


class Decision(pydantic.BaseModel):
    granted: bool


@dataclasses.dataclass
class Parcel:
    weight: int


class Item(TypedDict):
    sku: str


Weight = NewType("Weight", int)
Many = Annotated[list[int], pydantic.Field(min_length=1)]


def halved(value: int) -> int:
    return value // 2


class Checker:
    def __call__(self, value: int) -> int:
        return value + 1


@pytest.mark.parametrize(
    ("schema", "payload", "value"),
    [
        (Decision, {"granted": True}, Decision(granted=True)),
        (Parcel, {"weight": 7}, Parcel(7)),
        (Item, {"sku": "a"}, {"sku": "a"}),
        (list[int], [1, "2"], [1, 2]),
        (int | None, None, None),
        (Literal["yes", "no"], "yes", "yes"),
        (Weight, "7", 7),
        (Many, [1], [1]),
        (Any, "anything", "anything"),
        (pydantic.TypeAdapter(int), "7", 7),
        (Decision.model_validate, {"granted": True}, Decision(granted=True)),
        (halved, 8, 4),
        (functools.partial(max, 3), 2, 3),
        (Checker(), 1, 2),
        (lambda value: value, 1, 1),
    ],
)
def test_types_and_functions_read_payloads(schema: Any, payload: Any, value: Any) -> None:
    read = reader(schema)
    assert read is not None
    assert read(payload) == value


@pytest.mark.parametrize(
    ("schema", "payload"),
    [
        (Decision, {"granted": "perhaps"}),
        (Parcel, []),
        (Item, {"sku": 1}),
        (list[int], ["x"]),
        (Literal["yes", "no"], "perhaps"),
        (Weight, "x"),
        (Many, []),
        (halved, "x"),
        (lambda value: value["sku"], {}),
        (lambda value: value["sku"], None),
        (lambda value: value.lower(), 7),
        (lambda value: 1 / value, 0),
    ],
)
def test_what_does_not_fit_is_told_from_a_bug(schema: Any, payload: Any) -> None:
    read = reader(schema)
    assert read is not None
    with pytest.raises(MISFIT) as caught:
        read(payload)
    assert describe(caught.value)


def test_a_bug_in_a_function_is_no_misfit() -> None:
    read = reader(lambda value: value + undefined)  # type: ignore[name-defined] # noqa: F821
    assert read is not None
    with pytest.raises(NameError) as caught:
        read(1)
    assert not isinstance(caught.value, MISFIT)


async def checks_later(value: Any) -> Any:
    return value


@pytest.mark.parametrize("schema", [7, "int", "Unknown", {"type": "object"}, list["Unknown"], ()])  # type: ignore[name-defined] # noqa: F821
def test_what_cannot_check_a_payload_is_refused(schema: Any) -> None:
    with pytest.raises(OptionError, match=r"^schema=.* cannot check a payload: give a function"):
        reader(schema)


def test_an_async_function_is_refused() -> None:
    with pytest.raises(OptionError, match="async function"):
        reader(checks_later)


def test_without_pydantic_a_type_is_refused_and_a_function_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(OptionError, match=r"needs pydantic.*or give a function"):
        reader(tuple[int, int])
    read = reader(halved)
    assert read is not None


def test_a_reason_can_be_stored_whatever_it_says() -> None:
    assert describe(ValueError("a\0b\ud800")) == "ab?"
    assert describe(ValueError()) == "ValueError"
    assert describe(KeyError("sku")) == "KeyError: 'sku'"
    assert len(describe(ValueError("x" * 10_000))) == 2_000
