from __future__ import annotations

import math
from contextlib import suppress
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from durable.durations import LONGEST, parse_duration, parse_seconds
from durable.errors import OptionError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (timedelta(minutes=3), timedelta(minutes=3)),
        (0, timedelta(0)),
        (90, timedelta(seconds=90)),
        (1.5, timedelta(seconds=1, milliseconds=500)),
        ("0s", timedelta(0)),
        ("500ms", timedelta(milliseconds=500)),
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("48h", timedelta(hours=48)),
        ("7d", timedelta(days=7)),
        ("2w", timedelta(weeks=2)),
        ("1h30m", timedelta(minutes=90)),
        ("1w2d3h4m5s6ms", timedelta(9, 3 * 3600 + 4 * 60 + 5, 6000)),
        (" 1h 30m ", timedelta(minutes=90)),
        ("1.5h", timedelta(minutes=90)),
        ("0.1s", timedelta(milliseconds=100)),
    ],
)
def test_each_accepted_form_is_read(value: object, expected: timedelta) -> None:
    assert parse_duration(value, name="timeout") == expected


@pytest.mark.parametrize(
    "value",
    [True, False, None, [], b"90s", math.nan, "", "  ", "90", "s", "h1", "1y", "1H", "1 h", "-5s",
     "1h2h", "30m1h", "1e3s", "1.s", ".5s", "1h30", "٣s", "90s\n90s", object()],
)  # fmt: skip
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(OptionError, match="is not a duration"):
        parse_duration(value, name="timeout")


@pytest.mark.parametrize("value", [-1, -0.001, timedelta(microseconds=-1)])
def test_a_negative_duration_is_refused(value: object) -> None:
    with pytest.raises(OptionError, match="is negative"):
        parse_duration(value, name="timeout")


@pytest.mark.parametrize(
    "value",
    [math.inf, 10**400, 1e300, "101000000h", f"{'9' * 400}d", LONGEST + timedelta(microseconds=1)],
)
def test_more_than_a_hundred_years_is_refused(value: object) -> None:
    with pytest.raises(OptionError, match="longer than a hundred years"):
        parse_duration(value, name="timeout")


def test_a_hundred_years_are_accepted() -> None:
    assert parse_duration(LONGEST, name="timeout") == LONGEST


def test_the_error_names_the_option_the_value_and_what_to_give() -> None:
    with pytest.raises(OptionError) as caught:
        parse_duration("5 minutes", name="retry_backoff_max")
    message = str(caught.value)
    assert message.startswith("retry_backoff_max='5 minutes' is not a duration. Give a timedelta")
    assert "'48h'" in message


def test_the_error_shows_only_the_beginning_of_a_long_value() -> None:
    with pytest.raises(OptionError) as caught:
        parse_duration("x" * 10_000, name="timeout")
    assert len(str(caught.value)) < 400


def test_seconds_are_a_float() -> None:
    seconds = parse_seconds("1m500ms", name="timeout")
    assert seconds == 60.5
    assert type(parse_seconds(1, name="timeout")) is float


@settings(deadline=None)
@given(st.timedeltas(timedelta(0), LONGEST))
def test_a_timedelta_stays_as_it_is(value: timedelta) -> None:
    assert parse_duration(value, name="timeout") == value


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, 500)] * 6))
def test_units_add_up(numbers: tuple[int, ...]) -> None:
    w, d, h, m, s, ms = numbers
    expected = timedelta(weeks=w, days=d, hours=h, minutes=m, seconds=s, milliseconds=ms)
    assert parse_duration(f"{w}w{d}d{h}h{m}m{s}s{ms}ms", name="timeout") == expected


@settings(deadline=None)
@given(st.text(alphabet="0123456789.wdhms -", max_size=12))
def test_text_is_either_read_or_refused(text: str) -> None:
    with suppress(OptionError):
        assert timedelta(0) <= parse_duration(text, name="timeout") <= LONGEST
