"""What the tests stand on: services of this machine, real workers, waiting.

Fixtures are in ``tests/conftest.py``; ``CONTRIBUTING.md`` lists them.
"""

from tests.harness.matrix import BROKERS, POOLS, every_broker, every_pool, every_postgres
from tests.harness.waiting import wait_for
from tests.harness.worker import LocalWorker, WorkerNode

__all__ = [
    "BROKERS",
    "POOLS",
    "LocalWorker",
    "WorkerNode",
    "every_broker",
    "every_pool",
    "every_postgres",
    "wait_for",
]
