"""Durable workflows for Celery: steps remembered in Postgres, nothing new to run."""

from durable import aio
from durable.app import Durable
from durable.circuit_breaker import CircuitBreaker
from durable.compensation import compensate
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
from durable.errors import (
    CircuitOpen,
    EventTimeout,
    IdempotencyConflict,
    PermanentError,
    RecoverableError,
    TransientError,
)
from durable.fan_out import fan_out, gather
from durable.long_steps import heartbeat, heartbeat_details
from durable.masking import Secret
from durable.patching import patched
from durable.start_many import start_many
from durable.steps import run_step, step
from durable.task import Workflow, workflow
from durable.waiting import send_event, sleep, sleep_until, wait_for_event

__all__ = [
    "CircuitBreaker",
    "CircuitOpen",
    "Durable",
    "EventTimeout",
    "IdempotencyConflict",
    "PermanentError",
    "RecoverableError",
    "Secret",
    "TransientError",
    "Workflow",
    "aio",
    "compensate",
    "continue_as_new",
    "current",
    "fan_out",
    "gather",
    "heartbeat",
    "heartbeat_details",
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
    "start_many",
    "step",
    "uuid4",
    "wait_for_event",
    "workflow",
]
