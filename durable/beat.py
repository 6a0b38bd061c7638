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

#: Id of the run that the entry being applied is to start.
entry_run_id: ContextVar[str | None] = ContextVar("durable_entry_run_id", default=None)


def install(durable: Durable) -> None:
    """Have the schedulers of this app's beats give their runs derived ids."""

    def on_beat_init(sender: Any = None, **_: Any) -> None:
        scheduler = getattr(sender, "scheduler", None)
        if scheduler is not None and scheduler.app is durable.app:
            _wrap(scheduler, durable)

    signals.beat_init.connect(on_beat_init, weak=False)
    signals.beat_embedded_init.connect(on_beat_init, weak=False)


def _wrap(scheduler: Any, durable: Durable) -> None:
    apply_async = scheduler.apply_async

    def apply_entry(entry: Any, *args: Any, **kwargs: Any) -> Any:
        token = entry_run_id.set(run_id_of(entry, durable.clock.now(), durable.settings.namespace))
        try:
            return apply_async(entry, *args, **kwargs)
        finally:
            entry_run_id.reset(token)

    scheduler.apply_async = apply_entry


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
