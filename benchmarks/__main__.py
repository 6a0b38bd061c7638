"""Run the benchmarks and print their figures: ``python -m benchmarks [name ...]``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import socket
import subprocess
import sys

import redis

from benchmarks.report import print_figures
from benchmarks.server import fresh_database

#: Module, title, whether it needs Redis.
_ALL = {
    "step": ("One step", False),
    "replay": ("Replay", False),
    "idle": ("An idle worker", True),
    "fan_out": ("A fan-out over two workers (Redis, prefork 1 each)", True),
    "events": ("An event, to an idle worker", True),
    "outbox": ("Starts in transactions (Redis, prefork 2)", True),
    "throughput": ("Through a worker (Redis, prefork 2)", True),
}


def main() -> int:
    """Run those asked for, or all; 1 if a target was not reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(_ALL)}")
    names = parser.parse_args().names or list(_ALL)
    unknown = set(names) - set(_ALL)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    if len(names) > 1:
        return max([_in_a_process_of_its_own(name) for name in names])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the workers end with this
    # Of its own: another one on this machine would take its messages.
    prefix = os.environ.setdefault("DURABLE_BENCH_PREFIX", f"durable-bench-{os.getpid()}-")
    try:
        reached = _measure(names)
    finally:
        if _redis_answers():
            _delete_keys(prefix)
    print("\nTwo runs differ more than two lines of one run: compare the ratios.")
    return 0 if reached else 1


def _in_a_process_of_its_own(name: str) -> int:
    """Run one benchmark; its app then has the address of its own database."""
    return subprocess.run([sys.executable, "-m", "benchmarks", name], check=False).returncode


def _measure(names: list[str]) -> bool:
    reached = True
    for name in names:
        title, needs_redis = _ALL[name]
        if needs_redis and not _redis_answers():
            print(f"\n{title}: skipped, there is no Redis on 127.0.0.1:6379")
            continue
        with fresh_database() as url:
            figures = importlib.import_module(f"benchmarks.{name}").measure(url)
        print_figures(title, figures)
        reached = reached and all(figure.reached is not False for figure in figures)
    return reached


def _delete_keys(prefix: str) -> None:
    with redis.Redis("127.0.0.1", 6379) as client:
        for key in client.scan_iter(match=f"{prefix}*", count=1000):
            client.delete(key)


def _redis_answers() -> bool:
    try:
        socket.create_connection(("127.0.0.1", 6379), timeout=1).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
