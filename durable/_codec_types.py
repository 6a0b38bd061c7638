"""How the codec writes and reads values that JSON has no form for.

Each such value becomes ``{"__type__": marker, "__value__": payload}``, as in
kombu's JSON, whose types and markers are used as they are (``datetime``,
``uuid``, ``decimal``, ``bytes``, whatever ``register_type`` added). This module
adds ``durable:timedelta``, ``durable:set``, ``durable:frozenset``,
``durable:tuple``, ``durable:dict``, and the three that name a class:
``enum:tasks.orders:Color``, ``dataclass:...`` and ``pydantic:...``.

A marker from the database never makes this module run anything but the import
of the named module and the making of an enum member, a dataclass or a pydantic
model.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from kombu.utils import json as kombu_json

from durable._classes import NotImportable, class_name, find_class, full_name
from durable._plain_words import without_input

if TYPE_CHECKING:
    from collections.abc import Callable

TYPE, VALUE, FIELDS_SET = "__type__", "__value__", "__set__"

#: Kombu takes subclasses of these too; they come back as the plain type.
_KOMBU_TYPES = (datetime, date, time, UUID, Decimal, bytes)

_kombu_default: Callable[[object], object] = kombu_json.JSONEncoder().default


class Refusal(Exception):
    """A value that cannot be stored, or stored text that cannot be read.

    ``path`` grows from the inside out while the walk unwinds.
    """

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix
        self.path: list[str] = []


class Envelope(NamedTuple):
    """A marker with its payload, which still has to be made JSON."""

    marker: str
    payload: object
    fields_set: list[str] | None = None


def _is_model(cls: type) -> bool:
    # Whoever made a model has imported pydantic; nobody else needs it.
    pydantic = sys.modules.get("pydantic.main")
    base = getattr(pydantic, "BaseModel", None)
    return base is not None and issubclass(cls, base)


# --- writing -----------------------------------------------------------------


def to_envelope(value: object) -> Envelope | None:
    """Envelope for a value that JSON has no form for; None when it is of no known type."""
    cls = type(value)
    if isinstance(value, Enum):
        return _enum_envelope(value)
    if cls is timedelta:
        delta: Any = value
        parts = {"days": delta.days, "seconds": delta.seconds, "microseconds": delta.microseconds}
        return Envelope("durable:timedelta", parts)
    if cls is set or cls is frozenset:
        return Envelope(f"durable:{cls.__name__}", value)
    if dataclasses.is_dataclass(cls):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(cls)}
        return Envelope(_marker("dataclass", cls), fields)
    if _is_model(cls):
        return _model_envelope(value)
    return _secret_envelope(cls, value)


def _secret_envelope(cls: type, value: Any) -> Envelope | None:
    """Envelope for pydantic's secrets, which show nothing of themselves."""
    if not _is_secret(cls):
        return None
    return Envelope(f"durable:{cls.__name__.lower()}", value.get_secret_value())


def _is_secret(cls: type) -> bool:
    types = sys.modules.get("pydantic.types")
    return types is not None and cls in {types.SecretStr, types.SecretBytes}


def _told(secret: Any) -> str:
    """What a model's JSON has in the place of a secret."""
    value = secret.get_secret_value()
    return str(value) if isinstance(value, str) else value.decode()


def _read_secret(name: str, payload: object) -> object:
    import pydantic

    secret: object = getattr(pydantic, name)(payload)
    return secret


def kombu_form(value: object) -> object:
    """What kombu's JSON writes in the place of the value.

    Raises:
        TypeError: kombu does not know the type.
        Refusal: kombu would write something that comes back different.
    """
    if isinstance(value, bytes) and b"\0" in value:
        # Kombu writes bytes that are UTF-8 as text, and Postgres takes no NUL in one.
        form: object = {TYPE: "base64", VALUE: base64.b64encode(value).decode()}
    else:
        form = _kombu_default(value)
    if isinstance(value, _KOMBU_TYPES) and type(value) not in _KOMBU_TYPES:
        _check_same(value, form)
    return form


def _check_same(value: object, form: Any) -> None:
    """A pandas Timestamp is a datetime to kombu, and would lose its nanoseconds."""
    try:
        same = bool(kombu_json.object_hook(form) == value)
    except Exception:  # noqa: BLE001 - the subclass is somebody else's code
        same = False
    if not same:
        base = next(t.__name__ for t in _KOMBU_TYPES if isinstance(value, t))
        raise Refusal(
            f"{full_name(type(value))} would not come back equal as a plain {base}",
            f"store a plain {base} or text",
        )


def _marker(kind: str, cls: type) -> str:
    try:
        return f"{kind}:{class_name(cls)}"
    except NotImportable as error:
        raise Refusal(error.problem, error.fix) from error


def _enum_envelope(member: Enum) -> Envelope:
    cls = type(member)
    marker = _marker("enum", cls)
    # A combination of flags has no name on Python 3.10.
    flag = isinstance(member, Flag)
    if (cls(member.value) if flag else cls.__members__.get(member.name)) is not member:
        raise Refusal(f"{member!r} is not a member of {full_name(cls)}", "use a declared member")
    return Envelope(marker, member.value if flag else member.name)


def _model_envelope(model: Any) -> Envelope:
    """Pydantic's own JSON, in the first form that validates to an equal model."""
    cls = type(model)
    marker = _marker("pydantic", cls)
    reason = "the model that comes back is not equal to it"
    # The last two are for a model with secrets, which its own JSON does not tell.
    for dump, by_alias in product((_json_of_model, _json_and_secrets), (True, False)):
        try:
            dumped = dump(model, by_alias)
            again = _read_model(cls, dumped)
        except Exception as error:  # noqa: BLE001 - the model's own code
            reason = without_input(error)
            continue
        if again == model:
            given = model.model_fields_set
            return Envelope(
                marker, dumped, None if again.model_fields_set == given else sorted(given)
            )
    raise Refusal(
        f"a {full_name(cls)} does not survive its own JSON ({reason})",
        "store model_dump() of the parts that matter, or plain values",
    )


def _json_of_model(model: Any, by_alias: bool) -> Any:
    return model.model_dump(mode="json", round_trip=True, by_alias=by_alias, warnings=False)


def _json_and_secrets(model: Any, by_alias: bool) -> Any:
    """Pydantic's JSON with the secrets left in it, each of which gets its own envelope."""
    from pydantic_core import to_jsonable_python

    def jsonable(part: Any) -> Any:
        if isinstance(part, dict):
            keys = [next(iter(to_jsonable_python({key: None}))) for key in part]
            return dict(zip(keys, map(jsonable, part.values()), strict=True))
        if isinstance(part, (list, tuple, set, frozenset)):
            return [jsonable(item) for item in part]
        return part if _is_secret(type(part)) else to_jsonable_python(part)

    return jsonable(model.model_dump(round_trip=True, by_alias=by_alias, warnings=False))


# --- reading -----------------------------------------------------------------


def from_envelope(found: dict[str, Any]) -> Any:
    """The value of an envelope; what is no envelope is returned as it is.

    It is the ``object_hook`` of the decoder, so the payload was read already.

    Raises:
        Refusal: the marker or its class is not known here.
    """
    if TYPE not in found:
        return found
    marker, payload = found[TYPE], found.get(VALUE)
    kind, _, name = str(marker).partition(":")
    reader = _OWN_READERS.get(marker) if isinstance(marker, str) else None
    try:
        if reader is not None:
            return reader(payload)
        if name and kind in _CLASS_READERS:
            value = _CLASS_READERS[kind](_known_class(kind, name), payload)
            return _with_fields_set(value, found)
        return kombu_json.object_hook(found)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(
            f"the value of type {marker!r} cannot be read"
            f" ({type(error).__name__}: {without_input(error)})",
            "keep the type readable for as long as stored values use it (register_type has to "
            "run in this process too)",
        ) from error


def _known_class(kind: str, name: str) -> type:
    try:
        cls = find_class(name)
    except ImportError as error:
        raise Refusal(
            f"the class {name} cannot be imported ({error})",
            "keep it importable under its old name until no stored value uses it",
        ) from error
    if not _CLASS_CHECKS[kind](cls):
        raise Refusal(f"{name} is not of the kind {kind!r} any more", "give it its old kind again")
    return cls


def _read_enum(cls: Any, payload: object) -> Any:
    return cls[payload] if isinstance(payload, str) else cls(payload)


def _read_dataclass(cls: Any, payload: dict[str, object]) -> object:
    """Call the class as its user did; a field that it no longer has is left out."""
    fields = [field for field in dataclasses.fields(cls) if field.name in payload]
    value = cls(**{field.name: payload[field.name] for field in fields if field.init})
    for field in fields:
        if not field.init:
            object.__setattr__(value, field.name, payload[field.name])
    return value


def _read_model(cls: Any, payload: object) -> Any:
    # As JSON, not as Python objects: a strict model takes a date as text only there.
    return cls.model_validate_json(json.dumps(payload, default=_told))


def _with_fields_set(value: object, found: dict[str, Any]) -> object:
    if FIELDS_SET in found:  # past a frozen model's own __setattr__
        object.__setattr__(value, "__pydantic_fields_set__", set(found[FIELDS_SET]))
    return value


_OWN_READERS: dict[str, Callable[[Any], object]] = {
    "durable:timedelta": lambda parts: timedelta(**parts),
    "durable:set": set,
    "durable:frozenset": frozenset,
    "durable:tuple": tuple,
    "durable:dict": dict,
    "durable:secretstr": lambda text: _read_secret("SecretStr", text),
    "durable:secretbytes": lambda data: _read_secret("SecretBytes", data),
}
_CLASS_READERS: dict[str, Callable[[Any, Any], object]] = {
    "enum": _read_enum,
    "dataclass": _read_dataclass,
    "pydantic": _read_model,
}
_CLASS_CHECKS: dict[str, Callable[[type], bool]] = {
    "enum": lambda cls: issubclass(cls, Enum),
    "dataclass": dataclasses.is_dataclass,
    "pydantic": _is_model,
}
