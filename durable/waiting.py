"""What the body of a workflow can wait for: time, events, the outcome of other tasks.

Each verb is a generator that yields a `Waiting` and is sent how that ended.
Here it is driven for a plain body, which parks at once; `durable.aio` drives
the same generators for a coroutine, which parks when all its branches wait.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from celery import current_app
from celery.exceptions import TimeoutError as CeleryTimeoutError

from durable.context import active
from durable.durations import LONGEST, parse_seconds
from durable.errors import ConfigurationError, EventTimeout, OptionError, UnsupportedByDurable
from durable.execution import Waiting
from durable.names import LONGEST_NAME, is_name
from durable.schemas import MISFIT, Reader, Schema, describe, reader
from durable.store import events, waits
from durable.store.waits import Place, Wait

if TYPE_CHECKING:
    from durable.execution import Execution

T = TypeVar("T")

Verb = Generator[Waiting, Wait, T]


def drive(execution: Execution, verb: Verb[T], name: str) -> T:
    """Run a verb for a plain body: each wait that is not over parks the run.

    Raises:
        UnsupportedByDurable: in the body of an ``async def`` workflow.
    """
    if execution.driver is not None and not execution.in_step:
        call = "result.get()" if name == "get" else f"durable.{name}()"
        given = "result" if name == "get" else "..."
        raise UnsupportedByDurable(
            f"{call} in the async workflow {execution.name!r} would hold up all its branches:"
            f" write `await durable.aio.{name}({given})`"
        )
    try:
        waiting = next(verb)
        while True:
            waiting = verb.send(execution.wait(waiting))
    except StopIteration as end:
        value: T = end.value
        return value


def sleep(duration: timedelta | float | str) -> None:
    """Pause the run; meanwhile it holds no worker, no message and no connection.

    The wake time is fixed once, by the database's clock: crashes and deploys
    in between do not move it. In eager mode and in direct calls there is no
    pause.

    Args:
        duration: a timedelta, seconds, or text such as ``"90s"``, ``"48h"``, ``"7d"``.

    Raises:
        NotInWorkflow: outside the body of a workflow.
        OptionError: no duration, a negative one, or one of more than a hundred years.

    Example:
        >>> @workflow
        ... def remind(text: str) -> str:
        ...     durable.sleep("48h")
        ...     return text
        >>> remind("tea")  # called directly: at once
        'tea'
    """
    execution = active("sleep")
    drive(execution, sleeping(execution, duration), "sleep")


def sleep_until(when: datetime) -> None:
    """Pause the run until a time, which has to be aware; one that is past does not pause.

    Raises:
        NotInWorkflow: outside the body of a workflow.
        OptionError: not an aware datetime, or one more than a hundred years away.

    Example:
        >>> from datetime import datetime, timezone
        >>> @workflow
        ... def new_year(year: int) -> int:
        ...     durable.sleep_until(datetime(year, 1, 1, tzinfo=timezone.utc))
        ...     return year
        >>> new_year(2020)
        2020
    """
    execution = active("sleep_until")
    drive(execution, sleeping_until(execution, when), "sleep_until")


def wait_for_event(
    event_type: str,
    *,
    timeout: timedelta | float | str | None = None,
    schema: Schema | None = None,
) -> Any:
    """Wait for an event that is sent to the run, and return its payload.

    One that came before the wait counts too. Each event ends one wait; several
    waits for a type take the events in the order in which they came.

    Args:
        event_type: what `send_event` names.
        timeout: a duration after which `EventTimeout` is raised; None: never;
            0: only look. An event that comes later but is there when the run
            looks still counts.
        schema: what the payload has to be: a pydantic model, a dataclass or any
            type that pydantic can check (then the checked value is returned), or
            a function that returns the value to use or raises ValueError. An
            event that does not fit is put aside with the reason, which
            ``result.events()`` shows, and the wait goes on.

    Raises:
        EventTimeout: none came in time. It is recorded: the same on every replay.
        OptionError: no event type, no duration, or a schema that cannot be used.
        PayloadError: the codec cannot store what the schema made of the payload.
        NotInWorkflow: outside the body of a workflow, and in eager mode.

    Example:
        >>> @workflow
        ... def approve(order_id: str) -> str:
        ...     decision = durable.wait_for_event("approval")
        ...     return f"{order_id}: {decision}"
        >>> result = approve.delay("o-42")
        >>> _ = result.send_event("approval", "granted")
        >>> result.get(timeout=30)
        'o-42: granted'
    """
    execution = active("wait_for_event")
    verb = awaiting_event(execution, event_type, timeout, schema)
    return drive(execution, verb, "wait_for_event")


def send_event(
    run_id: str,
    event_type: str,
    payload: Any = None,
    *,
    idempotency_key: str | None = None,
    transaction: object = None,
) -> str:
    """Send an event to a run of the current app.

    It is accepted when it is committed, whether or not a worker is up; a run
    that waits for it goes on at once, any other finds it when it comes to wait.
    ``result.send_event(...)`` is the same. In the body of a workflow it is sent
    once, however often the body replays.

    Args:
        run_id: id of the run.
        event_type: what the run waits for.
        payload: anything the codec can store.
        idempotency_key: of several events of a run with one key only the first
            counts; text of 1 to 255 characters.
        transaction: a transaction of yours in the same database: the event is sent
            if and only if that is committed (see docs/transactions.md).

    Returns:
        The id of the event; for a repeated key, that of the first.

    Raises:
        RunNotFound: there is no such run in this namespace.
        RunEnded: the run has ended.
        OptionError: no event type, or no key.
        PayloadError: the payload cannot be stored.

    Example:
        >>> @workflow
        ... def greet() -> str:
        ...     return durable.wait_for_event("name", timeout="1h")
        >>> result = greet.delay()
        >>> event_id = durable.send_event(result.id, "name", "Ada", idempotency_key="form-7")
        >>> event_id == durable.send_event(result.id, "name", "Bob", idempotency_key="form-7")
        True
        >>> result.get(timeout=30)
        'Ada'
    """
    durable = getattr(current_app, "durable", None)
    if durable is None:
        raise ConfigurationError(
            "durable.send_event() needs a Celery app with Durable(app): import your app's module"
            " first, or use app.durable.send_event(...)"
        )
    sent: str = durable.send_event(
        run_id, event_type, payload, idempotency_key=idempotency_key, transaction=transaction
    )
    return sent


# --- the verbs themselves


def sleeping(execution: Execution, duration: timedelta | float | str) -> Verb[None]:
    """Sleep for a duration."""
    seconds = parse_seconds(duration, name="sleep(duration)")
    return _sleep(execution, "sleep", seconds, None)


def sleeping_until(execution: Execution, when: object) -> Verb[None]:
    """Sleep until a time."""
    if not isinstance(when, datetime) or when.utcoffset() is None:
        raise OptionError(
            f"sleep_until({when!r}): give an aware datetime, such as"
            " durable.now() + timedelta(days=2)"
        )
    # Only against slips; what is due is judged by the database's clock.
    if when - execution.services.clock.now() > LONGEST:
        raise OptionError(f"sleep_until({when}) is more than a hundred years away")
    return _sleep(execution, "sleep_until", None, when)


def _sleep(
    execution: Execution, verb: str, seconds: float | None, until: datetime | None
) -> Verb[None]:
    place, over = execution.place(verb, "sleep", "sleep")
    if over is None and not execution.journal.inline:
        ask = partial(execution.journal.wait, waits.sleep, place, seconds, until)
        yield Waiting(ask, "sleeping", "sleep")


def awaiting_event(
    execution: Execution,
    event_type: str,
    timeout: timedelta | float | str | None,
    schema: Schema | None,
) -> Verb[Any]:
    """Wait for an event."""
    check_event_type(event_type)
    seconds = None if timeout is None else parse_seconds(timeout, name="timeout")
    read = reader(schema)
    place, over = execution.place("wait_for_event", event_type, "event")
    step: Any = over
    if step is None:
        ask = partial(_take_event, execution, place, seconds, read)
        step = yield Waiting(ask, "waiting", f"event {event_type}")
    if step.status == "failed":
        raise EventTimeout(
            f"no event {event_type!r} came for run {execution.id} within {timeout}", event_type
        )
    return execution.services.codec.decode(step.output or "null")


def _take_event(
    execution: Execution, place: Place, seconds: float | None, read: Reader | None
) -> Wait | None:
    """Take an event, or see that none has come; with a schema, look before taking."""
    journal, codec = execution.journal, execution.services.codec
    if read is None or journal.inline:
        return journal.wait(waits.event, place, seconds)
    while True:
        found = journal.call(events.peek, execution.id, place.name)
        wait: Wait | None
        if found.id is None:
            wait = journal.wait(waits.event, place, seconds, checked=True, seen=found.wake)
        else:
            try:
                value = read(codec.decode(found.payload or "null"))
            except MISFIT as misfit:
                why = codec.seal_text(describe(misfit))
                if not journal.call(events.refuse, place, found.id, why):
                    return None
                continue
            # What the schema made of it is recorded, so that every replay gets the same.
            text = codec.encode(value, f"what schema= made of event {place.name!r}")
            wait = journal.wait(
                waits.event, place, seconds, checked=True, given=found.id, value=text,
                seen=found.wake,
            )  # fmt: skip
        if wait is None or wait.status != waits.LOOK_AGAIN:
            return wait


def awaiting_results(
    execution: Execution,
    task_ids: Sequence[str],
    timeout: float | None,
    *,
    before: Mapping[str, Sequence[str]] = MappingProxyType({}),
    to_failure: bool = False,
) -> Verb[list[Any]]:
    """Wait until tasks that the run started have ended; their recorded outcomes, in order.

    Args:
        execution: the run.
        task_ids: ids of the tasks.
        timeout: seconds; None: without end.
        before: of a task, those whose failure means that it is never started.
        to_failure: wait for none that comes, in order, after one that failed.

    Raises:
        celery.exceptions.TimeoutError: not in time; the same on every replay.
    """
    execution.refuse_in_step("result.get")
    for task_id in task_ids:
        if task_id not in execution.started_tasks:
            raise UnsupportedByDurable(
                f"result.get() of {task_id} in run {execution.id}: a workflow can wait for tasks"
                " that its own body has started, outside its steps, and not for a run that was"
                " there before. To wait for another run, have it send an event to this one"
            )
    reason = f"result of {', '.join(task_ids[:3])}{' ...' if task_ids[3:] else ''}"
    if timeout is not None:
        seconds = parse_seconds(timeout, name="timeout")
        place, over = execution.place("result.get", "result.get", "timer")
        timer: Any = over
        if timer is None:
            ask = partial(_ask_in_time, execution, place, seconds, task_ids, before, to_failure)
            timer = yield Waiting(ask, "waiting", reason)
        if timer.status == "failed":
            raise CeleryTimeoutError(f"{reason} did not come within {timeout} s")
    found: list[Any] = []
    for task_id in task_ids:
        known: Any = execution.history.result(task_id)
        if known is None:
            ask = partial(_ask_result, execution, task_id, before)
            known = yield Waiting(ask, "waiting", reason)
        found.append(known)
        if to_failure and known.status == "failed":
            break
    return found


def _ask_result(
    execution: Execution, task_id: str, before: Mapping[str, Sequence[str]]
) -> Wait | None:
    return execution.journal.wait(
        waits.result, execution.id, execution.attempt, task_id, before.get(task_id, ())
    )


def _ask_in_time(
    execution: Execution,
    place: Place,
    seconds: float,
    task_ids: Sequence[str],
    before: Mapping[str, Sequence[str]],
    to_failure: bool,
) -> Wait | None:
    """Look at outcomes in turn, up to the first that is not known; begin, or end, the timer."""
    met = True
    for task_id in task_ids:
        outcome: Any = execution.history.result(task_id)
        if outcome is None:
            outcome = _ask_result(execution, task_id, before)
        if outcome is None:
            return None
        met = outcome.status != "running"
        if not met or (to_failure and outcome.status == "failed"):
            break
    return execution.journal.wait(waits.timer, place, seconds, met=met)


def check_event_type(event_type: object) -> None:
    """Refuse what is no name."""
    if not is_name(event_type):
        raise OptionError(
            f"the type of an event is text of 1 to {LONGEST_NAME} printable characters,"
            f" not {event_type!r:.80}"
        )
