"""From ``send_event`` to the step after the wait, with an idle worker."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import Figure, at_most

_EVENTS = 300
_LEAST_FREE = 0.02
_AMQP = "amqp://guest:guest@127.0.0.1:5672//"
_ROOT = Path(__file__).resolve().parents[1]
_TARGET = 50.0

_WAITING = """
SELECT status = 'waiting' FROM durable.workflow_runs WHERE id = %s
"""


def measure(url: str) -> list[Figure]:
    """Wake a run again and again, through Redis and through RabbitMQ."""
    brokers = {"Redis": os.environ.get("DURABLE_BENCH_BROKER", "redis://127.0.0.1:6379/0")}
    if _answers(5672):
        brokers["RabbitMQ"] = os.environ.get("DURABLE_BENCH_AMQP", _AMQP)
    figures = []
    for name, broker in brokers.items():
        # The app's module reads its broker when it is imported: a process for each.
        env = {
            **os.environ,
            "DURABLE_BENCH_DATABASE": url,
            "DURABLE_BENCH_BROKER": broker,
            "DURABLE_BENCH_PREFIX": f"durable-bench-events-{os.getpid()}-",
            "PYTHONPATH": str(_ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.events"],
            env=env,
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        times = sorted(float(each) for each in done.stdout.split())
        p50, p95 = statistics.median(times), times[int(len(times) * 0.95)]
        figures += [
            at_most(f"send_event to the next step, {name}, p50", p50 * 1e3, _TARGET, " ms"),
            Figure(f"send_event to the next step, {name}, p95", f"{p95 * 1e3:.3g} ms"),
        ]
    return figures


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _main() -> None:
    """Print the seconds of each wake-up. Sender and worker read one host's clock."""
    import psycopg

    from benchmarks import apps, workers

    app = apps.durable_app
    with (
        psycopg.connect(apps.DATABASE, autocommit=True) as conn,
        workers.worker("durable_app"),
    ):
        run = apps.durable_receiver.delay(_EVENTS + 1)
        sent = []
        for number in range(_EVENTS + 1):
            while not conn.execute(_WAITING, (run.id,)).fetchone()[0]:
                time.sleep(_LEAST_FREE)
            sent.append(time.time())
            run.send_event("tick", number)
        begun = run.get(timeout=60)
    app.durable.close()
    _forget(app)
    for before, after in list(zip(sent, begun, strict=True))[1:]:  # the first one warms up
        print(after - before)


def _forget(app: object) -> None:
    """Leave nothing of this run in the broker."""
    from benchmarks.apps import BROKER, PREFIX

    if BROKER.startswith("redis"):
        import redis

        with redis.Redis.from_url(BROKER) as client:
            for key in client.scan_iter(match=f"{PREFIX}*", count=1000):
                client.delete(key)
        return
    with app.connection_for_write() as connection, connection.channel() as channel:
        channel.queue_delete(app.conf.task_default_queue)
        channel.exchange_delete(app.conf.task_default_queue)


if __name__ == "__main__":
    _main()
