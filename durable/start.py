"""How a run begins: written to Postgres, then rung.

Everything that starts a task goes through ``app.send_task``: ``delay``,
``apply_async``, canvas, beat, ``celery call``. `Starter` stands in front of
it, takes the calls that are for workflows, and leaves the rest alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from celery.exceptions import OperationalError
from celery.utils.log import get_logger
from kombu.utils.json import loads as load_message

from durable import priorities
from durable.beat import id_of_entry
from durable.call import KEPT, SUBJECT, Call, Preparer
from durable.errors import OptionError
from durable.handles import send_once
from durable.keys import EXACTLY_ONCE, conflict, refuse_with_id
from durable.outbox import refuse_in_body
from durable.publisher import Publisher
from durable.store import outcomes, queries, runs

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import AsyncResult
    from kombu.entity import Queue

    from durable.app import Durable
    from durable.outbox import Caller
    from durable.store.connections import Connection
    from durable.store.dispatch import Doorbell
    from durable.task import Workflow

logger = get_logger(__name__)

#: Header of a message whose run is in Postgres already.
DOORBELL = "durable"

#: Which options go into a message, and which say how it is sent.
_IN_PUBLISH = frozenset(
    {"queue", "exchange", "routing_key", "priority", "serializer", "compression", "delivery_mode"}
)
_IN_MESSAGE = ({*KEPT, "reply_to"} - _IN_PUBLISH) - {"headers"}

#: Where the rows of a fan-out's items are put instead of being started.
_rows: ContextVar[list[runs.NewRun] | None] = ContextVar("durable_rows", default=None)

_PUBLISH_ERRORS = (OperationalError, OSError, TimeoutError)


class Starter:
    """Starts runs for one app.

    Args:
        durable: settings, database and codec.
        send_task: the app's own ``send_task``.
    """

    def __init__(self, durable: Durable, send_task: Callable[..., Any]) -> None:
        self._durable = durable
        self._send_task = send_task
        self._preparer = Preparer(durable)
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
        """Start a task; in the body of a workflow once, however often that replays."""
        self._check_exactly_once(name, options)
        if _rows.get() is not None:
            return self._send(name, args, kwargs, options)
        handle: AsyncResult[Any] = send_once(
            self._app, name, options, lambda more: self._send(name, args, kwargs, more)
        )
        return handle

    def _send(
        self,
        name: str,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        options: dict[str, Any],
    ) -> AsyncResult[Any]:
        """Start a run if ``name`` is a workflow; else do what Celery does."""
        from durable.task import Workflow

        task = options.get("task_type") or self._app._tasks.get(name)  # noqa: SLF001
        if task is None or isinstance(task, Workflow):
            options["task_id"] = options.get("task_id") or id_of_entry(name)
        as_message = self._durable.settings.accept_only and _rows.get() is None
        if not isinstance(task, Workflow) or as_message:
            if as_message and isinstance(task, Workflow):
                _drop_policy(name, options)
            elif task is not None and options.get("on_parent_cancel") is not None:
                raise OptionError(
                    f"on_parent_cancel= is for workflows, and {name!r} is a plain task"
                )
            subject = options.pop("subject", None)
            if subject is not None:  # whichever worker makes a run of the message has it then
                options["headers"] = {**(options.get("headers") or {}), SUBJECT: subject}
            return self._send_task(name, args, kwargs, **options)
        if "task_type" not in options:  # by name: the task's own options count too, as in Celery
            own = {key: each for key, each in task._get_exec_options().items() if each is not None}  # noqa: SLF001
            options = {**own, **options}
        return self._start(Call(task, args or (), kwargs or {}, options))

    def _check_exactly_once(self, name: str, options: Mapping[str, Any]) -> None:
        """Refuse what a key or a transaction cannot go with, before an id is derived."""
        refuse_with_id(options)
        given = [key for key in EXACTLY_ONCE if options.get(key) is not None]
        if not given:
            return
        task = options.get("task_type") or self._app._tasks.get(name)  # noqa: SLF001
        if not _is_workflow(task):
            what = "is not registered in this process" if task is None else "is a plain task"
            raise OptionError(f"{given[0]}= is for workflows, and {name!r} {what}")
        if self._durable.settings.accept_only:
            raise OptionError(
                f"{given[0]}= needs the run to be written by this process, and durable_accept_only"
                " has it send ordinary messages: finish the rolling deploy first"
            )
        refuse_in_body(given[0])

    def routed(self, conn: Connection, doorbell: Doorbell) -> Doorbell:
        """Find, and store, the way of a run that was started by SQL: the task's own."""
        text, queue, priority = runs.unrouted(conn, doorbell.id)
        task = self._app.tasks[doorbell.name]
        route = self._preparer.route(task, text, queue=queue, priority=priority)
        runs.route(conn, doorbell.id, **route)
        return replace(doorbell, message=route["message"])

    @property
    def preparer(self) -> Preparer:
        """What makes rows of calls."""
        return self._preparer

    def ring(self, doorbell: Doorbell, queue: Queue | None = None) -> None:
        """Publish the message of a run that is in Postgres; to ``queue``, if given, and no other.

        Not through ``send_task``: that subscribes this process to the result,
        which the dispatcher does not wait for.

        Raises:
            OperationalError: the broker did not take it in ``durable_publish_timeout``.
        """
        options = load_message(doorbell.message or "{}")
        if doorbell.woken:
            options = priorities.ahead(
                options, self._durable.settings.wake_priority, self._publisher.driver
            )
        if queue is not None:
            options = {key: options[key] for key in options.keys() - {"exchange", "routing_key"}}
            options["queue"] = queue
        self._publisher.publish(
            lambda producer: self._send_message(
                doorbell.id, doorbell.name, options, producer, retry=False
            )
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
        call = Call(task, args, kwargs, {**options, "task_id": run_id})
        run, _ = self._preparer.prepare(call, publish=True)
        self._durable.database.call(runs.insert, run)
        return run.delay

    def row_of(self, start: Callable[[], object]) -> runs.NewRun:
        """Return the row of the run that ``start()`` would start, which is not started.

        It goes through ``apply_async`` of the user's task class like any start.
        """
        rows: list[runs.NewRun] = []
        token = _rows.set(rows)
        try:
            start()
        finally:
            _rows.reset(token)
        if len(rows) != 1:
            raise OptionError(
                f"an item of a fan-out has to start one run, and its apply_async starts {len(rows)}"
            )
        return rows[0]

    def _start(self, call: Call) -> AsyncResult[Any]:
        durable, rows = self._durable, _rows.get()
        if rows is not None:
            row, _ = self._preparer.prepare(call, publish=False)
            rows.append(row)
            return self._result(call, row.id)
        caller = durable.outbox.caller(call.options.get("transaction"))
        publish = caller.commits and durable.broker_answers()
        run, message = self._preparer.prepare(call, publish=publish)
        key = self._preparer.key(call, run)
        if key is not None:
            run_id = self._insert_keyed(call, caller, run, key)
        else:
            run_id = run.id
            if not caller.call(runs.insert, run):
                return self._started_before(call, caller, run)
        result = self._result(call, run_id)
        if run.rung and run_id == run.id:
            self._ring_first(call, run.id, message)
        return result

    def _insert_keyed(self, call: Call, caller: Caller, run: runs.NewRun, key: runs.Key) -> str:
        """Accept a run, or find the one that its key stands for; the id.

        Raises:
            IdempotencyConflict: that one has another input.
        """
        run_id, same = caller.call(runs.insert_keyed, run, key)
        if not same:
            theirs = caller.call(queries.input_of, run_id)
            durable = self._durable
            raise conflict(
                run,
                key,
                run_id,
                theirs or "null",
                codec=durable.codec,
                mask=durable.mask,
                function=call.task.run,
            )
        return run_id

    def _started_before(self, call: Call, caller: Caller, run: runs.NewRun) -> AsyncResult[Any]:
        """Return the handle of a run that is there already under this id."""
        self._check_same(caller, run)
        result = self._result(call, run.id)
        if run.parent is not None and run.reports:
            result.durable_of_others = not caller.call(outcomes.tells, run.id, run.parent)
        return result

    def _check_same(self, caller: Caller, run: runs.NewRun) -> None:
        """A second call with an id is the same call again, but not if it is for another task."""
        name = caller.call(queries.name_of, run.id, run.namespace)
        if name != run.name:
            theirs = "another namespace" if name is None else f"workflow {name!r}"
            raise OptionError(
                f"task_id={run.id!r} is the id of a run of {theirs} already, it cannot also be one"
                f" of {run.name!r}"
            )

    def _ring_first(self, call: Call, run_id: str, message: dict[str, Any]) -> None:
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

    def _publish(self, call: Call, run_id: str, message: dict[str, Any]) -> None:
        options, backend = call.options, self._app.backend
        listens, by_rpc = not message.get("ignore_result"), "reply_to" in message

        def send(producer: Any, **policy: Any) -> None:
            if listens and by_rpc:  # declares the queue that results are sent to
                backend.on_task_call(producer, run_id)
            self._send_message(run_id, call.task.name, message, producer, **policy)

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

    def _send_message(
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

    def _result(self, call: Call, run_id: str) -> AsyncResult[Any]:
        options = call.options
        result = (options.get("result_cls") or self._app.AsyncResult)(run_id)
        result.ignored = options.get("ignore_result")
        parent = self._app.current_worker_task
        if options.get("add_to_parent", True) and parent:
            parent.add_trail(result)
        return result


def _drop_policy(name: str, options: dict[str, Any]) -> None:
    """Leave out what a message cannot say: which run it is tied to."""
    if options.pop("on_parent_cancel", None) not in {None, "abandon"}:
        logger.warning(
            "%s is started without on_parent_cancel='cancel': durable_accept_only has it sent as an"
            " ordinary message. It goes on if its parent is canceled",
            name,
        )


def _is_workflow(task: object) -> bool:
    from durable.task import Workflow

    return isinstance(task, Workflow)
