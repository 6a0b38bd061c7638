"""A real Celery worker in a process group of its own, so that it can be killed as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import final

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = ["-A", "celery_app", "worker", "-P", "prefork", "-c", "2", "-l", "INFO"]
GRACE = 15.0


class WorkerDied(Exception):
    """The worker ended by itself."""


@final
class Worker:
    """``with Worker(log):`` starts it, and stops it warmly at the end."""

    command = "celery -A celery_app worker -P prefork -c 2"

    def __init__(self, log: Path) -> None:
        self._log = log

    def __enter__(self) -> Worker:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "celery", *ARGUMENTS],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def check(self) -> None:
        """Raise if the worker has ended, with the end of its log."""
        code = self._process.poll()
        if code is not None:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise WorkerDied("\n".join([f"the worker ended with code {code}:", *lines[-25:]]))

    def kill(self) -> None:
        """SIGKILL to the worker and all its children at once."""
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
