"""Durable workflows for Celery: steps remembered in Postgres, nothing new to run."""

from durable.app import Durable
from durable.context import (
    current,
    idempotency_key,
    is_replaying,
    now,
    random,
    session,
    set_progress,
    uuid4,
)
from durable.continuing import continue_as_new
from durable.errors import EventTimeout, PermanentError, RecoverableError, TransientError
from durable.patching import patched
from durable.steps import run_step, step
from durable.task import Workflow, workflow
from durable.waiting import send_event, sleep, sleep_until, wait_for_event

__all__ = [
    "Durable",
    "EventTimeout",
    "PermanentError",
    "RecoverableError",
    "TransientError",
    "Workflow",
    "continue_as_new",
    "current",
    "idempotency_key",
    "is_replaying",
    "now",
    "patched",
    "random",
    "run_step",
    "send_event",
    "session",
    "set_progress",
    "sleep",
    "sleep_until",
    "step",
    "uuid4",
    "wait_for_event",
    "workflow",
]
