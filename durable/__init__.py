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
from durable.errors import PermanentError, RecoverableError, TransientError
from durable.steps import run_step, step
from durable.task import Workflow, workflow

__all__ = [
    "Durable",
    "PermanentError",
    "RecoverableError",
    "TransientError",
    "Workflow",
    "current",
    "idempotency_key",
    "is_replaying",
    "now",
    "random",
    "run_step",
    "session",
    "set_progress",
    "step",
    "uuid4",
    "workflow",
]
