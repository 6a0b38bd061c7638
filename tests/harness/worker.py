"""Real ``celery worker`` processes that tests start, kill, stop and continue."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal as signals
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil
from pytest_celery import CeleryTestWorker

from tests.harness.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 60
#: Enough for a loaded two-core machine; a worker alone is ready after a second.
START_TIMEOUT = 30.0
STOP_TIMEOUT = 20.0

Signal = str | int


class LocalWorker:
    """A worker and its pool, in a process group of their own.

    It stands where pytest-celery expects a worker's container.

    Args:
        app: module that has the Celery app, as for ``celery -A``.
        name: the node's name, before the ``@``.
        log_path: where its output goes, over all its starts.
        pool: prefork, threads, gevent, solo, ...
        concurrency: processes, threads or greenlets of the pool.
        queues: what it consumes; the app's default queue if empty.
        env: what its environment has besides ours.
        args: more arguments of ``celery worker``.
    """

    def __init__(
        self,
        app: str,
        *,
        name: str,
        log_path: Path,
        pool: str = "prefork",
        concurrency: int = 2,
        queues: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = ("--without-mingle", "--without-gossip"),
    ) -> None:
        self.app = app
        self.pool = pool
        self.node_name = f"{name}@localhost"
        self.log_path = log_path
        self._command = self._celery_command(concurrency, queues, args)
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    # --- life ---------------------------------------------------------------

    def start(self) -> None:
        """Start it and return at once; see :meth:`wait_ready`."""
        assert not self.is_running(), f"{self.node_name} runs already"
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = self._popen(log)

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until it says that it consumes; fail at once when it ended instead."""

        def says_ready() -> bool:
            assert self.is_running(), f"{self.node_name} ended while starting:\n{self.tail()}"
            return f"{self.node_name} ready." in self.logs_since_start()

        wait_for(says_ready, timeout=timeout, what=f"{self.node_name} to be ready")

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """Stop it warm (SIGTERM), wait for the end of every process, return the exit code."""
        self.signal(signals.SIGTERM, main_only=True)
        return self.wait_gone(timeout)

    def kill(self, signal: Signal = "SIGKILL", *, main_only: bool = False) -> None:
        """Send a signal to the main process and its children at once, and wait until they ended.

        With ``main_only`` the children are left to themselves, as after the
        out-of-memory killer took the main process.
        """
        self.signal(signal, main_only=main_only)
        if main_only:
            self._wait_main(STOP_TIMEOUT)
        else:
            self.wait_gone(STOP_TIMEOUT)

    def restart(self, timeout: float = START_TIMEOUT) -> None:
        """Start it again under its old name, after a warm stop if it still runs."""
        if self.is_running():
            self.stop()
        self.start()
        self.wait_ready(timeout)

    def teardown(self) -> None:
        """End every process of it, whatever state it is in."""
        if self._process is None:
            return
        self.signal(signals.SIGKILL)
        self.wait_gone(STOP_TIMEOUT)

    # --- processes ----------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.node_name} was not started"
        return self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def children(self) -> list[int]:
        """Process ids of the pool's living children, oldest first; none but in prefork."""
        return [process.pid for process in self._group() if process.pid != self.pid]

    def kill_child(self, pid: int | None = None, signal: Signal = "SIGKILL") -> int:
        """Send a signal to one child (the oldest if not named), wait for its end, return its pid."""
        victim = psutil.Process(self.children()[0] if pid is None else pid)
        victim.send_signal(_number(signal))
        wait_for(
            lambda: _has_ended(victim),
            what=f"child {victim.pid} of {self.node_name} to end",
        )
        return victim.pid

    def sigstop(self, *, main_only: bool = False) -> None:
        """Freeze it, as a debugger, a full machine or a suspended laptop would."""
        self.signal(signals.SIGSTOP, main_only=main_only)
        frozen = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        processes = [psutil.Process(self.pid)] if main_only else self._group()
        wait_for(
            lambda: all(process.status() in frozen for process in processes),
            what=f"{self.node_name} to stand still",
        )

    def sigcont(self) -> None:
        """Let a frozen worker go on."""
        self.signal(signals.SIGCONT)

    def signal(self, signal: Signal, *, main_only: bool = False) -> None:
        send = os.kill if main_only else os.killpg
        with contextlib.suppress(ProcessLookupError):
            send(self.pid, _number(signal))

    def signal_children(self, signal: Signal) -> None:
        """Send a signal to the pool's children alone."""
        for pid in self.children():
            os.kill(pid, _number(signal))

    def wait_gone(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait until no process of it is left; returns the main process's exit code."""
        code = self._wait_main(timeout)
        wait_for(lambda: not self._group(), timeout=timeout, what=f"{self.node_name} to be gone")
        return code

    # --- logs ---------------------------------------------------------------

    def logs(self) -> str:
        """All that it wrote, over all its starts."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_text(errors="replace")

    def logs_since_start(self) -> str:
        """What it wrote since it was last started."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def tail(self, lines: int = TAIL_LINES) -> str:
        return "\n".join(self.logs().splitlines()[-lines:])

    # --- what pytest-celery asks of a container -----------------------------

    @property
    def id(self) -> str:
        return self.node_name

    @property
    def name(self) -> str:
        return self.node_name

    @property
    def status(self) -> str:
        return "running" if self.is_running() else "exited"

    def ready(self) -> bool:
        self.wait_ready()
        return True

    def reload(self) -> None:
        """Docker's word for asking again; our state is always asked for."""

    def worker_name(self) -> str:
        return self.node_name.partition("@")[0]

    # --- inside -------------------------------------------------------------

    def _celery_command(
        self, concurrency: int, queues: Sequence[str], args: Sequence[str]
    ) -> list[str]:
        command = [sys.executable, "-m", "celery", "-A", self.app, "worker"]
        command += ["--pool", self.pool, "--concurrency", str(concurrency)]
        command += ["--hostname", self.node_name, "--loglevel", "INFO"]
        if queues:
            command += ["--queues", ",".join(queues)]
        return [*command, *args]

    def _popen(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=self._env,
            start_new_session=True,
            preexec_fn=_die_with_parent(),  # noqa: PLW1509 - it only calls prctl
        )

    def _wait_main(self, timeout: float) -> int:
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            message = f"{self.node_name} still runs after {timeout:g} s:\n{self.tail()}"
            raise AssertionError(message) from None

    def _group(self) -> list[psutil.Process]:
        """Living processes of the worker's group, oldest first; also orphaned children."""
        group = [process for process in psutil.process_iter() if _in_group(process, self.pid)]
        return sorted(group, key=lambda process: process.create_time())


def _in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _number(signal: Signal) -> int:
    return int(signals.Signals[signal] if isinstance(signal, str) else signal)


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux, have the kernel kill a worker whose test run was killed.

    Linux means the parent *thread*, so a worker that is started from another
    thread than the main one goes without.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl, pr_set_pdeathsig = ctypes.CDLL(None).prctl, 1

    def ask_kernel() -> None:
        prctl(pr_set_pdeathsig, signals.SIGKILL)

    return ask_kernel


class WorkerNode(CeleryTestWorker):
    """A worker process as a pytest-celery node; unknown names go to its :class:`LocalWorker`."""

    container: LocalWorker

    def kill(
        self,
        signal: Signal = "SIGKILL",
        reload_container: bool = True,
        *,
        main_only: bool = False,
    ) -> None:
        self.container.kill(signal, main_only=main_only)

    def restart(
        self,
        reload_container: bool = True,
        force: bool = False,
    ) -> None:
        """Start it again; with ``force`` it is killed first rather than stopped warm."""
        if force:
            self.container.kill()
        self.container.restart()

    def hostname(self) -> str:
        """The node's name as Celery shows it, such as ``w1@localhost``."""
        return self.container.node_name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)
