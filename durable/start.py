"""How a run begins: validated, written to Postgres, then rung.

Everything that starts a task goes through ``app.send_task``: ``delay``,
``apply_async``, canvas, beat, ``celery call``. `Starter` stands in front of
it, takes the calls that are for workflows, and leaves the rest alone.
"""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from celery.exceptions import OperationalError
from celery.utils import uuid as celery_uuid
from celery.utils.log import get_logger
from celery.utils.saferepr import saferepr
from kombu.utils.json import dumps as dump_message
from kombu.utils.json import loads as load_message

from durable.beat import id_of_entry
from durable.durations import LONGEST, parse_seconds
from durable.errors import OptionError
from durable.publisher import Publisher
from durable.store import runs

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import AsyncResult

    from durable.app import Durable
    from durable.store.dispatch import Doorbell
    from durable.task import Workflow

logger = get_logger(__name__)

#: Header of a message whose run is in Postgres already.
DOORBELL = "durable"

#: Options that a later ring has to repeat. The rest is of this one call
#: (connections, producers) or has a column of its own (eta, expires).
_KEPT = (
    "queue",
    "exchange",
    "routing_key",
    "priority",
    "serializer",
    "compression",
    "delivery_mode",
    "headers",
    "time_limit",
    "soft_time_limit",
    "shadow",
    "group_id",
    "group_index",
    "root_id",
    "parent_id",
    "ignore_result",
    "replaced_task_nesting",
    "argsrepr",
    "kwargsrepr",
    "stamped_headers",
)

#: What is filled in from the row at the claim, and not sent along.
CANVAS = ("link", "link_error", "chain", "chord")

#: Which of these go into a message, and which say how it is sent.
_IN_PUBLISH = frozenset(
    {"queue", "exchange", "routing_key", "priority", "serializer", "compression", "delivery_mode"}
)
_IN_MESSAGE = ({*_KEPT, "reply_to"} - _IN_PUBLISH) - {"headers"}

_LATER = ("idempotency_key", "transaction")

#: What `apply_async` acts on.
_CALL_OPTIONS = frozenset(
    {
        *_KEPT,
        *_LATER,
        *CANVAS,
        "add_to_parent",
        "args",
        "connection",
        "countdown",
        "deadline",
        "eta",
        "expires",
        "kwargs",
        "producer",
        "publisher",
        "reply_to",
        "result_cls",
        "retry",
        "retry_policy",
        "route_name",
        "router",
        "task_id",
        "task_type",
    }
)
_TYPO_LIKENESS = 0.82

_PUBLISH_ERRORS = (OperationalError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one ``send_task`` that is for a workflow."""

    task: Workflow
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    options: dict[str, Any]


class Starter:
    """Starts runs for one app.

    Args:
        durable: settings, database and codec.
        send_task: the app's own ``send_task``.
    """

    def __init__(self, durable: Durable, send_task: Callable[..., Any]) -> None:
        self._durable = durable
        self._send_task = send_task
        self._publisher = Publisher(
            durable.app, lambda: durable.settings.publish_timeout, durable.clock.monotonic
        )

    @property
    def _app(self) -> Celery:
        return self._durable.app

    def send_task(
        self,
        name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """Start a run if ``name`` is a workflow; else do what Celery does."""
        from durable.task import Workflow

        task = options.get("task_type") or self._app._tasks.get(name)  # noqa: SLF001
        if task is None or isinstance(task, Workflow):
            options["task_id"] = options.get("task_id") or id_of_entry(name)
        if not isinstance(task, Workflow) or self._durable.settings.accept_only:
            return self._send_task(name, args, kwargs, **options)
        if "task_type" not in options:  # by name: the task's own options count too, as in Celery
            own = {key: each for key, each in task._get_exec_options().items() if each is not None}  # noqa: SLF001
            options = {**own, **options}
        return self._start(_Call(task, args or (), kwargs or {}, options))

    def ring(self, doorbell: Doorbell) -> None:
        """Publish the message of a run that is in Postgres.

        Not through ``send_task``: that subscribes this process to the result,
        which the dispatcher does not wait for.

        Raises:
            OperationalError: the broker did not take it in ``durable_publish_timeout``.
        """
        options = load_message(doorbell.message)
        self._publisher.publish(
            lambda producer: self._send(doorbell.id, doorbell.name, options, producer, retry=False)
        )

    def close(self) -> None:
        """Close this process's connections to the broker."""
        self._publisher.close()

    def accept(
        self, task: Workflow, run_id: str, args: Any, kwargs: Any, options: dict[str, Any]
    ) -> float | None:
        """Make a run of a message that came without one; the seconds it has to wait.

        Raises:
            StoreError: Postgres did not take it; the message must not be acknowledged.
        """
        call = _Call(task, args, kwargs, {**options, "task_id": run_id})
        run, _ = self._prepare(call, publish=True)
        self._durable.database.call(runs.insert, run)
        return run.delay

    def _start(self, call: _Call) -> AsyncResult[Any]:
        durable = self._durable
        run, message = self._prepare(call, publish=durable.broker_answers())
        created = durable.database.call(runs.insert, run)
        result = self._result(call, run.id)
        if not created:
            self._check_same(run)
        elif run.rung:
            self._ring_first(call, run.id, message)
        return result

    def _check_same(self, run: runs.NewRun) -> None:
        """A second call with an id is the same call again, but not if it is for another task."""
        existing = self._durable.database.call(runs.get, run.id, run.namespace)
        if existing is None or existing.name != run.name:
            theirs = "another namespace" if existing is None else f"workflow {existing.name!r}"
            raise OptionError(
                f"task_id={run.id!r} is the id of a run of {theirs} already, it cannot also be one"
                f" of {run.name!r}"
            )

    def _ring_first(self, call: _Call, run_id: str, message: dict[str, Any]) -> None:
        """Publish. The run is accepted whatever comes of it: the dispatcher rings again."""
        try:
            self._publish(call, run_id, message)
        except _PUBLISH_ERRORS as exc:
            logger.warning(
                "run %s is accepted, but the broker took no message (%r): a worker's dispatcher"
                " will send it",
                run_id,
                exc,
            )
            self._durable.broker_failed()
            self._durable.ring_again(run_id)

    def _publish(self, call: _Call, run_id: str, message: dict[str, Any]) -> None:
        options, backend = call.options, self._app.backend
        listens, by_rpc = not message.get("ignore_result"), "reply_to" in message

        def send(producer: Any, **policy: Any) -> None:
            if listens and by_rpc:  # declares the queue that results are sent to
                backend.on_task_call(producer, run_id)
            self._send(run_id, call.task.name, message, producer, **policy)

        own = self._callers_producer(options)
        if own is None:
            retry = options.get("retry") is not False
            self._publisher.publish(lambda producer: send(producer, retry=False), retry=retry)
        else:  # the caller's, and so are its time limits and retries
            policy = {key: options[key] for key in ("retry", "retry_policy") if key in options}
            with own.connection._reraise_as_library_errors():  # noqa: SLF001 - as Celery does
                send(own, **policy)
        if listens and not by_rpc:
            # Celery does this first. Its Redis backend waits two minutes for a
            # server that does not answer, and often that is the broker's.
            backend.on_task_call(None, run_id)

    def _callers_producer(self, options: Mapping[str, Any]) -> Any:
        """Return the producer that the caller chose; not the one of Celery's pool in canvas."""
        amqp = self._app.amqp
        if options.get("connection"):
            return amqp.Producer(options["connection"], auto_declare=False)
        given = options.get("producer") or options.get("publisher")
        pool = getattr(getattr(given, "__connection__", None), "_pool", None)
        return None if pool is not None and pool is amqp.producer_pool.connections else given

    def _send(
        self, run_id: str, name: str, options: dict[str, Any], producer: Any, **policy: Any
    ) -> None:
        """Make Celery's message of a run and give it to the broker."""
        amqp = self._app.amqp
        options = {"ignore_result": None, **options}  # None: the task's own word counts
        headers = {**(options.get("headers") or {}), DOORBELL: True}
        stamps = {header: options.get(header) for header in options.get("stamped_headers") or ()}
        message = amqp.create_task_message(
            run_id,
            name,
            create_sent_event=self._app.conf.task_send_sent_event,
            **{key: options[key] for key in _IN_MESSAGE if key in options},
            **stamps,
        )
        # Lists and dicts, whatever the serializer makes of tuples: the claim fills them in place.
        message = message._replace(body=([], {}, message.body[2]))
        publish = {key: options[key] for key in _IN_PUBLISH if key in options}
        amqp.send_task_message(producer, name, message, headers=headers, **publish, **policy)

    def _result(self, call: _Call, run_id: str) -> AsyncResult[Any]:
        options = call.options
        result = (options.get("result_cls") or self._app.AsyncResult)(run_id)
        result.ignored = options.get("ignore_result")
        parent = self._app.current_worker_task
        if options.get("add_to_parent", True) and parent:
            parent.add_trail(result)
        return result

    # --- what is written

    def _prepare(self, call: _Call, *, publish: bool) -> tuple[runs.NewRun, dict[str, Any]]:
        durable, options = self._durable, call.options
        _refuse(options)
        run_id = _checked_id(options.get("task_id") or celery_uuid())
        what = f"the arguments of {call.task.name!r}"
        _check_arguments(call)
        text = durable.codec.encode({"args": list(call.args), "kwargs": dict(call.kwargs)}, what)
        message = self._message(call)
        queue = self._route(call, message)
        delay = self._delay(options)
        run = runs.NewRun(
            id=run_id,
            namespace=durable.settings.namespace,
            name=call.task.name,
            input=text,
            message=dump_message(message),
            queue=queue,
            delay=delay,
            deadline=_seconds(options.get("deadline", call.task.deadline), "deadline"),
            expires=self._expires(options.get("expires", call.task.expires)),
            rung=publish and delay is None,
            ring_again=durable.settings.ring_interval,
            tail=self._has_tail(call),
        )
        return run, message

    def _message(self, call: _Call) -> dict[str, Any]:
        options, conf = call.options, self._app.conf
        given = {key: options.get(key) for key in _KEPT}
        message = {
            key: value for key, value in given.items() if value is not None and value is not False
        }
        if message.get("serializer") == conf.task_serializer:
            del message["serializer"]
        for header in message.get("stamped_headers") or ():
            message[header] = options.get(header)
        for key in CANVAS:
            if options.get(key):
                message[key] = _with_ids(options[key]) if key != "chord" else options[key]
        self._inherit(message, conf)
        amqp, maxlevels = self._app.amqp, conf.get("task_repr_maxlevels", 3)
        if call.args and "argsrepr" not in message:
            message["argsrepr"] = saferepr(call.args, amqp.argsrepr_maxsize, maxlevels=maxlevels)
        if call.kwargs and "kwargsrepr" not in message:
            message["kwargsrepr"] = saferepr(
                call.kwargs, amqp.kwargsrepr_maxsize, maxlevels=maxlevels
            )
        if self._app.backend.__class__.__name__ == "RPCBackend":
            message["reply_to"] = options.get("reply_to") or self._app.thread_oid
        return message

    def _inherit(self, message: dict[str, Any], conf: Any) -> None:
        parent = self._app.current_worker_task
        if parent is None:
            return
        request = parent.request
        message.setdefault("root_id", request.root_id or request.id)
        message.setdefault("parent_id", request.id)
        if conf.task_inherit_parent_priority:
            priority = (request.delivery_info or {}).get("priority")
            if priority is not None:
                message.setdefault("priority", priority)

    def _route(self, call: _Call, message: dict[str, Any]) -> str | None:
        """Find the queue once, so that every later ring goes the same way."""
        routing: dict[str, Any] = {
            key: message[key] for key in ("queue", "exchange", "routing_key") if key in message
        }
        if not routing and call.task.durable_routing:
            routing = dict(call.task.durable_routing)
        router = call.options.get("router") or self._app.amqp.router
        name = call.options.get("route_name") or call.task.name
        route = router.route(dict(routing), name, call.args, call.kwargs, call.task)
        queue = route.get("queue")
        queue_name = getattr(queue, "name", queue)
        for key in ("exchange", "routing_key"):
            if route.get(key) is not None:  # an Exchange knows its name
                message[key] = str(getattr(route[key], "name", route[key]))
        if "priority" in route:
            message.setdefault("priority", route["priority"])
        if queue_name is None:
            return None
        message["queue"] = str(queue_name)
        return str(queue_name)

    def _delay(self, options: Mapping[str, Any]) -> float | None:
        """Seconds until the run is due; None: now."""
        countdown, eta = options.get("countdown"), options.get("eta")
        if countdown is None and eta is None:
            return None
        delay = self._until(eta, "eta") if countdown is None else _from_now(countdown, "countdown")
        return delay if delay > 0 else None

    def _expires(self, expires: Any) -> float | None:
        if expires is None:
            return None
        if isinstance(expires, (str, datetime)):
            return max(0.0, self._until(expires, "expires"))
        return _from_now(expires, "expires")

    def _until(self, moment: Any, name: str) -> float:
        """Seconds from now to a date; naive ones are in the app's time zone, as in Celery."""
        if isinstance(moment, str):
            with suppress(ValueError):
                moment = datetime.fromisoformat(moment.replace("Z", "+00:00"))
        if not isinstance(moment, datetime):
            raise OptionError(f"{name}={moment!r} is not a date: give an aware datetime")
        now = self._durable.clock.now()
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=self._app.timezone)
        left: timedelta = moment - now
        if left > LONGEST:
            raise OptionError(f"{name}={moment} is more than a hundred years away")
        return left.total_seconds()

    def _has_tail(self, call: _Call) -> bool:
        """Tell whether Celery has something to deliver after the run's end."""
        if any(call.options.get(key) for key in CANVAS):
            return True
        ignored = call.options.get("ignore_result")
        if ignored is None:
            ignored = call.task.ignore_result
        return not ignored and self._durable.has_backend


def _check_arguments(call: _Call) -> None:
    """Refuse arguments that do not fit, also by ``send_task``, which Celery does not check."""
    check = getattr(call.task, "__header__", None)
    if check is not None and call.task.typing is not False:
        check(*call.args, **call.kwargs)


def _refuse(options: Mapping[str, Any]) -> None:
    for key in _LATER:
        if options.get(key) is not None:
            raise OptionError(f"{key}= is not available in this version")
    # Celery takes any option and gives it to the broker as a property of the
    # message, so only those are refused that look like one we would act on.
    for key in options.keys() - _CALL_OPTIONS - set(options.get("stamped_headers") or ()):
        close = difflib.get_close_matches(key, _CALL_OPTIONS, 1, _TYPO_LIKENESS)
        if close:
            raise OptionError(
                f"apply_async() does not know the option {key!r}. Did you mean {close[0]!r}?"
            )


def _from_now(value: object, name: str) -> float:
    """Read a duration; what is past already is due now, as in Celery."""
    past = isinstance(value, (int, float)) and value < 0
    return 0.0 if past else parse_seconds(value, name=name)


def _checked_id(task_id: object) -> str:
    try:
        return str(uuid.UUID(str(task_id)))
    except ValueError:
        raise OptionError(
            f"task_id={task_id!r} is not a UUID, and the id of a run has to be one. To start one"
            " run per order or user, derive the id:"
            " task_id=str(uuid.uuid5(uuid.NAMESPACE_URL, 'order-42'))"
        ) from None


def _seconds(value: object, name: str) -> float | None:
    return None if value is None else parse_seconds(value, name=name)


def _with_ids(signatures: Any) -> Any:
    """Give callbacks fixed ids, so that a repeated delivery starts the same tasks again."""
    many = signatures if isinstance(signatures, (list, tuple)) else [signatures]
    fixed: list[dict[str, Any]] = load_message(dump_message(many))
    _fix_ids(fixed)
    return fixed


def _fix_ids(signatures: list[dict[str, Any]]) -> None:
    """Set missing ids in place; those of chains and chords are set by canvas itself."""
    for signature in signatures:
        kind = signature.get("subtask_type")
        if kind == "group":
            _fix_ids(signature["kwargs"]["tasks"])
        elif kind is None:
            signature.setdefault("options", {}).setdefault("task_id", celery_uuid())
