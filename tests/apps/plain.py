"""Celery alone, without durable: what the test harness itself is tried on."""

from __future__ import annotations

import os

from celery import Celery

from tests.apps import settings_from_environment

app = Celery("plain")
app.conf.update(settings_from_environment())


@app.task(name="plain.add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="plain.pid")
def pid() -> int:
    """Process id of whoever ran it."""
    return os.getpid()
