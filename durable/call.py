"""What is made of a start call: the row of the run, and the options of its messages."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from celery.app.routes import MapRoute
from celery.utils import uuid as celery_uuid
from kombu.utils.json import dumps as dump_message
from kombu.utils.json import loads as load_message

from durable import context, stored_message
from durable.durations import LONGEST, parse_seconds
from durable.errors import OptionError, PayloadError
from durable.handles import WAITER
from durable.keys import EXACTLY_ONCE, key_of, refuse_in_canvas
from durable.masking import HIDDEN
from durable.store.runs import Key, NewRun
from durable.stored_message import CANVAS

if TYPE_CHECKING:
    from celery import Celery

    from durable.app import Durable
    from durable.task import Workflow

#: Options that a later ring has to repeat. The rest is of this one call
#: (connections, producers) or has a column of its own (eta, expires).
KEPT = (
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


#: What `apply_async` acts on.
_CALL_OPTIONS = frozenset(
    {
        *KEPT,
        *EXACTLY_ONCE,
        *CANVAS,
        "add_to_parent",
        "args",
        "connection",
        "countdown",
        "deadline",
        "eta",
        "expires",
        "kwargs",
        "on_parent_cancel",
        "producer",
        "publisher",
        "reply_to",
        "result_cls",
        "retry",
        "retry_policy",
        "route_name",
        "router",
        "subject",
        "task_id",
        "task_type",
    }
)
#: Header of a message without a run that says whose data it has.
SUBJECT = "durable_subject"

_TYPO_LIKENESS = 0.82
_LONGEST_SUBJECT = 255


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one ``send_task`` that is for a workflow."""

    task: Workflow
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    options: dict[str, Any]


class Preparer:
    """Checks calls, and makes the row and the message of each; writes and sends nothing.

    Args:
        durable: settings, codec and clock.
    """

    def __init__(self, durable: Durable) -> None:
        self._durable = durable

    @property
    def _app(self) -> Celery:
        return self._durable.app

    def prepare(self, call: Call, *, publish: bool) -> tuple[NewRun, dict[str, Any]]:
        """Make the row and the message; ``publish``: whether the caller rings next.

        Raises:
            OptionError: an option that cannot be.
            PayloadError: arguments that cannot be stored.
        """
        durable, options = self._durable, call.options
        _refuse(options)
        run_id = _checked_id(options.get("task_id") or celery_uuid())
        text = encode_arguments(durable, call.task, call.args, call.kwargs)
        message = self._message(call)
        waiter = _waiter(message)
        queue = self._route(call, message)
        delay = self._delay(options)
        run = NewRun(
            id=run_id,
            namespace=durable.settings.namespace,
            name=call.task.name,
            input=text,
            message=stored_message.dumped(message, durable.codec),
            queue=queue,
            delay=delay,
            deadline=_seconds(options.get("deadline", call.task.deadline), "deadline"),
            expires=self._expires(options.get("expires", call.task.expires)),
            rung=publish and delay is None,
            ring_again=durable.settings.ring_interval,
            tail=self._has_tail(call),
            parent=waiter or _parent(),
            reports=waiter is not None,
            on_parent_cancel=_on_parent_cancel(options, waiter),
            subject=_subject(options),
            version=call.task.version,
        )
        return run, message

    def prepare_like(self, model: NewRun, call: Call) -> NewRun:
        """Make the row of a call that differs from ``model``'s in id and arguments only.

        Raises:
            PayloadError: arguments that cannot be stored.
        """
        if any(not isinstance(each, MapRoute) for each in self._app.amqp.routes):
            return self.prepare(call, publish=False)[0]  # a function may look at the arguments
        message = stored_message.loaded(model.message, self._durable.codec)
        for name in ("argsrepr", "kwargsrepr"):
            if call.options.get(name) is None:
                message.pop(name, None)
        text = encode_arguments(self._durable, call.task, call.args, call.kwargs)
        self._show_arguments(call, message)
        stored = stored_message.dumped(message, self._durable.codec)
        return replace(model, id=call.options["task_id"], input=text, message=stored)

    def key(self, call: Call, run: NewRun) -> Key | None:
        """Read the idempotency key of a call; None: it has none.

        Raises:
            OptionError: it is no key.
        """
        durable = self._durable
        plain = durable.codec.open(run.input)
        return key_of(call.options, plain, durable.settings.idempotency_ttl)

    def route(
        self, task: Workflow, text: str, *, queue: str | None, priority: int | None
    ) -> dict[str, Any]:
        """Make what `runs.route` stores of a run that was started by SQL.

        Args:
            task: its task.
            text: its input, JSON text.
            queue: that the start has named; None: the task's own.
            priority: likewise.
        """
        given = {"queue": queue, "priority": priority}
        try:
            arguments = self._durable.codec.decode(text)
        except PayloadError:  # the claim will say so
            arguments = {"args": [], "kwargs": {}}
        options = {
            **_given(task._get_exec_options()),  # noqa: SLF001 - as Celery does
            **_given(given),
        }
        call = Call(task, arguments["args"], arguments["kwargs"], options)
        message = self._message(call)
        queue = self._route(call, message)
        return {
            "message": stored_message.dumped(message, self._durable.codec),
            "queue": queue,
            "tail": self._has_tail(call),
            "deadline": _seconds(task.deadline, "deadline"),
        }

    def _message(self, call: Call) -> dict[str, Any]:
        options, conf = call.options, self._app.conf
        given = {key: options.get(key) for key in KEPT}
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
        self._show_arguments(call, message)
        if self._app.backend.__class__.__name__ == "RPCBackend":
            message["reply_to"] = options.get("reply_to") or self._app.thread_oid
        return message

    def _show_arguments(self, call: Call, message: dict[str, Any]) -> None:
        """Represent the arguments for people, masked; all that a message has of them."""
        mask, amqp = self._durable.mask, self._app.amqp
        if mask.hides_all:
            message.update(dict.fromkeys(stored_message.REPRS, HIDDEN))
            return
        levels = self._app.conf.get("task_repr_maxlevels", 3)
        args, kwargs = mask.arguments(call.task.run, call.args, call.kwargs)
        if args and "argsrepr" not in message:
            message["argsrepr"] = mask.shown(args, amqp.argsrepr_maxsize, levels)
        if kwargs and "kwargsrepr" not in message:
            message["kwargsrepr"] = mask.shown(kwargs, amqp.kwargsrepr_maxsize, levels)

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

    def _route(self, call: Call, message: dict[str, Any]) -> str | None:
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

    def _has_tail(self, call: Call) -> bool:
        """Tell whether Celery has something to deliver after the run's end."""
        if any(call.options.get(key) for key in CANVAS):
            return True
        ignored = call.options.get("ignore_result")
        if ignored is None:
            ignored = call.task.ignore_result
        return not ignored and self._durable.has_backend


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: each for key, each in options.items() if each is not None}


def _waiter(message: dict[str, Any]) -> str | None:
    """Take out of the headers which run waits for the outcome."""
    headers = dict(message.get("headers") or {})
    waiter: str | None = headers.pop(WAITER, None)
    if waiter is not None:
        message["headers"] = headers
        if not headers:
            del message["headers"]
    return waiter


def _parent() -> str | None:
    """Return the run whose step is starting this one."""
    execution = context.stored()
    return None if execution is None else execution.id


def _on_parent_cancel(options: Mapping[str, Any], waiter: str | None) -> str | None:
    policy = options.get("on_parent_cancel")
    if policy not in {None, "abandon", "cancel"}:
        raise OptionError(f"on_parent_cancel={policy!r}: give 'abandon' (the default) or 'cancel'")
    if policy is not None and waiter is None:
        raise OptionError(
            "on_parent_cancel= is for runs that the body of a workflow starts, outside its steps"
        )
    return None if policy == "abandon" else policy


def _subject(options: Mapping[str, Any]) -> str | None:
    subject = options.get("subject")
    if subject is None or (isinstance(subject, str) and 0 < len(subject) <= _LONGEST_SUBJECT):
        return subject
    raise OptionError(
        f"subject= is a text of 1 to {_LONGEST_SUBJECT} characters, such as 'customer-42', by which"
        " app.durable.erase(subject=...) finds the run"
    )


def encode_arguments(
    durable: Durable, task: Workflow, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str:
    """Make the stored text of a run's arguments.

    Those that do not fit are refused, also by ``send_task``, which Celery does not check.

    Raises:
        TypeError: they do not fit the workflow.
        PayloadError: they cannot be stored.
    """
    check = getattr(task, "__header__", None)
    if check is not None and task.typing is not False:
        check(*args, **kwargs)
    given = {"args": list(args), "kwargs": dict(kwargs)}
    return durable.codec.encode(given, f"the arguments of {task.name!r}")


def _refuse(options: Mapping[str, Any]) -> None:
    for key in CANVAS:
        refuse_in_canvas(options.get(key))
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
