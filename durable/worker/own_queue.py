"""A queue that this worker alone consumes, for runs that the others lack the code of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.utils.log import get_logger
from kombu.entity import Queue

if TYPE_CHECKING:
    from celery import Celery

logger = get_logger(__name__)


class OwnQueue:
    """Made at the first need: a fleet with the same code everywhere has none.

    What is lost with it (the queue goes when its worker does) is rung again
    like any other lost message.

    Args:
        app: whose broker.
        worker: Celery's ``WorkController``.
    """

    def __init__(self, app: Celery, worker: Any) -> None:
        self._app = app
        self._worker = worker
        self._queue: Queue | None = None

    def open(self) -> Queue | None:
        """Have the worker consume it; the queue. None: the worker has no consumer yet."""
        consumer = getattr(self._worker, "consumer", None)
        if consumer is None or getattr(consumer, "task_consumer", None) is None:
            return None
        if self._queue is None:
            name = f"durable.{self._worker.hostname}"
            self._queue = self._app.amqp.queues.select_add(
                Queue(name, routing_key=name, auto_delete=True)  # type: ignore[no-untyped-call]
            )
            logger.info("queue %s takes runs that other workers lack the code of", name)
            # In the consumer's own thread, as Celery's `add_consumer` does it.
            # After a reconnect Celery consumes whatever is selected.
            consumer.call_soon(consumer.add_task_queue, name)
        return self._queue
