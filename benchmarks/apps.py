"""The apps that the benchmarks' workers run: durable, and Celery alone."""

from __future__ import annotations

import os
import resource
import time

from celery import Celery

from durable import Durable, Workflow, fan_out, step, wait_for_event

BROKER = os.environ.get("DURABLE_BENCH_BROKER", "redis://127.0.0.1:6379/0")
DATABASE = os.environ.get("DURABLE_BENCH_DATABASE", "")
PREFIX = os.environ.get("DURABLE_BENCH_PREFIX", "durable-bench-")


def _app(name: str, **settings: object) -> Celery:
    app = Celery(name, broker=BROKER)
    app.conf.update(
        broker_transport_options={"global_keyprefix": PREFIX},
        task_default_queue=f"{PREFIX}{name}",
        worker_prefetch_multiplier=16,
        **settings,
    )
    return app


durable_app = _app("durable")
durable_app.conf.durable_database_url = DATABASE or "embedded"
Durable(durable_app)

database_app = _app(
    "database", result_backend=f"db+{DATABASE.replace('postgresql://', 'postgresql+psycopg://')}"
)
redis_app = _app(
    "redis", result_backend=BROKER, result_backend_transport_options={"global_keyprefix": PREFIX}
)


@step
def work(number: int) -> int:
    """Do next to nothing."""
    return number


# Not shared: else each app of the process has the tasks of all.
@durable_app.task(shared=False, base=Workflow, name="durable.noop")
def durable_noop() -> None:
    """Do nothing, durably."""


@durable_app.task(shared=False, base=Workflow, name="durable.steps")
def durable_steps(count: int) -> int:
    """Take so many steps."""
    return sum(work(number) for number in range(count))


@durable_app.task(shared=False, base=Workflow, name="durable.fan_out")
def durable_fan_out(count: int) -> dict[str, int]:
    """Do next to nothing so many times at once."""
    total = sum(fan_out(work, range(count)))
    return {"sum": total, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


@step
def read_clock() -> float:
    """Tell when this step began."""
    return time.time()


@durable_app.task(shared=False, base=Workflow, name="durable.receiver")
def durable_receiver(count: int) -> list[float]:
    """Wait for so many events, with a step after each."""
    times = []
    for _ in range(count):
        wait_for_event("tick")
        times.append(read_clock())
    return times


@database_app.task(shared=False, name="database.noop")
def database_noop() -> None:
    """Do nothing; Celery keeps the result in Postgres."""


@redis_app.task(shared=False, name="redis.noop")
def redis_noop() -> None:
    """Do nothing; Celery keeps the result in Redis."""
