"""How long the other side asks to wait (RFC 9110, section 10.2.3)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

#: Nobody means to be asked again in a week. urllib3 caps at 6 h, after an overflow;
#: a day leaves room for daily quotas.
CAP = 24 * 3600.0

#: RFC 9110 has whole seconds; servers send fractions as well.
NUMBER = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE
)


class HasGet(Protocol):
    """A mapping of header names to values, whoever made it."""

    def get(self, name: str, /) -> Any:
        """The value of a header, or None."""


@dataclass(frozen=True)
class Hint:
    """A pause that was asked for.

    Attributes:
        seconds: from now, at most :data:`CAP`.
        capped: more was asked for.
    """

    seconds: float
    capped: bool = False


def parse_retry_after(value: object, *, now: float, date: object = None) -> Hint | None:
    """Read a ``Retry-After`` value: seconds or an HTTP date.

    Args:
        value: the header as it came; a fraction is accepted.
        now: seconds since the epoch, for a date.
        date: the response's own ``Date``. A date is relative to it where there
            is one, so that a skewed clock on either side does not matter.

    Returns:
        None if it is missing, malformed, negative or past.

    >>> parse_retry_after("120", now=0)
    Hint(seconds=120.0, capped=False)
    >>> parse_retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now=50)
    Hint(seconds=10.0, capped=False)
    >>> parse_retry_after("inf", now=0)
    Hint(seconds=86400.0, capped=True)
    """
    seconds = _number(value)
    if seconds is not None:
        return hint(seconds)
    due = _epoch(value)
    if due is None:
        return None
    sent = _epoch(date)
    left = due - (now if sent is None else sent)
    return hint(left) if left > 0 else None


def parse_milliseconds(value: object) -> Hint | None:
    """Read a value in milliseconds, as in ``retry-after-ms``.

    >>> parse_milliseconds("1500")
    Hint(seconds=1.5, capped=False)
    """
    number = _number(value)
    return None if number is None else hint(number / 1000)


def from_headers(
    headers: HasGet | None, *, now: float, milliseconds: tuple[str, ...] = ()
) -> Hint | None:
    """The pause that a response asks for.

    Args:
        headers: the response's headers, under whatever case.
        now: seconds since the epoch.
        milliseconds: a library's own headers in milliseconds, asked first.

    >>> from_headers({"retry-after": "3"}, now=0)
    Hint(seconds=3.0, capped=False)
    """
    if headers is None:
        return None
    for name in milliseconds:
        found = parse_milliseconds(_header(headers, name))
        if found is not None:
            return found
    return parse_retry_after(
        _header(headers, "Retry-After"), now=now, date=_header(headers, "Date")
    )


def hint(seconds: float) -> Hint | None:
    """A hint of that many seconds: None if negative or not a number, capped if huge."""
    if math.isnan(seconds) or seconds < 0:
        return None
    return Hint(min(seconds, CAP), capped=seconds > CAP)


def _header(headers: HasGet, name: str) -> object:
    found = headers.get(name)
    # A plain dict is not case-insensitive, and botocore's is in lower case.
    return headers.get(name.lower()) if found is None else found


def _number(value: object) -> float | None:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        value = value.strip()
        return float(value) if NUMBER.fullmatch(value) else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return None


def _epoch(value: object) -> float | None:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        return None
    try:
        moment = parsedate_to_datetime(value)
        if moment.tzinfo is None:  # "-0000" and the asctime form: UTC, says RFC 9110
            moment = moment.replace(tzinfo=timezone.utc)
        return moment.timestamp()
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
