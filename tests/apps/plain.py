"""Celery alone, without durable: what the test harness itself is tried on."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

from tests.apps import settings_from_environment

app = Celery("plain")
app.conf.update(settings_from_environment())


@app.task(name="plain.add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="plain.hold")
def hold(here: str, gate: str) -> None:
    """Write the process id into the file ``here``, then stay busy until ``gate`` exists."""
    Path(here).write_text(str(os.getpid()))
    while not Path(gate).exists():
        time.sleep(0.01)


@app.task(name="plain.pid")
def pid() -> int:
    """Process id of whoever ran it."""
    return os.getpid()
