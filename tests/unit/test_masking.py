"""What is shown of values."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict, namedtuple
from typing import Any

import pydantic
import pytest

from durable._plain_words import without_input
from durable.codec import Codec
from durable.masking import Mask, Secret, mask

NAMES = ["password", "card_number"]
HIDDEN = "***"


@dataclasses.dataclass
class Login:
    user: str
    password: str


class Payment(pydantic.BaseModel):
    card_number: str
    cents: int


Point = namedtuple("Point", ["x", "password"])  # noqa: PYI024 - as users have them


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"password": "x", "user": "ada"}, {"password": HIDDEN, "user": "ada"}),
        ({"PassWord": 1, "Card-Number": 2}, {"PassWord": HIDDEN, "Card-Number": HIDDEN}),
        ({"cardNumber": {"first": 4111}}, {"cardNumber": HIDDEN}),
        ({"password_hint": "x", 7: "y"}, {"password_hint": "x", 7: "y"}),
        ([{"a": ({"password": "x"},)}], [{"a": ({"password": HIDDEN},)}]),
        (OrderedDict(password="x"), {"password": HIDDEN}),
        (Login("ada", "x"), {"Login": {"user": "ada", "password": HIDDEN}}),
        (Payment(card_number="x", cents=7), {"Payment": {"card_number": HIDDEN, "cents": 7}}),
        (Point(1, "x"), {"Point": {"x": 1, "password": HIDDEN}}),
        ("password", "password"),
    ],
)
def test_what_is_named_is_hidden_wherever_it_is(value: Any, shown: Any) -> None:
    before = repr(value)
    assert mask(value, NAMES) == shown
    assert repr(value) == before, "the value itself was changed"


def test_stored_json_is_masked_too() -> None:
    """Tools have only that: models and dataclasses are dicts in it, odd dicts are pairs."""
    values = [Login("ada", "x"), Payment(card_number="x", cents=7), Secret("x")]
    values += [{"__type__": "odd", "password": "x"}, pydantic.SecretStr("x")]
    stored = json.loads(Codec().encode(values, "a test"))
    assert '"x"' in json.dumps(stored)
    shown = json.dumps(mask(stored, NAMES))
    assert '"x"' not in shown
    assert shown.count(HIDDEN) == 5


def test_a_circle_ends() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert HIDDEN in repr(mask(circle, NAMES))


def pay(order: str, card_number: str, *more: str, cents: int = 0, **rest: str) -> None: ...


@pytest.mark.parametrize(
    ("args", "kwargs", "shown"),
    [
        (("o", "x"), {}, (("o", HIDDEN), {})),
        (("o",), {"Card_Number": "x"}, (("o",), {"Card_Number": HIDDEN})),
        (("o", "x", "y", "z"), {}, (("o", HIDDEN, "y", "z"), {})),
        (["o", "x"], {"password": "x"}, (["o", HIDDEN], {"password": HIDDEN})),
        (("o", "x"), {"cents": 7}, (("o", HIDDEN), {"cents": 7})),
    ],
)
def test_positional_arguments_have_the_names_of_the_parameters(
    args: Any, kwargs: Any, shown: Any
) -> None:
    assert Mask(NAMES).arguments(pay, args, kwargs) == shown


def test_without_names_nothing_is_copied() -> None:
    value = {"password": "x"}
    assert Mask().arguments(pay, (value,), {})[0][0] is value


def test_a_secret_shows_nothing_and_is_stored_whole() -> None:
    secret = Secret({"card": "4111"})
    assert "4111" not in f"{secret!r} {secret} {secret:}" + str([secret])
    assert Codec().decode(Codec().encode(secret, "a test")) == secret
    assert secret.get_secret_value() == {"card": "4111"}
    assert secret != Secret("other")


@pytest.mark.parametrize("secret", [pydantic.SecretStr("x"), pydantic.SecretBytes(b"x")])
def test_a_secret_of_pydantic_is_stored_whole(secret: Any) -> None:
    assert Codec().decode(Codec().encode([secret], "a test")) == [secret]


class Account(pydantic.BaseModel):
    owner: str = pydantic.Field(alias="Owner")
    secret: pydantic.SecretStr
    keys: dict[int, list[pydantic.SecretBytes]] = {}


def test_a_model_with_secrets_is_stored_whole_and_masked_in_what_is_stored() -> None:
    account = Account(Owner="ada", secret="hunter2", keys={7: [b"hunter2"]})  # type: ignore[arg-type]
    text = Codec().encode([account], "a test")
    [again] = Codec().decode(text)
    assert again == account
    assert (again.secret.get_secret_value(), again.keys[7][0].get_secret_value()) == (
        "hunter2",
        b"hunter2",
    )
    shown = json.dumps(mask(json.loads(text)))
    assert "hunter2" not in shown
    assert "ada" in shown


def test_what_pydantic_refuses_is_not_repeated() -> None:
    class Card(pydantic.BaseModel):
        number: int

    with pytest.raises(pydantic.ValidationError) as caught:
        Card.model_validate({"number": "hunter2"})
    assert "hunter2" in str(caught.value)
    assert without_input(caught.value) == (
        "number: Input should be a valid integer, unable to parse string as an integer"
    )
