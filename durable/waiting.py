"""What the body of a workflow can wait for: time, events, the outcome of other tasks.

Each verb is a generator that yields a `Waiting` and is sent how that ended.
Here it is driven for a plain body, which parks at once; `durable.aio` drives
the same generators for a coroutine, which parks when all its branches wait.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from celery import current_app
from celery.exceptions import TimeoutError as CeleryTimeoutError

from durable.context import active
from durable.durations import parse_seconds
from durable.errors import ConfigurationError, EventTimeout, OptionError, UnsupportedByDurable
from durable.execution import Waiting
from durable.schemas import Schema, check, reader
from durable.store import events, waits
from durable.store.waits import Place, Wait

if TYPE_CHECKING:
    from durable.execution import Execution

T = TypeVar("T")

Verb = Generator[Waiting, Wait, T]


def drive(execution: Execution, verb: Verb[T]) -> T:
    """Run a verb for a plain body: each wait that is not over parks the run."""
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
        OptionError: no duration.

    Example:
        >>> @workflow
        ... def remind(text: str) -> str:
        ...     durable.sleep("48h")
        ...     return text
        >>> remind("tea")  # called directly: at once
        'tea'
    """
    execution = active("sleep")
    drive(execution, sleeping(execution, duration))


def sleep_until(when: datetime) -> None:
    """Pause the run until a time, which has to be aware; one that is past does not pause.

    Raises:
        NotInWorkflow: outside the body of a workflow.
        OptionError: not an aware datetime.

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
    drive(execution, sleeping_until(execution, when))


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
        timeout: a duration after which `EventTimeout` is raised; None: never.
            An event that comes later but is there when the run looks still counts.
        schema: what the payload has to be: a pydantic model or any type that
            pydantic can check (then the checked value is returned), or a function
            that returns the value to use or raises ValueError. An event that does
            not fit is put aside with the reason, and the wait goes on.

    Raises:
        EventTimeout: none came in time. It is recorded: the same on every replay.
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
    return drive(execution, awaiting_event(execution, event_type, timeout, schema))


def send_event(
    run_id: str, event_type: str, payload: Any = None, *, idempotency_key: str | None = None
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
        idempotency_key: of several events of a run with one key only the first counts.

    Returns:
        The id of the event; for a repeated key, that of the first.

    Raises:
        RunNotFound: there is no such run in this namespace.
        RunEnded: the run has ended.
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
    sent: str = durable.send_event(run_id, event_type, payload, idempotency_key=idempotency_key)
    return sent


# --- the verbs themselves


def sleeping(execution: Execution, duration: timedelta | float | str) -> Verb[None]:
    """Sleep for a duration."""
    seconds = parse_seconds(duration, name="sleep(duration)")
    return _sleep(execution, "sleep", seconds, None)


def sleeping_until(execution: Execution, when: object) -> Verb[None]:
    """Sleep until a time."""
    if not isinstance(when, datetime) or when.tzinfo is None:
        raise OptionError(
            f"sleep_until({when!r}): give an aware datetime, such as"
            " durable.now() + timedelta(days=2)"
        )
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
    payload = execution.services.codec.decode(step.output or "null")
    return payload if read is None else read(payload)


def _take_event(
    execution: Execution,
    place: Place,
    seconds: float | None,
    read: Callable[[Any], Any] | None,
) -> Wait | None:
    journal = execution.journal
    if read is None:
        return journal.wait(waits.event, place, seconds)
    while True:
        found = journal.call(events.peek, execution.id, place.name)
        if found is None:
            return journal.wait(waits.event, place, seconds, checked=True)
        event_id, payload = found
        refusal = check(read, execution.services.codec.decode(payload))
        if refusal is None:
            return journal.wait(waits.event, place, seconds, checked=True, given=event_id)
        journal.call(events.refuse, event_id, refusal)


def awaiting_results(
    execution: Execution, task_ids: Sequence[str], timeout: float | None
) -> Verb[list[Any]]:
    """Wait until tasks that the run started have ended; their recorded outcomes, in order.

    Raises:
        celery.exceptions.TimeoutError: not in time; the same on every replay.
    """
    execution.refuse_in_step("result.get")
    for task_id in task_ids:
        if task_id not in execution.started_tasks:
            raise UnsupportedByDurable(
                f"result.get() of {task_id} in run {execution.id}: a workflow can wait for tasks"
                " that its own body has started, outside its steps. To wait for another run, have"
                " it send an event to this one"
            )
    reason = f"result of {', '.join(task_ids[:3])}{' ...' if task_ids[3:] else ''}"
    if timeout is None:
        found = []
        for task_id in task_ids:
            known: Any = execution.history.result(task_id)
            if known is None:
                ask = partial(_ask_results, execution, [task_id])
                known = yield Waiting(ask, "waiting", reason)
            found.append(known)
        return found
    seconds = parse_seconds(timeout, name="timeout")
    place, over = execution.place("result.get", "result.get", "timer")
    timer: Any = over
    if timer is None:
        ask = partial(_ask_in_time, execution, place, seconds, task_ids)
        timer = yield Waiting(ask, "waiting", reason)
    if timer.status == "failed":
        raise CeleryTimeoutError(f"{reason} did not come within {timeout} s")
    known = map(execution.history.result, task_ids)
    return [
        execution.ask(partial(_ask_results, execution, [task_id])) if outcome is None else outcome
        for task_id, outcome in zip(task_ids, known, strict=True)
    ]


def _ask_results(execution: Execution, task_ids: Sequence[str]) -> Wait | None:
    """Look at outcomes in turn; the first that is not known, else the last."""
    wait: Wait | None = None
    for task_id in task_ids:
        wait = execution.journal.wait(waits.result, execution.id, execution.attempt, task_id)
        if wait is None or not wait.over:
            break
    return wait


def _ask_in_time(
    execution: Execution, place: Place, seconds: float, task_ids: Sequence[str]
) -> Wait | None:
    known = _ask_results(execution, task_ids)
    if known is None:
        return None
    return execution.journal.wait(waits.timer, place, seconds, met=known.over)


#: Characters of an event's type: it names a step.
_LONGEST = 255


def check_event_type(event_type: object) -> None:
    """Refuse what is no name."""
    if (
        type(event_type) is not str
        or not event_type.strip()
        or not event_type.isprintable()
        or len(event_type) > _LONGEST
    ):
        raise OptionError(
            f"the type of an event is a name of 1 to {_LONGEST} printable characters,"
            f" not {event_type!r:.80}"
        )
