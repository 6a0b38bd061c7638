"""Durations as people write them: ``timedelta``, seconds, ``"90s"``, ``"48h"``, ``"7d"``."""

from __future__ import annotations

import math
import re
from datetime import timedelta

from durable.errors import OptionError

#: Nobody means a longer one; a slip such as milliseconds for seconds does.
LONGEST = timedelta(days=36_525)

_ACCEPTED = (
    "a timedelta, a number of seconds, or text such as '500ms', '90s', '15m', '48h', '7d', '2w' "
    "or '1h30m' (units from the largest to the smallest, each once)"
)

_UNITS = {
    "w": "weeks",
    "d": "days",
    "h": "hours",
    "m": "minutes",
    "s": "seconds",
    "ms": "milliseconds",
}

# One optional group a unit, so that the order and "each once" come for free.
_TEXT = re.compile(
    "".join(rf"(?:(?P<{unit}>[0-9]+(?:\.[0-9]+)?){unit}\s*)?" for unit in _UNITS), re.ASCII
)


def parse_duration(value: object, *, name: str) -> timedelta:
    """Read a duration.

    Args:
        value: a ``timedelta``, a number of seconds (int or float), or text:
            one or more of ``w``, ``d``, ``h``, ``m``, ``s``, ``ms``, each
            with a number before it, from the largest to the smallest.
        name: the option that the value was given for; the error names it.

    Returns:
        The duration, from zero to a hundred years, to the microsecond.

    Raises:
        OptionError: for anything else: a bool, a negative or absurdly long
            duration, NaN, an infinity, empty text, an unknown unit.

    Example:
        >>> parse_duration("1h30m", name="timeout")
        datetime.timedelta(seconds=5400)
        >>> parse_duration(0.5, name="timeout")
        datetime.timedelta(microseconds=500000)
        >>> parse_duration("90", name="timeout")
        Traceback (most recent call last):
            ...
        durable.errors.OptionError: timeout='90' is not a duration. Give a timedelta, \
a number of seconds, or text such as '500ms', '90s', '15m', '48h', '7d', '2w' or '1h30m' \
(units from the largest to the smallest, each once).
    """
    try:
        duration = _read(value)
    except OverflowError:  # more than a timedelta can hold
        raise _refusal(name, value, "is longer than a hundred years") from None
    if duration is None:
        raise _refusal(name, value, "is not a duration")
    if duration < timedelta(0):
        raise _refusal(name, value, "is negative")
    if duration > LONGEST:
        raise _refusal(name, value, "is longer than a hundred years")
    return duration


def parse_seconds(value: object, *, name: str) -> float:
    """Read a duration as :func:`parse_duration` does, and return it in seconds.

    Example:
        >>> parse_seconds("2m", name="retry_backoff_max")
        120.0
    """
    return parse_duration(value, name=name).total_seconds()


def _read(value: object) -> timedelta | None:
    """The duration, or None for what is none; the sign and the size are not judged here."""
    if isinstance(value, timedelta):
        return value
    if isinstance(value, str):
        return _read_text(value.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    return timedelta(seconds=value)


def _read_text(text: str) -> timedelta | None:
    found = _TEXT.fullmatch(text)
    if found is None or not text:
        return None
    parts = {unit: float(number) for unit, number in found.groupdict().items() if number}
    return timedelta(**{_UNITS[unit]: number for unit, number in parts.items()})


def _refusal(name: str, value: object, problem: str) -> OptionError:
    shown = repr(value)
    if len(shown) > 80:  # noqa: PLR2004 - enough to recognise it
        shown = f"{shown[:77]}..."
    return OptionError(f"{name}={shown} {problem}. Give {_ACCEPTED}.")
