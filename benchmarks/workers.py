"""Real workers of the benchmarks' apps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def worker(
    app: str, *, concurrency: int = 2, name: str = "worker"
) -> Iterator[subprocess.Popen[bytes]]:
    """A prefork worker of ``benchmarks.apps:<app>``, gone afterwards."""
    command = [sys.executable, "-m", "celery", "-A", f"benchmarks.apps:{app}", "worker"]
    command += [
        "--concurrency",
        str(concurrency),
        "--loglevel",
        "ERROR",
        "--hostname",
        f"{app}-{name}@%h",
    ]
    process = subprocess.Popen(
        [*command, "--without-mingle", "--without-gossip"],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def rate(done: Callable[[], int], total: int, *, timeout: float = 120.0) -> float:
    """Count finished tasks until all are; tasks a second over the last four fifths."""
    started_at, first = 0.0, 0
    deadline = time.perf_counter() + timeout
    while (count := done()) < total:
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{count} of {total} tasks were done after {timeout:g} s")
        if not first and count >= total / 5:
            started_at, first = time.perf_counter(), count
        time.sleep(0.02)
    return (total - first) / (time.perf_counter() - started_at)
