"""What a benchmark answers, and how it is printed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report.

    Attributes:
        what: what was measured.
        value: the figure, with its unit.
        target: what it should be, in the same words.
        reached: whether it is.
    """

    what: str
    value: str
    target: str = ""
    reached: bool | None = None


def at_most(what: str, value: float, limit: float, unit: str = "") -> Figure:
    """A figure that should not be larger than ``limit``."""
    return Figure(what, f"{value:,.3g}{unit}", f"at most {limit:g}{unit}", value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "") -> Figure:
    """A figure that should not be smaller than ``limit``."""
    return Figure(what, f"{value:,.3g}{unit}", f"at least {limit:g}{unit}", value >= limit)


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds per call of some candidates, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds per call of a candidate."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, yardstick: str) -> float:
        """How many times the yardstick's time a candidate takes, the median over rounds.

        Within a round both had the same neighbours; between rounds these change.
        """
        pairs = zip(self.seconds[name], self.seconds[yardstick], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, per_round: int
) -> Rounds:
    """Time each candidate in turn, round after round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            started = time.perf_counter()
            for _ in range(per_round):
                call()
            times[name].append((time.perf_counter() - started) / per_round)
    return Rounds(times)


def print_figures(title: str, figures: list[Figure]) -> None:
    """Print a benchmark's lines."""
    marks = {True: "reached", False: "NOT REACHED", None: ""}
    print(f"\n{title}")
    for figure in figures:
        print(
            f"  {figure.what:<58} {figure.value:>16}  {figure.target:<16} {marks[figure.reached]}"
        )
