"""Classes by name: how a stored value says which class it was of."""

from __future__ import annotations

import importlib
from typing import Any


class NotImportable(Exception):
    """Another process could not import this class by its name."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}; {fix}")
        self.problem = problem
        self.fix = fix


def full_name(cls: type) -> str:
    """Name of the class for a message.

    Example:
        >>> full_name(OverflowError)
        'builtins.OverflowError'
    """
    return f"{cls.__module__}.{cls.__qualname__}"


def class_name(cls: type) -> str:
    """Name under which another process can import the class.

    Raises:
        NotImportable: when it cannot be imported under that name, or when something
            else would be.

    Example:
        >>> from decimal import Decimal
        >>> class_name(Decimal)
        'decimal:Decimal'
    """
    name = f"{cls.__module__}:{cls.__qualname__}"
    if "<locals>" in name:
        problem, fix = "is defined inside a function", "move the class to the top of a module"
    elif cls.__module__ == "__main__":
        problem = "is defined in the script that was started, which a worker cannot import"
        fix = "move the class into a module"
    elif not _is_found_as(name, cls):
        problem = "is not what an import of that name gives"
        fix = "give the class a module-level name of its own"
    else:
        return name
    raise NotImportable(f"the class {name} {problem}", fix)


def _is_found_as(name: str, cls: type) -> bool:
    try:
        return find_class(name) is cls
    except ImportError:
        return False


def find_class(name: str) -> type:
    """Import the class of that name.

    Raises:
        ImportError: there is no such class; the message says why.

    Example:
        >>> find_class("decimal:Decimal")
        <class 'decimal.Decimal'>
        >>> find_class("decimal:Decimaal")
        Traceback (most recent call last):
            ...
        ImportError: module 'decimal' has no attribute 'Decimaal'
    """
    module, _, qualified = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except Exception as error:  # the module is somebody else's code
        raise ImportError(str(error)) from error
    if not isinstance(found, type):
        raise ImportError(f"{name} is not a class")  # noqa: TRY004 - one exception for the caller
    return found
