"""Crash points: where a process can die between two things that outlive it.

Every SQL statement, publish, acknowledgement and result-backend write is four
points. The process dies just *before* or just *after* it; or it lives, and
the operation is *refused* by a connection that broke, or took place and its
answer is *lost*. They are found by wrapping the libraries that do these
things, so that code which is written later has its points without being
listed.

A test and the processes under test share a directory, the `CrashBoard`. Each
process notes there what it comes past; the test arms one point for one run,
and the process that reaches it kills itself.

Example:
    In a module that workers import, before anything else::

        from durable.testing import crashes
        crashes.install_from_environment()

    In the test, after a worker was started with ``DURABLE_TEST_CRASHES`` set
    to the board's directory::

        board.arm(run_id, CrashPoint("child", "sql runs._FINISH", "after"))
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from celery import signals
from celery._state import get_current_task

T = TypeVar("T")

#: Environment variable with the directory of the board.
VARIABLE = "DURABLE_TEST_CRASHES"

MOMENTS = ("before", "refused", "after", "lost")
#: ``client`` starts runs; ``worker`` is a worker's main process, ``child`` one of its pool's.
ROLES = ("client", "worker", "child")

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, order=True)
class CrashPoint:
    """A moment in the life of a run, or of a process when no run is concerned.

    Attributes:
        role: the kind of process, one of `ROLES`.
        operation: kind and name, such as ``sql runs._CLAIM`` or
            ``publish shop.email``.
        moment: one of `MOMENTS`.
        nth: which time, from 1, over all processes that had the run.

    Example:
        >>> CrashPoint.parse("child | sql COMMIT | lost | 2")
        CrashPoint(role='child', operation='sql COMMIT', moment='lost', nth=2)
    """

    role: str
    operation: str
    moment: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.role} | {self.operation} | {self.moment} | {self.nth}"

    @classmethod
    def parse(cls, text: str) -> CrashPoint:
        """Read what ``str()`` wrote."""
        role, operation, moment, nth = text.strip().split(" | ")
        return cls(role, operation, moment, int(nth))


class CrashBoard:
    """A directory through which a test and the processes under test speak.

    A *scope* is the id of a run (or plain task), or a role for what concerns
    no run in particular, such as a heartbeat.

    Args:
        directory: made if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("armed", "fired", "reached"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    # --- the test's side

    def arm(self, scope: str, point: CrashPoint) -> None:
        """Have the next process that reaches ``point`` die, once; counted from now on."""
        (self.directory / "fired" / scope).unlink(missing_ok=True)
        (self.directory / "reached" / scope).unlink(missing_ok=True)
        (self.directory / "armed" / scope).write_text(str(point))

    def disarm(self, scope: str) -> None:
        """Let everybody live."""
        (self.directory / "armed" / scope).unlink(missing_ok=True)

    def fired(self, scope: str) -> bool:
        """Tell whether a process has died at the point that was armed last."""
        return (self.directory / "fired" / scope).exists()

    def reached(self, scope: str) -> list[CrashPoint]:
        """List the points that a scope came past, in order."""
        try:
            lines = (self.directory / "reached" / scope).read_text().splitlines()
        except FileNotFoundError:
            return []
        return [
            CrashPoint.parse(f"{line} | {lines[:n].count(line)}") for n, line in _numbered(lines)
        ]

    def forget(self, scope: str) -> None:
        """Forget what a scope came past."""
        (self.directory / "reached" / scope).unlink(missing_ok=True)

    # --- the side of the process under test

    def note(self, scope: str, role: str, operation: str, moment: str) -> CrashPoint:
        """Write down that a point is reached; which time it is counts over all processes."""
        line = f"{role} | {operation} | {moment}"
        with (self.directory / "reached" / scope).open("ab+", buffering=0) as file:
            file.write(f"{line}\n".encode())  # one write: processes do not mix their lines
            file.seek(0)
            nth = file.read().decode().splitlines().count(line)
        return CrashPoint(role, operation, moment, nth)

    def fires(self, scope: str, point: CrashPoint) -> bool:
        """Tell whether to die here. Once: of two processes that ask, one is told so."""
        armed = self.directory / "armed" / scope
        try:
            if armed.read_text() != str(point):
                return False
            armed.rename(self.directory / "fired" / scope)
        except FileNotFoundError:
            return False
        return True


class Injector:
    """What the wrapped libraries of this process report to."""

    def __init__(self, board: CrashBoard) -> None:
        self._board = board
        self._worker: int | None = None
        signals.celeryd_init.connect(self._on_worker, weak=False)

    def around(
        self,
        operation: str,
        ids: Iterable[object],
        perform: Callable[[], T],
        *,
        found: Callable[[T], Iterable[object]] = lambda _: (),
        lose: Callable[[], Exception],
    ) -> T:
        """Perform an operation, with two crash points before and two after it.

        Args:
            operation: its name.
            ids: values among which are the ids of the runs that it is about;
                not looked at in a task, which is its own run.
            perform: does it.
            found: gives further such values from its outcome.
            lose: breaks the connection; returns the error to raise.
        """
        known = list(ids)
        self.reach(operation, "before", known)
        if self.reach(operation, "refused", known):
            raise lose()
        outcome = perform()
        known += found(outcome)
        self.reach(operation, "after", known)
        if self.reach(operation, "lost", known):
            raise lose()
        return outcome

    def reach(self, operation: str, moment: str, ids: Iterable[object]) -> bool:
        """Come past a point, or die there. True: the connection is to break."""
        role, broken = self._role(), False
        for scope in self._scopes(ids) or {role}:
            point = self._board.note(scope, role, operation, moment)
            if self._board.fires(scope, point):
                broken = moment in {"refused", "lost"}
                if not broken:
                    os.kill(os.getpid(), signal.SIGKILL)
        return broken

    def _on_worker(self, **_: object) -> None:
        self._worker = os.getpid()

    def _role(self) -> str:
        if self._worker is None:
            return "client"
        return "worker" if os.getpid() == self._worker else "child"

    def _scopes(self, values: Iterable[object]) -> set[str]:
        task = get_current_task()
        if task is not None and task.request.id:
            return {task.request.id}
        return {value for value in values if isinstance(value, str) and _ID.fullmatch(value)}


_installed: list[Injector] = []


def install(directory: Path) -> None:
    """Wrap psycopg, kombu and Celery's result backends in this process and what it forks.

    Once and for good; meant for processes that a test starts for the purpose.
    """
    if _installed:
        return
    from durable.testing import _wrappers

    _installed.append(Injector(CrashBoard(directory)))
    _wrappers.wrap_all(_installed[0])


def install_from_environment() -> bool:
    """Do so if ``DURABLE_TEST_CRASHES`` names a directory; tell whether it does."""
    directory = os.environ.get(VARIABLE)
    if directory:
        install(Path(directory))
    return bool(directory)


def _numbered(lines: list[str]) -> Iterable[tuple[int, str]]:
    return enumerate(lines, start=1)
