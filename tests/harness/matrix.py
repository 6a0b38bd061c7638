"""Marks that run a test over every broker, pool or Postgres server.

They parametrise the fixtures of those names indirectly, so that a test that
does not use one runs once, over the default.
"""

from __future__ import annotations

import pytest

BROKERS = ("rabbitmq", "redis", "filesystem")
POOLS = ("prefork", "threads", "gevent", "solo")

every_broker = pytest.mark.parametrize("celery_broker", BROKERS, indirect=True)
every_pool = pytest.mark.parametrize("worker_pool", POOLS, indirect=True)
every_postgres = pytest.mark.parametrize(
    "postgres_server", ["default", "machine"], indirect=True, scope="session"
)
