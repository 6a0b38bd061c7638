"""Which servers this machine has, and what a test does when one is missing."""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
from dataclasses import dataclass

import pytest

REQUIRED = "DURABLE_TEST_REQUIRE_SERVICES"


@dataclass(frozen=True)
class Service:
    """A server that acceptance tests use when it listens on its standard port."""

    name: str
    port: int
    host: str = "127.0.0.1"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


POSTGRES = Service("PostgreSQL", 5432)
RABBITMQ = Service("RabbitMQ", 5672)
REDIS = Service("Redis", 6379)
SERVICES = (POSTGRES, RABBITMQ, REDIS)


@functools.cache
def is_reachable(service: Service) -> bool:
    try:
        socket.create_connection((service.host, service.port), timeout=2).close()
    except OSError:
        return False
    return True


def require(service: Service) -> None:
    """Skip the test when ``service`` is missing; fail it where services are required."""
    if not is_reachable(service):
        missing(f"{service.name} does not listen on {service.address}")


def require_module(name: str) -> None:
    """Skip or fail the test when an optional package is not installed."""
    if importlib.util.find_spec(name) is None:
        missing(f"the package {name} is not installed")


def missing(why: str) -> None:
    if os.environ.get(REQUIRED, "") not in ("", "0"):
        pytest.fail(f"{why}, and {REQUIRED} is set", pytrace=False)
    pytest.skip(why)


def report() -> list[str]:
    """Lines for the head of the test report: what was found, what will be skipped."""
    lines = [
        f"{service.name} at {service.address}: "
        + ("found" if is_reachable(service) else "not found, its tests are skipped")
        for service in SERVICES
    ]
    url = os.environ.get("DURABLE_DATABASE_URL", "")
    database = "the server of DURABLE_DATABASE_URL" if url not in ("", "embedded") else "embedded"
    return ["services:", *(f"  {line}" for line in lines), f"  Postgres for all else: {database}"]
