"""The main process's side of a message: what happens before a child has it, or after it died."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.app.task import Context
from celery.exceptions import InvalidTaskError
from celery.utils.log import get_logger
from celery.utils.saferepr import saferepr
from celery.worker import state
from celery.worker.request import Request as CeleryRequest
from celery.worker.strategy import default as celery_strategy
from celery.worker.strategy import hybrid_to_proto2

from durable.call import SUBJECT
from durable.errors import OptionError, PayloadError, StoreError
from durable.masking import HIDDEN
from durable.start import DOORBELL
from durable.stored_message import CANVAS, REPRS

if TYPE_CHECKING:
    from celery import Celery

    from durable.task import Workflow

logger = get_logger(__name__)

#: Before a message that Postgres did not take goes back to the broker, in seconds.
_STORE_REST = 1.0


def strategy(task: Workflow, app: Celery, consumer: Any, **kwargs: Any) -> Any:
    """Celery's strategy, with a run made first of a message that came without one.

    Such messages come from producers that do not have the package, or do not
    know that the task is durable: ``send_task`` by name, ``celery call``,
    beat, the old half of a fleet. The broker's copy is the only one until the
    run is in Postgres, so it is acknowledged after that.
    """
    _ = task.durable  # a worker whose app has none is to say so now, not at each message
    handle = celery_strategy(task, app, consumer, **kwargs)

    def on_message(
        message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **more: Any
    ) -> Any:
        if message.headers.get(DOORBELL):
            return handle(message, body, ack, reject, callbacks, **more)
        try:
            delay = _accept(task, message)
        except (OptionError, PayloadError, TypeError, InvalidTaskError) as exc:
            logger.error(  # noqa: TRY400 - a refusal, not a fault of ours
                "message %s for %s is refused: %s", message.headers.get("id"), task.name, exc
            )
            return reject(logger, consumer.connection_errors, False)
        except StoreError as exc:
            logger.warning("message %s goes back to the broker: %s", message.headers.get("id"), exc)
            task.durable.clock.sleep(_STORE_REST)  # it is back at once: no storm of refusals
            return reject(logger, consumer.connection_errors, True)
        if delay is not None:  # Postgres keeps the time; no message has to wait in memory
            return ack(logger, consumer.connection_errors)
        message.headers.pop("expires", None)
        return handle(message, body, ack, reject, callbacks, **more)

    return on_message


def _accept(task: Workflow, message: Any) -> float | None:
    headers, properties, payload = message.headers, message.properties, message.payload
    if isinstance(payload, dict):  # Celery's first protocol, which some other languages speak
        payload, headers, *_ = hybrid_to_proto2(message, payload)
    args, kwargs, embed = payload
    stamps = headers.get("stamps") or {}
    names = {"link": "callbacks", "link_error": "errbacks", "chain": "chain", "chord": "chord"}
    assert names.keys() == set(CANVAS)
    timelimit = headers.get("timelimit") or (None, None)
    own = dict(Context(headers).headers or {})  # the user's
    info = message.delivery_info or {}
    shown = _shown(task, headers, tuple(args), kwargs)
    if task.durable.mask.changes:
        message.headers.update(shown)  # for Celery's own log and events in this process
    options = {
        **stamps,
        "stamped_headers": list(stamps),
        "headers": own,
        "subject": own.pop(SUBJECT, None),
        **{option: embed.get(key) for option, key in names.items()},
        "eta": headers.get("eta"),
        "expires": headers.get("expires"),
        "group_id": headers.get("group"),
        "group_index": headers.get("group_index"),
        "root_id": headers.get("root_id"),
        "parent_id": headers.get("parent_id"),
        "shadow": headers.get("shadow"),
        **shown,
        "ignore_result": headers.get("ignore_result"),
        "time_limit": timelimit[0],
        "soft_time_limit": timelimit[1],
        "priority": properties.get("priority"),
        "reply_to": properties.get("reply_to"),
        "queue": info.get("routing_key") if not info.get("exchange") else None,
        "exchange": info.get("exchange") or None,
        "routing_key": info.get("routing_key"),
    }
    return task.durable.starter.accept(task, headers["id"], args, kwargs, options)


def _shown(task: Workflow, headers: Any, args: Any, kwargs: Any) -> dict[str, str | None]:
    """What the message shows of its arguments; its producer knew nothing of ``durable_mask``.

    What Celery has made of them is made again, masked. Anything else may be
    the user's own words, or have a value in it that is to be masked.
    """
    given = {key: headers.get(key) for key in REPRS}
    mask = task.durable.mask
    if not mask.changes:
        return given
    amqp, levels = task.app.amqp, task.app.conf.task_repr_maxlevels
    sizes = {"argsrepr": amqp.argsrepr_maxsize, "kwargsrepr": amqp.kwargsrepr_maxsize}
    masked = dict(zip(REPRS, mask.arguments(task.run, args, kwargs), strict=True))
    return {
        key: mask.shown(masked[key], sizes[key], levels)
        if given[key] in {None, saferepr(value, sizes[key], levels)}
        else HIDDEN
        for key, value in zip(REPRS, (args, kwargs), strict=True)
    }


class Request(CeleryRequest):
    """A workflow's message in the worker's main process.

    Celery marks a task whose child died or was killed as failed, fires its
    errbacks and fails its chord. A run goes on instead: those words are held
    back, and what the row comes to say is told by the run's next message.
    """

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """Hold back what is not the run's end."""
        exc = exc_info.exception
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        if isinstance(exc, TimeLimitExceeded):
            return None  # on_timeout ends the run
        lost = isinstance(exc, (WorkerLostError, Terminated, SystemExit, KeyboardInterrupt))
        if not lost:
            return super().on_failure(
                exc_info, send_failed_event=send_failed_event, return_ok=return_ok
            )
        state.task_ready(self)
        self.acknowledge()
        self.send_event("task-retried", exception=repr(exc), traceback="")
        logger.warning("run %s lost its process (%s) and goes on", self.id, exc)
        self.task.durable.on_process_lost(self.id, self.worker_pid)
        return None

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Fail the run at its hard time limit; Celery is told by the run's next message."""
        if soft:
            super().on_timeout(soft, timeout)
            return
        state.task_ready(self)
        self.acknowledge()
        if state.should_terminate:  # a cold shutdown ends its tasks in this way
            self.task.durable.on_process_lost(self.id, self.worker_pid)
            return
        logger.error("hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
        self.task.durable.on_time_limit(self.id, timeout)

    def revoked(self) -> bool:
        """Never drop the message: a revoked run is canceled, and its message tells Celery so."""
        super().revoked()
        return False

    def _announce_revoked(
        self, reason: str, terminated: bool, signum: object, expired: bool
    ) -> None:
        state.revoked.discard(self.id)
        self.task.durable.cancel(self.id, "revoked")

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Show the arguments as text: the message has none, but their representation."""
        info: dict[str, Any] = super().info(safe=True)
        return info
