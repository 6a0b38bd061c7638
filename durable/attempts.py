"""One step at one place: its recorded outcome, or attempts until there is one.

`attempts` is a generator, so that it is written once for both kinds of bodies.
It asks whoever drives it to run the step's body, to wait, or to pause;
`Execution.step` does so for a plain function, `durable.branches` for a coroutine.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from durable.branch import Frame, Waiting
from durable.errors import PayloadError
from durable.failures import decode_failure
from durable.history import Recorded
from durable.store import waits
from durable.store.runs import Park
from durable.store.waits import Place

if TYPE_CHECKING:
    from durable.execution import Execution
    from durable.retry import Decision
    from durable.steps import Step

#: Before a step runs again whose session could not be committed, in seconds.
_COMMIT_PAUSE = 0.2


class Ended(NamedTuple):
    """How the body of a step ended."""

    value: Any
    error: Exception | None
    seconds: float


class Outcome(NamedTuple):
    """What a step comes to: a value, or an error to be raised.

    Returned, not raised: a generator cannot raise the StopIteration that a
    step may have failed with.

    Attributes:
        rank: that of the record which it comes from; None: it is new.
    """

    value: Any = None
    error: BaseException | None = None
    cause: Exception | None = None
    rank: int | None = None

    def told(self) -> Any:
        """Return or raise it."""
        if self.error is None:
            return self.value
        if self.cause is None:
            raise self.error
        raise self.error from self.cause


class _Failure(NamedTuple):
    error: Exception
    seconds: float
    not_stored: bool = False


#: Yields a `Frame` whose body is to be run, and is sent how that `Ended`; a
#: `Waiting`, and is sent the `Wait` when it is over; or a pause in seconds.
Attempts = Generator["Frame | Waiting | float", Any, Outcome]


def attempts(execution: Execution, step: Step[Any, Any], kind: str) -> Attempts:
    """Take the next place in the branch; return its recorded outcome, or produce it."""
    execution.check()
    branch = execution.branch
    ordinal = branch.take()
    past = [*execution.past(branch, ordinal, step.name, kind)]
    cut_off = _cut_off(execution, step, past)
    if past and cut_off is None:
        if past[-1].settled:
            return replayed(execution, past[-1])
        if execution.driver is not None:  # another branch may have woken the run before its time
            yield _backing_off(execution, past[-1])
    while True:
        execution.check()
        execution.before_new()
        number = past[-1].attempt + 1 if past else 1
        frame = Frame(step.name, branch.path, ordinal, number, kind, once=step.at_most_once)
        if past or cut_off is not None:
            _hand_over(frame, past, cut_off)
        ended: Ended = yield frame
        outcome = _outcome(execution, frame, ended)
        if isinstance(outcome, str):
            return Outcome(execution.services.codec.decode(outcome))
        if outcome is None:  # the commit of its session came to nothing: the same attempt again
            yield _commit_pause(execution, step, ordinal)
            continue
        decision = _judge(execution, step, outcome, past)
        if decision.passes:
            return Outcome(error=outcome.error)
        failed, final = yield from _failed(execution, frame, outcome, decision)
        if final is not None:
            return final
        past.append(failed)
        cut_off = None


def _cut_off(execution: Execution, step: Step[Any, Any], past: list[Recorded]) -> Recorded | None:
    """Take the attempt out of ``past`` in whose middle a worker died, if it had opened a row.

    Raises:
        Suspend: it may not be made again.
    """
    if not past or past[-1].status != "running":
        return None
    if step.at_most_once:
        raise _unknown(execution, step.name, past[-1].ordinal)
    return past.pop()


def _commit_pause(execution: Execution, step: Step[Any, Any], ordinal: int) -> float:
    if step.at_most_once:
        raise _unknown(execution, step.name, ordinal)
    return _COMMIT_PAUSE


def _hand_over(frame: Frame, past: Sequence[Recorded], cut_off: Recorded | None) -> None:
    """Give an attempt what the ones before it have reported; one that was cut off goes on."""
    if cut_off is not None:
        frame.attempt, frame.opened = cut_off.attempt, True
    earlier = [*past, cut_off] if cut_off is not None else past
    reported = [each.output for each in earlier if each.output is not None]
    frame.handed_over = reported[-1] if reported else None


def _unknown(execution: Execution, name: str, ordinal: int) -> BaseException:
    """Pause the run for a person, who can find out what nobody has recorded."""
    where = f"{name!r}, ordinal={ordinal}"
    reason = (
        f"step {name!r} (position {ordinal}) may run at most once and was cut off: whether it has"
        f" taken effect is not known. If it has, result.settle({name!r}, value, ordinal={ordinal})"
        f" and result.resume(); if not, result.restart(from_step={where}) runs it again"
    )
    suspend = execution.park(Park("paused", reason))
    assert suspend is not None  # what is executed inline is never cut off
    return suspend


def replayed(execution: Execution, step: Recorded) -> Outcome:
    """Return what is recorded."""
    codec = execution.services.codec
    if step.status == "succeeded":
        return Outcome(codec.decode(step.output or "null"), rank=step.rank)
    error = settled(decode_failure(step.error or "null", codec))
    return Outcome(error=error, rank=step.rank)


def _outcome(execution: Execution, frame: Frame, ended: Ended) -> str | _Failure | None:
    """Record a result and return its text. None: nothing was stored, the body has to run again."""
    if ended.error is not None:
        frame.roll_back()
        return _Failure(ended.error, ended.seconds)
    try:
        output = execution.services.codec.encode(
            ended.value,
            f"the result of step {frame.name!r}",
            secret=frame.kind != "dispatch",  # that is a handle, which SQL looks into
        )
        return output if _commit(execution, frame, ended.seconds, output) else None
    except PayloadError as exc:
        frame.roll_back()
        return _Failure(exc, ended.seconds, not_stored=True)
    except Exception as exc:
        if frame.transaction is None:
            raise
        return _Failure(exc, ended.seconds)


def _commit(execution: Execution, frame: Frame, seconds: float, output: str) -> bool:
    """Store a result. False: nothing was stored, the body has to run again."""
    record = execution.record(frame, "succeeded", seconds, output=output)
    if frame.transaction is None:
        if frame.opened or not execution.sole_step:
            execution.write(record)
        return True
    written = frame.transaction.commit(record)
    if written is None:
        return execution.journal.was_recorded(record)
    execution.obey(written)
    return True


def _failed(
    execution: Execution, frame: Frame, failure: _Failure, decision: Decision
) -> Generator[Waiting | float, Any, tuple[Recorded, Outcome | None]]:
    """Record a failed attempt and wait for the next one, if there is to be one."""
    exc = failure.error
    error = execution.encode_error(exc)
    record = execution.record(
        frame, "failed", failure.seconds, error=error, verdict=_as_context(decision)
    )
    failed = Recorded(
        frame.branch,
        frame.ordinal,
        frame.name,
        frame.attempt,
        frame.kind,
        "failed",
        frame.reported,
        error,
        record.context,
    )
    if decision.parks and execution.driver is None:
        if suspend := execution.park(Park("sleeping", "retry", delay=decision.delay), record, exc):
            raise suspend
        return failed, None
    execution.write(record)
    if decision.final:
        error_told = settled(decode_failure(error, execution.services.codec))
        return failed, Outcome(error=error_told, cause=exc)
    if not decision.parks:
        yield decision.delay
    elif not execution.journal.inline:
        yield _backing_off(execution, failed, exc)
    return failed, None


def _backing_off(execution: Execution, failed: Recorded, cause: Exception | None = None) -> Waiting:
    """Wait for the next attempt of a step beside which other branches go on."""
    place = Place(execution.id, execution.attempt, failed.branch, failed.ordinal, failed.name)
    ask = partial(execution.journal.wait, waits.back_off, place, failed.attempt)
    return Waiting(ask, "sleeping", "retry", cause)


def _judge(
    execution: Execution, step: Step[Any, Any], failure: _Failure, past: Sequence[Recorded]
) -> Decision:
    if failure.not_stored:  # another attempt would do it all again, for the same result
        return step.policy.give_up("the step has run, but its result cannot be stored")
    if step.at_most_once:
        return step.policy.give_up("a step that may run at most once is not tried again")
    return step.policy.decide(
        failure.error,
        execution.services.classifier,
        [each.verdict for each in past],
        random=execution.services.clock.random,
    )


def _as_context(decision: Decision) -> str:
    verdict: dict[str, object] = {"class": decision.retry_class.value, "reason": decision.reason}
    if decision.final:
        verdict["final"] = True
    else:
        verdict["retry_in"] = round(decision.delay, 3)
    if decision.limited:
        verdict["limited"] = True
    return json.dumps(verdict)


def is_settled(exc: BaseException) -> bool:
    """Tell whether an exception is a step's recorded, final one."""
    return getattr(exc, "durable_settled", False) is True


def settled(exc: BaseException) -> BaseException:
    """Mark an exception as one that was recorded as final: the body is not repeated for it."""
    exc.__dict__["durable_settled"] = True  # a frozen dataclass takes no attributes
    return exc
