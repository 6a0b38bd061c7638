"""A durable task that only workers know; imported by none but them."""

from __future__ import annotations

from celery import current_app

from durable import Workflow


@current_app.task(name="shared.of_workers", base=Workflow)
def of_workers() -> str:
    return "done"
