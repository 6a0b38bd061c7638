"""Beat: one run per entry and due time, however many beats are running."""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.schedules import crontab, schedule

if TYPE_CHECKING:
    from durable.app import Durable

#: Task of the entry that is being applied, and the id of the run that it is to start.
_applied: ContextVar[tuple[str, str] | None] = ContextVar("durable_applied_entry", default=None)


def id_of_entry(task_name: str) -> str | None:
    """Return the id for this task if beat is just applying an entry for it."""
    name, run_id = _applied.get() or ("", None)
    return run_id if name == task_name else None


def install(durable: Durable) -> None:
    """Have the schedulers of this app's beats give their runs derived ids."""

    def on_beat_init(sender: Any = None, **_: Any) -> None:
        scheduler = getattr(sender, "scheduler", None)
        if scheduler is not None and scheduler.app is durable.app:
            _wrap(scheduler, durable)

    signals.beat_init.connect(on_beat_init, weak=False)  # an embedded beat sends it too


def _wrap(scheduler: Any, durable: Durable) -> None:
    apply_async, reserve = scheduler.apply_async, scheduler.reserve
    reserved: dict[str, datetime] = {}

    def note_reserved(entry: Any) -> Any:
        reservation = reserve(entry)
        reserved[entry.name] = reservation.last_run_at or durable.clock.now()
        return reservation

    def apply_entry(entry: Any, producer: Any = None, advance: bool = True, **kwargs: Any) -> Any:
        if advance:
            entry = scheduler.reserve(entry)
        # The next time is counted from the reservation, so two in a row are never in one period.
        at = reserved.get(entry.name) or durable.clock.now()
        token = _applied.set((entry.task, run_id_of(entry, at, durable.settings.namespace)))
        try:
            return apply_async(entry, producer=producer, advance=False, **kwargs)
        finally:
            _applied.reset(token)

    scheduler.reserve, scheduler.apply_async = note_reserved, apply_entry


def run_id_of(entry: Any, now: datetime, namespace: str) -> str:
    """Derive a run's id from entry and due time: equal for all beats that share the schedule.

    An interval's due times are its multiples since the epoch, a crontab's are
    whole minutes: beats that started at other moments come to the same one.
    """
    due = _due_time(entry.schedule, now)
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{namespace}/{entry.name}/{entry.task}/{due}"))


def _due_time(when: Any, now: datetime) -> int:
    seconds = now.timestamp()
    period = 60.0
    if isinstance(when, schedule) and not isinstance(when, crontab):
        period = max(when.run_every.total_seconds(), 1e-3)
    return int(seconds // period)
