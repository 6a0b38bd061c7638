"""Run the benchmarks and print their figures: ``python -m benchmarks [name ...]``."""

from __future__ import annotations

import argparse
import importlib
import socket
import sys

from benchmarks.report import print_figures
from benchmarks.server import fresh_database

#: Module, title, whether it needs Redis.
_ALL = {
    "step": ("One step", False),
    "replay": ("Replay", False),
    "idle": ("An idle worker", True),
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
    print("\nTwo runs differ more than two lines of one run: compare the ratios.")
    return 0 if reached else 1


def _redis_answers() -> bool:
    try:
        socket.create_connection(("127.0.0.1", 6379), timeout=1).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
