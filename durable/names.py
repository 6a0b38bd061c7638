"""What may name a step, an event, a change, a key: text that Postgres can store and index."""

from __future__ import annotations

from typing import TypeGuard

#: Characters of a name: many are part of a primary key.
LONGEST_NAME = 255


def is_name(value: object) -> TypeGuard[str]:
    """Tell whether a value can be a name.

    Example:
        >>> is_name("approval"), is_name(" "), is_name(None), is_name("x" * 256)
        (True, False, False, False)
    """
    return (
        type(value) is str
        and bool(value.strip())
        and value.isprintable()
        and len(value) <= LONGEST_NAME
    )
