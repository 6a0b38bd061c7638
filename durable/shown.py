"""Celery's representation of a run's result, masked: it goes into the log, and by events to Flower."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from celery import _state
from celery.app import trace

from durable.task import Workflow


def install() -> None:
    """Replace what makes it, once in a process; Celery offers no seam there."""
    if not hasattr(trace.saferepr, "__wrapped__"):
        trace.saferepr = _masked(trace.saferepr)


def _masked(saferepr: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(saferepr)
    def shown(value: Any, *args: Any, **kwargs: Any) -> str:
        task = _state.get_current_task()
        if isinstance(task, Workflow) and getattr(task.app, "durable", None) is not None:
            mask = task.app.durable.mask
            if mask.hides_all and value is not None:
                return str(mask.shown(value))
            if mask.changes:
                value = mask.value(value)
        return saferepr(value, *args, **kwargs)

    return shown
