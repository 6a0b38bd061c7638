"""Checks payloads against what the receiving code expects."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from durable._plain_words import without_input
from durable.errors import OptionError

#: A type that pydantic can check, or a function from payload to value.
Schema = Any

#: Returns the value to use, or raises one of `MISFIT`.
Reader = Callable[[Any], Any]

#: What says that a payload does not fit: pydantic's errors are ValueErrors, and a
#: function that expects a dict raises any of these for a list. Else a bug would
#: have a stranger's payload fail the run.
MISFIT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)

_LONGEST_REASON = 2_000


def reader(schema: Schema | None) -> Reader | None:
    """Turn a schema into a function that returns the checked value or raises.

    Raises:
        OptionError: it is nothing that can check a payload.

    Example:
        >>> reader(int)("7")
        7
        >>> reader(None) is None
        True
        >>> reader("int")
        Traceback (most recent call last):
            ...
        durable.errors.OptionError: schema='int' cannot check a payload: give a function, or a \
type that pydantic can check, such as a model, a dataclass or list[int] (a name is no type)
    """
    if schema is None:
        return None
    if inspect.iscoroutinefunction(schema):
        raise OptionError(f"schema={schema!r} is an async function; give a plain one, or a type")
    if callable(schema) and not _is_type(schema):
        function: Reader = schema
        return function
    if isinstance(schema, str):  # it would be looked up among the names of this module
        raise _unusable(schema, "a name is no type")
    try:
        hash(schema)
    except TypeError:  # such as Annotated[int, [1]]
        return _adapter(schema)
    return _kept(schema)


def describe(misfit: BaseException) -> str:
    """Tell why a payload does not fit, for the event's record."""
    text = without_input(misfit) or type(misfit).__name__
    if not isinstance(misfit, (ValueError, TypeError, AssertionError)):
        text = f"{type(misfit).__name__}: {text}"  # a KeyError's text is the key alone
    # Postgres takes neither in a text.
    clean = text.replace("\0", "").encode(errors="replace").decode()
    return clean[:_LONGEST_REASON]


def _is_type(schema: Any) -> bool:
    """Tell types, also such as ``list[int]`` and ``A | B``, from functions."""
    if inspect.isroutine(schema):
        return False
    return (
        isinstance(schema, (type, typing.NewType))
        or typing.get_origin(schema) is not None
        or type(schema).__module__ == "typing"  # such as Any before Python 3.11
    )


def _adapter(schema: Schema) -> Reader:
    try:
        from pydantic import TypeAdapter
    except ImportError:
        raise OptionError(
            f"schema={schema!r} needs pydantic, which is not installed; or give a function"
        ) from None
    try:
        adapter = schema if isinstance(schema, TypeAdapter) else TypeAdapter(schema)
        if hasattr(adapter, "rebuild"):  # from 2.10 on, a name that is not known shows here only
            adapter.rebuild(raise_errors=True)
    except Exception as exc:
        raise _unusable(schema, f"{type(exc).__name__}: {exc}") from exc
    check: Reader = adapter.validate_python
    return check


def _unusable(schema: Schema, why: str) -> OptionError:
    return OptionError(
        f"schema={schema!r} cannot check a payload: give a function, or a type that pydantic"
        f" can check, such as a model, a dataclass or list[int] ({why.splitlines()[0]})"
    )


#: Making one costs about as much as a step, and each replay asks for it.
_kept = functools.lru_cache(maxsize=256)(_adapter)
