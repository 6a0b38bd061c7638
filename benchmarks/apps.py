"""The apps that the benchmarks' workers run: durable, and Celery alone."""

from __future__ import annotations

import os

from celery import Celery

from durable import Durable, Workflow, step

BROKER = os.environ.get("DURABLE_BENCH_BROKER", "redis://127.0.0.1:6379/0")
DATABASE = os.environ.get("DURABLE_BENCH_DATABASE", "")
PREFIX = os.environ.get("DURABLE_BENCH_PREFIX", "durable-bench-")


def _app(name: str, **settings: object) -> Celery:
    app = Celery(name, broker=BROKER)
    app.conf.update(
        broker_transport_options={"global_keyprefix": PREFIX},
        task_default_queue=name,
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


# Named apart: Celery shares the tasks of one app with all apps of the process.
@durable_app.task(base=Workflow, name="durable.noop")
def durable_noop() -> None:
    """Do nothing, durably."""


@durable_app.task(base=Workflow, name="durable.steps")
def durable_steps(count: int) -> int:
    """Take so many steps."""
    return sum(work(number) for number in range(count))


@database_app.task(name="database.noop")
def database_noop() -> None:
    """Do nothing; Celery keeps the result in Postgres."""


@redis_app.task(name="redis.noop")
def redis_noop() -> None:
    """Do nothing; Celery keeps the result in Redis."""
