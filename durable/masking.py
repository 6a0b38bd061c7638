"""What people see of values: some names are secret, and some values say so themselves.

`mask` is the one function that decides. It is for messages, logs, errors and
tools; what is stored is complete.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from celery.utils.saferepr import saferepr
from kombu.utils.json import register_type

from durable._codec_types import TYPE, VALUE

T = TypeVar("T")

#: What stands in the place of a value.
HIDDEN = "***"

_SECRET_MARKERS = frozenset({"durable:secret", "durable:secretstr", "durable:secretbytes"})
_PAIRS = "durable:dict"
_DEEPEST = 100
_PAIR = 2


class Secret(Generic[T]):
    """A value that is stored and passed on, and never shown.

    Give it to a workflow as an argument, or return it from a step. In Postgres
    it is as readable as any other value unless ``durable_encryption_keys`` is set.

    Args:
        value: anything the codec can store.

    Example:
        >>> card = durable.Secret("4111 1111 1111 1111")
        >>> card
        Secret('***')
        >>> card.get_secret_value()
        '4111 1111 1111 1111'
    """

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def get_secret_value(self) -> T:
        """Return the value; the name is that of pydantic's secrets."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({HIDDEN!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __reduce__(self) -> tuple[Any, ...]:
        return Secret, (self._value,)


# With kombu, so that it also passes as an argument of a plain task or in canvas.
register_type(Secret, "durable:secret", Secret.get_secret_value, Secret)


def folded(name: str) -> str:
    """Return what is compared of a name: neither case nor underscores and hyphens count.

    Example:
        >>> folded("Card-Number") == folded("card_number") == folded("cardNumber")
        True
    """
    return "".join(filter(str.isalnum, name)).casefold()


def mask(value: Any, names: Collection[str] = ()) -> Any:
    """Copy a value, or JSON data as it is stored, with what is secret replaced by ``***``.

    Args:
        value: anything; dicts, lists, tuples, sets, dataclasses and pydantic models are
            looked into, up to a hundred levels.
        names: of keys and fields whose values are secret.

    Returns:
        The copy; a dataclass or a model becomes a dict of its fields under its class's name.

    Example:
        >>> mask({"user": "ada", "login": {"Password": "x"}, "pins": [Secret(1)]}, ["password"])
        {'user': 'ada', 'login': {'Password': '***'}, 'pins': [Secret('***')]}
    """
    return Mask(names).value(value)


class Mask:
    """`mask` with the names of an app, and for the arguments of a call.

    Args:
        names: ``durable_mask``.
        hides_all: whether all arguments and results are hidden, since they are encrypted
            in Postgres and would be in the clear in messages.

    Example:
        >>> def pay(order_id, password): ...
        >>> masked = Mask(["password"])
        >>> masked.arguments(pay, ("o-42", "hunter2"), {})
        (('o-42', '***'), {})
        >>> masked.shown("hunter2"), Mask(hides_all=True).shown("hunter2")
        ("'hunter2'", '***')
    """

    def __init__(self, names: Iterable[str] = (), *, hides_all: bool = False) -> None:
        self._names = frozenset(map(folded, names))
        self.hides_all = hides_all

    @property
    def changes(self) -> bool:
        """Whether anything but a `Secret` is hidden."""
        return self.hides_all or bool(self._names)

    def value(self, value: Any) -> Any:
        """Copy a value with what is secret replaced."""
        return self._masked(value, _DEEPEST)

    def arguments(
        self, function: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Mask the arguments of a call; positional ones have the names of the parameters."""
        if not self._names:
            return args, kwargs
        parameters = _positional(function)
        masked = [
            HIDDEN if self._is_secret(name) else self.value(each)
            for name, each in zip(_padded(parameters, len(args)), args, strict=True)
        ]
        return masked if isinstance(args, list) else tuple(masked), self.value(kwargs)

    def shown(self, value: Any, maxlen: int | None = None, maxlevels: int = 3) -> str:
        """Represent a value for people, as Celery does."""
        if self.hides_all:
            return HIDDEN
        # Without names there is nothing to replace: a `Secret` hides itself.
        text: str = saferepr(self.value(value) if self._names else value, maxlen, maxlevels)
        return text

    def _is_secret(self, name: object) -> bool:
        return isinstance(name, str) and folded(name) in self._names

    def _masked(self, value: Any, depth: int) -> Any:
        if depth == 0:
            return HIDDEN
        if isinstance(value, Mapping):
            return self._mapping(value, depth - 1)
        if isinstance(value, (list, set, frozenset)) or type(value) is tuple:
            items = [self._masked(item, depth - 1) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, tuple):  # a named one, whose fields have names
            return self._fields(value, getattr(value, "_fields", ()), depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._fields(value, [field.name for field in dataclasses.fields(value)], depth)
        fields = _model_fields(value)
        return value if fields is None else self._fields(value, fields, depth)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[Any, Any]:
        marker = value.get(TYPE)
        if marker in _SECRET_MARKERS:
            return {**value, VALUE: HIDDEN}
        if marker == _PAIRS and isinstance(value.get(VALUE), list):
            return {TYPE: marker, VALUE: [self._pair(pair, depth) for pair in value[VALUE]]}
        return {key: self._entry(key, item, depth) for key, item in value.items()}

    def _pair(self, pair: Any, depth: int) -> Any:
        if not isinstance(pair, list) or len(pair) != _PAIR:
            return self._masked(pair, depth)
        return [pair[0], self._entry(pair[0], pair[1], depth)]

    def _entry(self, name: object, value: Any, depth: int) -> Any:
        return HIDDEN if self._is_secret(name) else self._masked(value, depth)

    def _fields(self, value: Any, names: Iterable[str], depth: int) -> dict[str, Any]:
        fields = {name: self._entry(name, getattr(value, name), depth - 1) for name in names}
        return {type(value).__name__: fields}


def _positional(function: Callable[..., Any] | None) -> list[str]:
    """Names of the parameters that positional arguments go to, of a task's ``run``."""
    try:
        parameters = inspect.signature(function).parameters.values() if function else ()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in parameters if each.kind in kinds]


def _padded(names: Sequence[str], length: int) -> list[str]:
    """As many names as there are arguments: those of ``*args`` have none."""
    return [*names[:length], *[""] * (length - len(names))]


def _model_fields(value: Any) -> list[str] | None:
    """Fields of a pydantic model; None for anything else. Whoever made one has imported it."""
    base = getattr(sys.modules.get("pydantic.main"), "BaseModel", None)
    if base is None or not isinstance(value, base):
        return None
    return [*type(value).model_fields, *(value.model_extra or ())]
