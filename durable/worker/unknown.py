"""A message for a workflow that this worker has not: the run waits for one that has."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger

from durable.start import DOORBELL

logger = get_logger(__name__)

_REST = 1.0


class UnknownWorkflows(bootsteps.StartStopStep):
    """On the *consumer* blueprint: stands before Celery's answer to an unknown task.

    Celery stores FAILURE under the id and says so to monitors. A run is in
    Postgres, and the dispatchers ring what some live worker has registered.
    """

    requires = ("celery.worker.consumer:Tasks",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        celery_answer = parent.on_unknown_task
        durable = parent.app.durable

        def on_unknown_task(body: Any, message: Any, exc: Exception) -> Any:
            if not message.headers.get(DOORBELL):
                return celery_answer(body, message, exc)
            run_id, name = message.headers["id"], message.headers["task"]
            logger.error(
                "run %s is for the unregistered task %r: it waits for a worker that has it."
                " Does this worker lack an import, or should it not consume that queue?",
                run_id,
                name,
            )
            message.reject_log_error(logger, parent.connection_errors)
            return durable.ring_again(run_id, _REST)

        parent.on_unknown_task = on_unknown_task
