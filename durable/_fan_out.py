"""How a fan-out goes: its items are inserted, waited for, and their results put together."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from celery.exceptions import TaskRevokedError

from durable.attempts import settled
from durable.branch import Waiting
from durable.errors import NonDeterministicWorkflow, OptionError
from durable.failures import decode_failure
from durable.items import Item, Rows
from durable.store import fan_outs
from durable.store.fan_outs import NewFanOut, State
from durable.store.runs import NewRun, Park
from durable.waiting import Verb

if TYPE_CHECKING:
    from durable.execution import Execution, Services
    from durable.journal import PostgresJournal
    from durable.masking import Mask
    from durable.store.waits import Place, Wait

#: Items that are inserted in one statement, and how many bytes of arguments.
_LOT = 500
_LOT_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Calls:
    """What is to be called, item by item; made when it is needed, which a replay does not.

    Attributes:
        verb: what the user has called.
        name: of the row in the history.
    """

    verb: str
    name: str
    things: Sequence[Any]
    make: Callable[[Any], Item]

    def __len__(self) -> int:
        return len(self.things)

    def __getitem__(self, index: int) -> Item:
        return self.make(self.things[index])


def run(
    execution: Execution, calls: Calls, max_concurrency: object, return_exceptions: bool
) -> Verb[list[Any]]:
    """Do them all, here if the run is inline; their results in order."""
    limit = _checked_limit(max_concurrency, calls)
    if execution.journal.inline:
        execution.check()
        execution.refuse_in_step(calls.verb)
        return _inline(execution, calls, return_exceptions)
    place, over = execution.place(calls.verb, calls.name, "fan_out")
    fan_out = _FanOut(execution, calls, place, limit, not return_exceptions)
    outcome: Any = over
    if over is None:
        outcome = yield Waiting(fan_out.ask, "waiting", f"{len(calls)} items of {calls.name}")
    else:
        about = json.loads(over.context or "{}")
        fan_out.check(over.kind, about.get("items", -1))
    return _results(execution.services, calls, outcome, return_exceptions)


def _checked_limit(limit: object, calls: Calls) -> int:
    """How many items may be begun at once."""
    if limit is None:
        return len(calls)
    if type(limit) is not int or limit < 1:
        raise OptionError(
            f"durable.{calls.verb}(max_concurrency={limit!r}): give a number of items from 1 on,"
            " or None for any number"
        )
    return limit


def _inline(execution: Execution, calls: Calls, return_exceptions: bool) -> list[Any]:
    """Execute the items one after the other, here and now."""
    results: list[Any] = []
    for index in range(len(calls)):
        try:
            results.append(calls[index].run_inline(execution))
        except Exception as exc:
            if not return_exceptions:
                _note(exc, calls, index, execution.services.mask)
                raise
            results.append(exc)
    return results


@dataclass(frozen=True, slots=True)
class _FanOut:
    """A fan-out on its way: begun, waited for, settled."""

    execution: Execution
    calls: Calls
    place: Place
    limit: int
    stop_at_first: bool

    def ask(self) -> Wait | None:
        """Go on with it as far as it goes; see `Waiting`.

        Each write is safe to repeat, so it does not matter where a crash ends this.
        """
        journal, place = self.execution.journal, self.place
        while True:
            state: State | None = journal.call(fan_outs.open, place, self._new())
            if state is None:
                return None
            self.check(state.kind, state.items)
            if state.wait.over or (state.started and not (state.done or state.stopped)):
                return state.wait
            if not state.started:
                if not self._start(state.id):
                    return None
                continue
            if state.stopped:
                journal.call(fan_outs.cancel_unfinished, place.run_id, state.id)
            journal.call(fan_outs.settle, place, state.id)

    def check(self, kind: str, items: int) -> None:
        """Stop the run if what is recorded at its place is something else."""
        if kind == "fan_out" and items == len(self.calls):
            return
        recorded = f"a fan-out of {items} items" if kind == "fan_out" else f"a {kind!r}"
        exc = NonDeterministicWorkflow(
            f"the history has {recorded} at position {self.place.ordinal}, the code now asks for"
            f" durable.{self.calls.verb}() of {len(self.calls)} items of {self.calls.name!r}. The"
            " items have to be the same on every replay: take them from the run's arguments or"
            " from the result of a step"
        )
        raise self.execution.park(Park("paused", str(exc)), cause=exc) or exc from exc

    def _new(self) -> NewFanOut:
        place, run = self.place, self.execution
        seed = f"fan_out/{run.generation}/{place.branch}/{place.ordinal}/{place.name}"
        return NewFanOut(
            id=str(uuid.uuid5(uuid.UUID(run.id), seed)),
            items=len(self.calls),
            stop_at_first=self.stop_at_first,
            limited=self.limit < len(self.calls),
        )

    def _start(self, fan_out: str) -> bool:
        """Insert the items, held ones first. False: the run is another claim's by now."""
        journal, place = self.execution.journal, self.place
        # All before the first is inserted: what cannot be stored fails the run
        # before anything was begun.
        rows = self._rows(fan_out)
        for lot in _lots([*rows[self.limit :], *rows[: self.limit]]):
            if not journal.call(fan_outs.insert, place, fan_out, lot):
                return False
        return journal.call(fan_outs.started, place)

    def _rows(self, fan_out: str) -> list[NewRun]:
        execution = self.execution
        claim = cast("PostgresJournal", execution.journal).claim
        make = Rows(execution, json.loads(claim.message)).make
        base = uuid.UUID(fan_out)
        return [
            replace(
                make(self.calls[index], str(uuid.uuid5(base, str(index)))),
                fan_index=index,
                held=index >= self.limit,
            )
            for index in range(len(self.calls))
        ]


def _lots(rows: Sequence[NewRun]) -> Iterator[list[NewRun]]:
    """Divide rows so that no statement is large."""
    lot: list[NewRun] = []
    size = 0
    for row in rows:
        if lot and (len(lot) == _LOT or size + len(row.input) > _LOT_BYTES):
            yield lot
            lot, size = [], 0
        lot.append(row)
        size += len(row.input)
    if lot:
        yield lot


# --- outcomes


def _results(services: Services, calls: Calls, outcome: Any, return_exceptions: bool) -> list[Any]:
    if outcome.status == "failed":
        about = json.loads(outcome.context)
        raise _error(services, calls, about, outcome.error)
    values: list[Any] = services.codec.decode(outcome.output)
    failures = json.loads(outcome.error or "[]")
    for failed in sorted(failures, key=lambda each: each["about"]["item"]):
        about, error = failed["about"], failed["error"]
        exc = _error(services, calls, about, error and json.dumps(error))
        if not return_exceptions:  # all had succeeded, and this one was erased since
            raise exc
        values[about["item"]] = exc
    return values


def _error(
    services: Services, calls: Calls, about: Mapping[str, Any], error: str | None
) -> BaseException:
    """The exception of an item, which is its last: the body is not repeated for it."""
    exc: BaseException = (
        TaskRevokedError(about["reason"] or "canceled")
        if about["outcome"] == "canceled"
        else decode_failure(error or "null", services.codec)
    )
    _note(exc, calls, about["item"], services.mask, f", run {about['run']}")
    return settled(exc)


def _note(exc: BaseException, calls: Calls, index: int, mask: Mask, where: str = "") -> None:
    """Say which item it was, as ``add_note()`` does it from Python 3.11 on."""
    text = (
        f"durable.{calls.verb}(): item {index} of {len(calls)}, {calls[index].shown(mask)}{where}"
    )
    exc.__dict__["__notes__"] = [*exc.__dict__.get("__notes__", ()), text]
