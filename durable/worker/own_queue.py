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
        timeout: seconds to wait for a connection.

    Attributes:
        refused: whether the broker does not let this worker have the queue.
    """

    def __init__(self, app: Celery, worker: Any, timeout: float) -> None:
        self._app = app
        self._worker = worker
        self._timeout = timeout
        self._queue: Queue | None = None
        self.refused = False

    def open(self) -> Queue | None:
        """Have the worker consume it; the queue. None: the worker has no consumer yet, or may not.

        Raises:
            Exception: the broker is away; whatever the transport raises.
        """
        if self._queue is not None or self.refused:
            return self._queue
        consumer = getattr(self._worker, "consumer", None)
        if consumer is None or getattr(consumer, "task_consumer", None) is None:
            return None
        queue = Queue(self._name, routing_key=self._name, auto_delete=True)  # type: ignore[no-untyped-call]
        self._app.amqp.queues.add(queue)
        if not self._is_allowed(queue):
            return None
        self._app.amqp.queues.select_add(
            queue
        )  # after a reconnect Celery consumes what is selected
        # In the consumer's own thread, as Celery's `add_consumer` does it.
        consumer.call_soon(consumer.add_task_queue, queue.name)
        logger.info("queue %s takes runs that other workers lack the code of", queue.name)
        self._queue = queue
        return queue

    @property
    def _name(self) -> str:
        return f"durable.{self._worker.hostname}"

    def _is_allowed(self, queue: Queue) -> bool:
        """Try it on a connection of its own: a refusal closes the channel, and with it a consumer."""
        with self._app.connection_for_write(connect_timeout=self._timeout) as connection:
            try:
                bound: Any = queue(connection.default_channel)
                bound.declare()
                left = bound.get()
                if left is not None:
                    left.requeue()
            except connection.channel_errors as exc:
                self.refused = True
                logger.warning(
                    "the broker does not let this worker have the queue %s, so runs that other"
                    " workers lack the code of may go astray more than once: %s",
                    queue.name,
                    exc,
                )
                return False
        return True
