"""Checks payloads against what the receiving code expects."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

#: A type that pydantic can check, or a function from payload to value.
Schema = Any


def reader(schema: Schema | None) -> Callable[[Any], Any] | None:
    """Turn a schema into a function that returns the checked value or raises ValueError.

    Example:
        >>> reader(int)("7")
        7
        >>> reader(None) is None
        True
    """
    if schema is None:
        return None
    if inspect.isroutine(schema) or (callable(schema) and not _is_type(schema)):
        function: Callable[[Any], Any] = schema
        return function
    from pydantic import TypeAdapter

    return TypeAdapter(schema).validate_python


def check(read: Callable[[Any], Any], payload: Any) -> str | None:
    """Tell why a payload does not fit; None: it does."""
    try:
        read(payload)
    except (ValueError, TypeError, LookupError) as exc:
        return str(exc) or type(exc).__name__
    return None


def _is_type(schema: Any) -> bool:
    """Tell types, also such as ``list[int]`` and ``A | B``, from functions."""
    typing = sys.modules.get("typing")
    return isinstance(schema, type) or bool(typing and typing.get_origin(schema) is not None)
