"""What a forked child has to know of its parent's connections: they are not its own."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

#: What the parent opened, kept in a child so that nothing closes it there:
#: closing would say goodbye on a socket that the parent still uses.
_inherited: list[object] = []


def call_in_child(method: Callable[[], None]) -> None:
    """Have a bound method called in every child forked from now on, as long as its object lives."""
    reference = weakref.WeakMethod(method)
    os.register_at_fork(after_in_child=lambda: (living := reference()) and living())


def keep_inherited(opened: object) -> None:
    """Keep something of the parent's from being closed by its disposal in this child."""
    _inherited.append(opened)
