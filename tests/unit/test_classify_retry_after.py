from __future__ import annotations

from email.message import Message

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable.classify.retry_after import (
    CAP,
    Hint,
    from_headers,
    parse_milliseconds,
    parse_retry_after,
)

NOW = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110's examples


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 120 ", 120.0),
        (b"120", 120.0),
        (120, 120.0),
        ("1.5", 1.5),
        ("0", 0.0),
        ("Sun, 06 Nov 1994 08:49:47 GMT", 10.0),
        ("Sunday, 06-Nov-94 08:49:47 GMT", 10.0),
        ("Sun Nov  6 08:49:47 1994", 10.0),
        ("Sun, 06 Nov 1994 08:49:47", 10.0),
        ("Sun, 06 Nov 1994 09:49:47 +0100", 10.0),
    ],
)
def test_seconds_and_all_date_forms_are_read(value: object, seconds: float) -> None:
    assert parse_retry_after(value, now=NOW) == Hint(seconds)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, [], float("nan"), -(10**400)),
        *("", "soon", "-5", "nan", "1_000", "1 2", "\u0665"),
        "Sun, 06 Nov 1994 08:49:27 GMT",
        "Sun, 99 Nov 1994 08:49:27 GMT",
        "Sun, 06 Nov 1994",
    ],
)
def test_what_is_past_negative_or_malformed_is_ignored(value: object) -> None:
    assert parse_retry_after(value, now=NOW) is None


@pytest.mark.parametrize(
    "value",
    ["inf", "Infinity", "9" * 500, 10**400, "86401", "Fri, 31 Dec 9999 23:59:59 GMT", 1e300],
)
def test_more_than_a_day_is_capped_and_flagged(value: object) -> None:
    assert parse_retry_after(value, now=NOW) == Hint(CAP, capped=True)


def test_a_date_is_relative_to_the_response_s_own() -> None:
    """An hour of clock skew between the two hosts does not matter."""
    due, sent = "Sun, 06 Nov 1994 08:49:47 GMT", "Sun, 06 Nov 1994 08:49:37 GMT"
    assert parse_retry_after(due, now=NOW + 3600, date=sent) == Hint(10.0)
    assert parse_retry_after(due, now=NOW, date="yesterday") == Hint(10.0)


@given(st.one_of(st.text(), st.floats(), st.integers(), st.binary(), st.none()))
def test_nothing_that_a_server_sends_raises_or_exceeds_the_cap(value: object) -> None:
    for found in (parse_retry_after(value, now=NOW), parse_milliseconds(value)):
        assert found is None or 0 <= found.seconds <= CAP


def test_headers_are_found_in_mappings_of_every_kind() -> None:
    message = Message()
    message["retry-AFTER"] = "7"
    for headers in ({"Retry-After": "7"}, {"retry-after": "7"}, message):
        assert from_headers(headers, now=NOW) == Hint(7.0)
    assert from_headers(None, now=NOW) is None
    assert from_headers({}, now=NOW) is None


def test_milliseconds_are_asked_first_unless_they_are_broken() -> None:
    both = {"retry-after-ms": "250", "retry-after": "7"}
    assert from_headers(both, now=NOW, milliseconds=("retry-after-ms",)) == Hint(0.25)
    both["retry-after-ms"] = "later"
    assert from_headers(both, now=NOW, milliseconds=("retry-after-ms",)) == Hint(7.0)
