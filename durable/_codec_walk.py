"""The codec's slow way: make a value plain JSON data, or say where it cannot be."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict
from enum import Enum
from typing import TYPE_CHECKING, Any

from durable._classes import full_name
from durable._codec_types import (
    FIELDS_SET,
    TYPE,
    VALUE,
    Envelope,
    Refusal,
    from_envelope,
    kombu_form,
    to_envelope,
)
from durable._plain_words import without_input

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: How much deeper one could go depends on the stack that is left; at replay that may be less.
MAX_DEPTH = 100

SCALARS = frozenset((str, int, float, bool, type(None)))

_DICTS = frozenset((dict, OrderedDict, defaultdict, Counter))
_BUILTINS = (str, int, float, dict, list, tuple)

to_json = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode
from_json = json.JSONDecoder(object_hook=from_envelope).decode


class Walk:
    """Walks one value.

    Args:
        keep_tuples: whether a tuple gets an envelope or becomes a list.
    """

    def __init__(self, *, keep_tuples: bool) -> None:
        self._keep_tuples = keep_tuples
        self._open: list[object] = []  # the containers around the present one

    def to_plain(self, value: Any) -> Any:
        """Dicts, lists and scalars, of exactly these types, that stand for the value.

        Raises:
            Refusal: it cannot be stored; the path leads to the element.
        """
        kind = type(value)
        if kind in SCALARS:
            return _checked_scalar(value)
        self._enter(value)
        if kind in _DICTS:
            plain: Any = self._mapping(value)
        elif kind is list:
            plain = self._sequence(value)
        else:
            plain = self._other(value)
        self._open.pop()  # not after a Refusal: that ends the walk
        return plain

    def _enter(self, value: object) -> None:
        if any(value is outer for outer in self._open):
            raise Refusal("it contains itself", "break the circle, for example with an id")
        if len(self._open) >= MAX_DEPTH:
            raise Refusal(f"it is nested more than {MAX_DEPTH} deep", "flatten it")
        self._open.append(value)

    def _mapping(self, value: Mapping[Any, Any]) -> dict[str, Any]:
        plain = {_checked_key(key): self._at(_segment(key), item) for key, item in value.items()}
        if TYPE in plain:
            # The user's own data looks like an envelope; as pairs it cannot be taken for one.
            return {TYPE: "durable:dict", VALUE: [list(pair) for pair in plain.items()]}
        return plain

    def _sequence(self, value: Iterable[Any]) -> list[Any]:
        return [self._at(index, item) for index, item in enumerate(value)]

    def _at(self, place: str | int, value: object) -> Any:
        try:
            return self.to_plain(value)
        except Refusal as refusal:
            refusal.path.append(place if isinstance(place, str) else f"[{place}]")
            raise

    def _other(self, value: Any) -> Any:
        form = _form(value)
        if isinstance(form, Envelope):
            return self._envelope(value, form)
        if type(form) is tuple:
            plain = self._sequence(form)
            return {TYPE: "durable:tuple", VALUE: plain} if self._keep_tuples else plain
        if isinstance(form, dict) and form.keys() == {TYPE, VALUE}:  # kombu's envelope
            return {TYPE: form[TYPE], VALUE: self.to_plain(form[VALUE])}
        return self.to_plain(form)

    def _envelope(self, value: object, envelope: Envelope) -> dict[str, Any]:
        outer, self._keep_tuples = self._keep_tuples, True
        payload: Any = envelope.payload
        if isinstance(payload, (set, frozenset)):
            # Sorted, so that equal sets are equal text in every process.
            plain: Any = sorted(map(self.to_plain, payload), key=to_json)
        else:
            plain = self.to_plain(payload)
        self._keep_tuples = outer
        stored = {TYPE: envelope.marker, VALUE: plain}
        if envelope.fields_set is not None:
            stored[FIELDS_SET] = envelope.fields_set
        if not outer and isinstance(payload, (dict, set, frozenset)):
            # Only the outermost one: if the whole comes back equal, so do its parts.
            _check_comes_back(value, stored)
        return stored


def _check_comes_back(value: object, stored: dict[str, Any]) -> None:
    try:
        again = from_json(to_json(stored))
        if type(again) is type(value) and again == value:
            return
        reason = "what comes back is not equal to it"
    except Refusal as refusal:
        reason = refusal.problem
    except Exception as error:  # noqa: BLE001 - the classes' own __eq__
        reason = f"{type(error).__name__}: {without_input(error)}"
    raise Refusal(
        f"a {full_name(type(value))} does not survive storing ({reason})",
        "see that calling the class with its fields gives an equal object, or store plain values",
    )


def _form(value: Any) -> Any:
    """An Envelope, a tuple, or kombu's form: its own envelope, or data that stands for it."""
    try:
        if type(value) is tuple:
            return value
        if isinstance(value, Enum):  # before kombu, which would see the date in a (date, Enum)
            return to_envelope(value)
        return _registered_or_own_form(value)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(
            f"a {full_name(type(value))} failed to give its stored form "
            f"({type(error).__name__}: {error})",
            "store plain values",
        ) from error


def _registered_or_own_form(value: Any) -> Any:
    try:
        return kombu_form(value)
    except TypeError as error:
        cls = type(value)
        if isinstance(value, tuple) and hasattr(cls, "_fields"):
            return tuple(value)
        if isinstance(value, float) and full_name(cls) == "numpy.float64":
            return float(value)  # every mean and sum of numpy is one, and it is a float
        form = to_envelope(value)
        if form is None:
            raise _unknown(cls) from error
        return form


def _unknown(cls: type) -> Refusal:
    register = "register the type with kombu.utils.json.register_type"
    base = next((base.__name__ for base in _BUILTINS if issubclass(cls, base)), None)
    if base is None:
        return Refusal(
            f"a {full_name(cls)} has no stored form", f"store plain values, or {register}"
        )
    return Refusal(
        f"a {full_name(cls)} would come back as a plain {base}",
        f"store {base}(value), or {register}",
    )


def _checked_scalar(value: Any) -> Any:
    if type(value) is str:
        _check_text(value, "the text")
    elif type(value) is float and not math.isfinite(value):
        raise Refusal(f"{value} is not a JSON number", "use None or text")
    elif type(value) is int:
        try:
            int.__repr__(value)
        except ValueError as error:  # sys.set_int_max_str_digits()
            raise Refusal(str(error), "store it as bytes or as hexadecimal text") from error
    return value


def _checked_key(key: object) -> str:
    if type(key) is not str:
        raise Refusal(f"the key {key!r} is of type {type(key).__name__}", "use a string key")
    _check_text(key, "a key")
    return key


def _check_text(text: str, what: str) -> None:
    if "\0" in text:
        raise Refusal(f"{what} has a NUL (\\u0000), which Postgres cannot store", "remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(
            f"{what} has the lone surrogate {text[error.start]!a}, which is not Unicode text",
            "decode it with errors='replace', or store bytes",
        ) from error


def _segment(key: object) -> str:
    """How the path names a key: ``.price``, or ``['unit price']``."""
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"
