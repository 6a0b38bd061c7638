"""What the demo prints: with colours and boxes where `rich` is installed, plainly otherwise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

Rows = Sequence[Sequence[str]]
PROGRESS_PAUSE = 0.5
COLOURS = {"failed": "yellow", "kill -9": "red"}


class Printer(Protocol):
    """Puts text on the terminal."""

    def line(self, text: str, style: str = "") -> None:
        """Print a line."""

    def table(self, columns: Sequence[str], rows: Rows) -> None:
        """Print aligned columns."""


class PlainPrinter:
    """For terminals and pipes, with nothing installed."""

    def line(self, text: str, style: str = "") -> None:
        """Print a line."""
        print(text, flush=True)

    def table(self, columns: Sequence[str], rows: Rows) -> None:
        """Print aligned columns."""
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("   " + "   ".join(cells).rstrip(), flush=True)


class RichPrinter:
    """With colours; needs `rich`."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)

    def line(self, text: str, style: str = "") -> None:
        """Print a line."""
        self._console.print(text, style=style or None, markup=False, soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Rows) -> None:
        """Print aligned columns, coloured by what stands in a row."""
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=None, header_style="dim", padding=(0, 3, 0, 0))
        for row in rows:
            style = next((COLOURS[word] for word in COLOURS for cell in row if word in cell), "")
            table.add_row(*map(Text, row), style=style)
        self._console.print(Padding(table, (0, 0, 0, 3)))


def best_printer() -> Printer:
    """`RichPrinter` if it can be had."""
    try:
        return RichPrinter()
    except ImportError:
        return PlainPrinter()


class Report:
    """The narrator. Counts its chapters and the seconds."""

    def __init__(self) -> None:
        self._printer = best_printer()
        self._began = time.monotonic()
        self._chapter = 0
        self._shown = ("", -PROGRESS_PAUSE)

    def title(self, text: str) -> None:
        """Say what this is."""
        self._printer.line(text, style="bold")

    def step(self, text: str) -> None:
        """Open a chapter."""
        self._chapter += 1
        self._printer.line(f"\n{self._chapter}. {text}", style="bold cyan")

    def say(self, text: str) -> None:
        """Add a line to the chapter."""
        self._printer.line(f"   {text}")

    def progress(self, text: str, *, last: bool = False) -> None:
        """Show where things are, if that has changed, and not too often."""
        shown, moment = self._shown
        if text != shown and (last or self._seconds() - moment >= PROGRESS_PAUSE):
            self._shown = (text, self._seconds())
            self._printer.line(f"   {self._seconds():5.1f} s  {text}", style="dim")

    def timeline(self, title: str, rows: Rows) -> None:
        """Show the attempts of a run's steps."""
        self._printer.line(f"\n   {title}")
        self._printer.table(["start", "step", "attempt", "took", "outcome"], rows)

    def effects(self, rows: Rows) -> None:
        """Show how often each thing was tried, finished, and took effect."""
        self._printer.table(["step", "finished", "body ran", "effect"], rows)

    def check(self, claim: str, *, holds: bool) -> None:
        """Show one thing that has to hold."""
        self._printer.line(
            f"   {'yes' if holds else 'NO '}  {claim}", style="green" if holds else "red"
        )

    def done(self) -> None:
        """End well."""
        self._printer.line(f"\nAll of it held, in {self._seconds():.0f} s.", style="bold green")

    def failure(self, why: str) -> None:
        """End badly."""
        self._printer.line(f"\nThe demo failed: {why}", style="bold red")

    def _seconds(self) -> float:
        return time.monotonic() - self._began
