"""Processes forked from one that has imported everything already.

A worker is there after a quarter of a second instead of one and a half, which
is what makes it possible to kill a hundred of them in one test.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from tests.harness.waiting import wait_for

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "celery.bin.celery",
        "celery.concurrency.prefork",
        "celery.worker.consumer",
        "celery.backends.redis",
        "kombu.transport.pyamqp",
        "kombu.transport.redis",
        "kombu.transport.filesystem",
        "sqlalchemy.orm",
        "sqlalchemy.dialects.postgresql.psycopg",
        "durable.testing._wrappers",
        "durable.app",
        "durable.embedded",
    ]
)


def forked(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a process that runs ``target``, a function of a module, and return it."""
    process = _CONTEXT.Process(target=target, args=args)
    process.start()
    return process


class ForkedWorker:
    """A real ``celery worker`` with its pool, in a process group of its own.

    Args:
        app: module that has the Celery app.
        log_path: where its output goes, over all its starts.
        env: what its environment has besides ours.
        args: arguments of ``celery worker``.
    """

    def __init__(
        self, app: str, *, log_path: Path, env: Mapping[str, str], args: Sequence[str] = ()
    ) -> None:
        self._start_args = (app, ["worker", *args], dict(env), str(log_path))
        self._process: BaseProcess | None = None

    def start(self) -> None:
        self.kill()
        self._process = forked(_run_worker, *self._start_args)

    def is_running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def stop(self, timeout: float = 20.0) -> None:
        """Stop it warm, and wait for the end."""
        assert self._process is not None
        self._process.terminate()
        self._process.join(timeout)
        self.kill()

    def kill(self) -> None:
        """End what there is of it, also children that have lost their main process."""
        if self._process is None:
            return
        group = self._process.pid
        assert group is not None
        for process in [self._process, *_members(group)]:
            process.kill()
        self._process.join()
        wait_for(lambda: not _members(group), what=f"process group {group} to be gone")
        self._process = None


def _members(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _run_worker(app: str, argv: list[str], env: dict[str, str], log_path: str) -> None:
    os.setpgid(0, 0)
    if sys.platform == "linux":
        # Should the run of the tests be killed, then the fork server ends when
        # nobody holds its pipe any more, and the kernel ends us with it.
        os.close(forkserver._forkserver._forkserver_alive_fd)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(env)
    sys.argv = ["celery", *argv]
    importlib.import_module(app).app.worker_main(argv)
