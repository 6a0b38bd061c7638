"""What a run has done so far: its recorded steps, loaded once with the claim."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from durable.errors import NonDeterministicWorkflow

#: That the new way was taken at a place, see `durable.patched`. Takes no place itself.
PATCH = "patch"

#: How a kind is called in an error; steps have no more than their name.
_CALLED = {
    "dispatch": "start of {}",
    "sleep": "a sleep",
    "event": "wait for event {}",
    "timer": "wait for a result with a timeout",
    "fan_out": "fan-out over {}",
    "value": "{}",
    "undo": "the begin of the undo",
}

#: What is tried again when it fails. The rest, such as a wait, fails once.
_ATTEMPTED = frozenset({"run", "dispatch"})


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded attempt of a step; output, error and context are JSON text.

    Attributes:
        rank: how many attempts of the run had ended before this one.
    """

    branch: str
    ordinal: int
    name: str
    attempt: int
    kind: str
    status: str
    output: str | None
    error: str | None
    context: str | None
    rank: int = 0

    @property
    def verdict(self) -> Mapping[str, object]:
        """How a failed attempt was judged: ``class``, ``limited``, ``final``, ``reason``."""
        judged: Mapping[str, object] = json.loads(self.context or "{}")
        return judged

    @property
    def settled(self) -> bool:
        """Whether it is over: it has a result, or its last error counts."""
        if self.status == "failed" and self.kind in _ATTEMPTED:
            return bool(self.verdict.get("final"))
        return self.status in {"succeeded", "failed"}


def _number(step: Recorded) -> int:
    return step.attempt


class History:
    """Recorded attempts by their place in the workflow: branch and position in it.

    Args:
        rows: the attempts, in the order in which they ended.

    Attributes:
        empty: whether there is nothing.
        noted: highest rank of what was looked up, and is over, since it was set to None.

    Example:
        >>> rows = [("", 0, "load", 1, "run", "succeeded", "7", None, None)]
        >>> history = History(rows)
        >>> history.attempts("", 0, "load")[-1].output
        '7'
        >>> history.attempts("", 1, "charge")
        ()
    """

    def __init__(self, rows: Iterable[Sequence[object]] = ()) -> None:
        self.empty = True
        self._places: dict[tuple[str, int], tuple[Recorded, ...]] = {}
        self._ahead: dict[str, int] = {}
        self._results: dict[str, Recorded] = {}
        self._patches: set[tuple[str, int, str]] = set()
        self.noted: int | None = None
        for rank, row in enumerate(rows):
            self.empty = False
            step = Recorded(*row, rank=rank)  # type: ignore[arg-type, misc]
            if step.kind == "result":
                self._results[step.branch] = step
                continue
            if step.kind == PATCH:
                self.add_patch(step.branch, step.ordinal, step.name)
                continue
            place = (step.branch, step.ordinal)
            known = self._places.get(place, ())
            # By their numbers: the clock may have been set back between two of them.
            self._places[place] = tuple(sorted((*known, step), key=_number)) if known else (step,)
            self._ahead[step.branch] = max(self._ahead.get(step.branch, -1), step.ordinal)

    def attempts(
        self, branch: str, ordinal: int, name: str, kind: str = "run"
    ) -> tuple[Recorded, ...]:
        """Look up the attempts at a place, oldest first.

        Raises:
            NonDeterministicWorkflow: something else was recorded there.
        """
        found = self._places.get((branch, ordinal), ())
        if found and (found[-1].name != name or found[-1].kind != kind):
            both_steps = found[-1].kind == kind == "run"
            raise NonDeterministicWorkflow(
                f"the history has {_called(found[-1].kind, found[-1].name)} at"
                f" {_position(branch, ordinal)}, the code now asks for"
                f" {repr(name) if both_steps else _called(kind, name)}."
                " A workflow must take the same steps in the same order on every"
                " replay: has it changed since the run started, or does it branch on time,"
                " chance or outside state that is not itself a step?"
            )
        if found:
            self._note(found[-1])
        return found

    def result(self, task_id: str) -> Recorded | None:
        """Look up the outcome of a task that the run has started. None: it is not known yet."""
        found = self._results.get(task_id)
        if found is None or not found.settled:
            return None
        self._note(found)
        return found

    def _note(self, step: Recorded) -> None:
        if step.settled and (self.noted is None or step.rank > self.noted):
            self.noted = step.rank

    def check_end(self, branch: str, ordinal: int) -> None:
        """Refuse an end of the branch at a place where something is recorded.

        Raises:
            NonDeterministicWorkflow: naming what is recorded there.
        """
        found = self._places.get((branch, ordinal), ())
        if found:
            raise NonDeterministicWorkflow(
                f"the history has {_called(found[-1].kind, found[-1].name)} at"
                f" {_position(branch, ordinal)}, the code now ends before it. Has the workflow"
                " changed since the run started, or does it branch on time, chance or outside"
                " state that is not itself a step?"
            )

    def covers(self, branch: str, ordinal: int) -> bool:
        """Tell whether something is recorded at this place or after it."""
        return ordinal <= self._ahead.get(branch, -1)

    def is_patched(self, branch: str, ordinal: int, patch_id: str) -> bool:
        """Tell whether the new way was taken before this place."""
        return (branch, ordinal, patch_id) in self._patches

    def add_patch(self, branch: str, ordinal: int, patch_id: str) -> None:
        """Note that the new way is taken before this place."""
        self._patches.add((branch, ordinal, patch_id))


def _called(kind: str, name: str) -> str:
    return _CALLED.get(kind, "step {}").format(repr(name))


def _position(branch: str, ordinal: int) -> str:
    return f"position {ordinal} of branch {branch}" if branch else f"position {ordinal}"
