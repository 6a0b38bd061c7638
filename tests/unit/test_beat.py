"""The id of a scheduled run: one per entry and due time, whichever beat applies the entry."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

import pytest
from celery.schedules import crontab, schedule

from durable.beat import run_id_of

NOON = datetime(2030, 1, 1, 12, 0, 0, tzinfo=timezone.utc)


@dataclass
class Entry:
    name: str = "nightly"
    task: str = "shop.report"
    schedule: object = field(default_factory=lambda: schedule(10.0))


def seconds(number: float) -> datetime:
    return NOON + timedelta(seconds=number)


def test_it_is_a_uuid() -> None:
    assert uuid.UUID(run_id_of(Entry(), NOON, "default"))


def test_beats_that_started_at_other_moments_come_to_one_id_a_period() -> None:
    one, another = [3, 13, 23], [9, 19, 29]
    ids = [
        [run_id_of(Entry(), seconds(at), "default") for at in moments] for moments in (one, another)
    ]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 3


@pytest.mark.parametrize("period", [0.5, 10.0, 86_400.0])
def test_runs_a_period_apart_never_share_an_id(period: float) -> None:
    entry = Entry(schedule=schedule(period))
    moments = [seconds(0.37 + n * period * 1.001) for n in range(200)]
    assert len({run_id_of(entry, moment, "default") for moment in moments}) == 200


def test_a_crontab_goes_by_the_minute() -> None:
    entry = Entry(schedule=crontab())
    assert run_id_of(entry, seconds(0.2), "a") == run_id_of(entry, seconds(59), "a")
    assert run_id_of(entry, seconds(0.2), "a") != run_id_of(entry, seconds(60), "a")


def test_the_time_zone_does_not_matter() -> None:
    elsewhere = NOON.astimezone(timezone(timedelta(hours=9)))
    assert run_id_of(Entry(), NOON, "a") == run_id_of(Entry(), elsewhere, "a")


@pytest.mark.parametrize(
    ("entry", "namespace"),
    [(Entry(name="hourly"), "a"), (Entry(task="shop.other"), "a"), (Entry(), "b")],
)
def test_another_entry_task_or_namespace_is_another_run(entry: Entry, namespace: str) -> None:
    assert run_id_of(entry, NOON, namespace) != run_id_of(Entry(), NOON, "a")
