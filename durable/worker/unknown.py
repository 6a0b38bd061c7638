"""A message of a run whose task this worker has not, or not as a workflow: another one gets it."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger

from durable.start import DOORBELL
from durable.task import Workflow

logger = get_logger(__name__)


class UnknownWorkflows(bootsteps.StartStopStep):
    """On the *consumer* blueprint: stands before Celery's answer to an unknown task.

    Celery stores FAILURE under the id and says so to monitors. A plain task of
    that name, which the code has before or after it was durable, would run
    without its arguments, beside the run.
    """

    requires = ("celery.worker.consumer:Tasks",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._parent = parent
        self._durable = parent.app.durable
        celery_answer, update_strategies = parent.on_unknown_task, parent.update_strategies

        def on_unknown_task(body: Any, message: Any, exc: Exception) -> Any:
            if not message.headers.get(DOORBELL):
                return celery_answer(body, message, exc)
            return self._hand_back(message, "does not have the task")

        def update() -> None:
            update_strategies()
            for name, task in parent.app.tasks.items():
                if not isinstance(task, Workflow):
                    parent.strategies[name] = self._guarded(parent.strategies[name])

        parent.on_unknown_task = on_unknown_task
        parent.update_strategies = update

    def _guarded(self, handle: Any) -> Any:
        def on_message(message: Any, *args: Any, **kwargs: Any) -> Any:
            if message.headers.get(DOORBELL):
                return self._hand_back(message, "has it as a plain task")
            return handle(message, *args, **kwargs)

        return on_message

    def _hand_back(self, message: Any, why: str) -> None:
        run_id, name = message.headers["id"], message.headers["task"]
        logger.warning(
            "run %s is of workflow %r, and this worker %s: it goes to one that has the workflow."
            " Should this worker consume that queue?",
            run_id,
            name,
            why,
        )
        message.ack_log_error(logger, self._parent.connection_errors)
        self._durable.hand_back(run_id)
