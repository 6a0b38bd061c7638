"""Checks of the retry options; each refusal names the option, the value and what is accepted."""

from __future__ import annotations

import difflib
import math

from durable.errors import OptionError

#: Least number of seconds; less is no pause, only rounding errors.
SHORTEST = 0.001


def refusal(name: str, value: object, accepted: str) -> OptionError:
    """The error for a value that is not accepted."""
    return OptionError(f"{name}={value!r}: give {accepted}.")


def check_count(name: str, value: object, accepted: str = "a whole number from 0") -> None:
    """Accept 0, 1, 2, ..."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise refusal(name, value, accepted)


def check_flag(name: str, value: object) -> None:
    """Accept a bool."""
    if not isinstance(value, bool):
        raise refusal(name, value, "True or False")


def check_seconds(name: str, value: object, accepted: str = "") -> None:
    """Accept a number of seconds from a millisecond up."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not SHORTEST <= value < math.inf
    ):
        raise refusal(name, value, accepted or f"seconds from {SHORTEST:g}")


def check_backoff(name: str, value: object) -> None:
    """Accept a bool, 0 (none), or seconds."""
    if not isinstance(value, bool) and value != 0:
        accepted = f"seconds from {SHORTEST:g}, True for 1 or False for none"
        check_seconds(name, value, accepted)


def check_classes(name: str, classes: object) -> None:
    """Accept a tuple of exception classes."""
    if not isinstance(classes, tuple):
        raise refusal(name, classes, "exception classes, as a tuple or a list")
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise refusal(name, classes, f"exception classes; {each!r} is none")


def as_tuple(classes: object) -> object:
    """Read one class or a list of them; anything else is left for the check."""
    if isinstance(classes, type):
        return (classes,)
    return tuple(classes) if isinstance(classes, (list, set, frozenset)) else classes


def advice(name: str, known: list[str]) -> str:
    """What to write instead of an unknown option."""
    if name == "retry_kwargs":
        return "Give its entries as options of their own: max_retries=5."
    if name in {"default_retry_delay", "countdown"}:
        return "Give retry_backoff (seconds before the first retry, then doubled)."
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
