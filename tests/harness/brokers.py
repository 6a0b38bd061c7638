"""The brokers of the acceptance tests, as pytest-celery nodes.

Each test has a queue of its own; beyond that RabbitMQ gets a virtual host for
the whole run where ``rabbitmqctl`` may make one, Redis a key prefix, and the
filesystem transport a directory.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kombu
from pytest_celery import CeleryTestBroker

from tests.harness.names import PREFIX, is_left_over, unique_name
from tests.harness.proxy import Proxy
from tests.harness.services import RABBITMQ, REDIS


@dataclass
class LocalBroker:
    """Stands where pytest-celery expects a broker's container."""

    name: str
    url: str
    queue: str = field(default_factory=unique_name)
    transport_options: dict[str, Any] = field(default_factory=dict)
    #: Queues besides ``queue`` that workers of the test consume.
    more_queues: set[str] = field(default_factory=set)

    @property
    def id(self) -> str:
        return self.name

    @property
    def celeryconfig(self) -> dict[str, str]:
        return {"url": self.url, "host_url": self.url}

    @property
    def settings(self) -> dict[str, Any]:
        """Celery settings that make an app talk to this broker."""
        return {
            "broker_url": self.url,
            "broker_transport_options": self.transport_options,
            "broker_connection_retry_on_startup": True,
            "task_default_queue": self.queue,
        }

    def ready(self) -> bool:
        return True

    def connection(self) -> kombu.Connection:
        return kombu.Connection(self.url, transport_options=self.transport_options)

    def depth(self, queue: str | None = None) -> int:
        """Messages that wait in a queue (the test's own if not named)."""
        with self.connection() as connection, connection.channel() as channel:
            # Virtual transports do not know a queue that is empty.
            passive = connection.transport.driver_type == "amqp"
            declared = channel.queue_declare(queue=queue or self.queue, passive=passive)
            return int(declared.message_count)

    def empty(self, queue: str | None = None) -> int:
        """Lose every waiting message, as an accident would; returns how many."""
        with self.connection() as connection, connection.channel() as channel:
            return int(channel.queue_purge(queue or self.queue) or 0)

    def teardown(self) -> None:
        """Leave nothing of this test behind."""
        with self.connection() as connection, connection.channel() as channel:
            for name in (self.queue, *self.more_queues):
                channel.queue_delete(name)
                channel.exchange_delete(name)


class RedisBroker(LocalBroker):
    def teardown(self) -> None:
        delete_redis_keys(str(self.transport_options["global_keyprefix"]))


class FilesystemBroker(LocalBroker):
    def teardown(self) -> None:
        shutil.rmtree(self.transport_options["data_folder_in"], ignore_errors=True)
        shutil.rmtree(self.transport_options["control_folder"], ignore_errors=True)


class StallingRabbitmq(LocalBroker):
    """This machine's RabbitMQ behind a proxy of this test alone."""

    def __init__(self, vhost: str) -> None:
        self._proxy = Proxy(RABBITMQ.port)
        super().__init__("rabbitmq", rabbitmq(vhost, self._proxy.port).url)
        self.stall, self.go = self._proxy.stall, self._proxy.go

    def teardown(self) -> None:
        self.go()
        super().teardown()
        self._proxy.close()


class BrokerNode(CeleryTestBroker):
    """A broker of this machine; ``settings`` are the Celery settings to reach it."""

    container: LocalBroker

    @property
    def settings(self) -> dict[str, Any]:
        return self.container.settings

    @property
    def queue(self) -> str:
        return self.container.queue

    def depth(self, queue: str | None = None) -> int:
        return self.container.depth(queue)

    def empty(self, queue: str | None = None) -> int:
        return self.container.empty(queue)


def rabbitmq(vhost: str, port: int = RABBITMQ.port) -> LocalBroker:
    path = "/" if vhost == "/" else f"/{vhost}"
    return LocalBroker("rabbitmq", f"amqp://guest:guest@{RABBITMQ.host}:{port}/{path[1:]}")


def redis() -> LocalBroker:
    name = unique_name()
    return RedisBroker(
        "redis",
        f"redis://{REDIS.address}/0",
        queue=name,
        transport_options={"global_keyprefix": f"{name}:"},
    )


def filesystem(directory: Path) -> LocalBroker:
    messages, control = directory / "messages", directory / "control"
    messages.mkdir(parents=True)
    control.mkdir()
    return FilesystemBroker(
        "filesystem",
        "filesystem://",
        transport_options={
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": str(control),
        },
    )


def delete_redis_keys(prefix: str) -> None:
    import redis as redis_client

    with redis_client.Redis(REDIS.host, REDIS.port) as client:
        for key in client.scan_iter(match=f"{prefix}*", count=1000):
            client.delete(key)


def make_vhost() -> str:
    """A virtual host for this run, or ``/`` where ``rabbitmqctl`` cannot be used."""
    name = unique_name()
    made = _rabbitmqctl("add_vhost", name) is not None
    if not made or _rabbitmqctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*") is None:
        return "/"
    for line in (_rabbitmqctl("list_vhosts", "name") or "").splitlines():
        if line.startswith(PREFIX) and is_left_over(line):
            _rabbitmqctl("delete_vhost", line)
    return name


def permit(vhost: str, configure: str) -> None:
    """Say which queues may be made in a virtual host of `make_vhost`, by a regular expression."""
    assert vhost != "/"
    done = _rabbitmqctl("set_permissions", "-p", vhost, "guest", configure, ".*", ".*")
    assert done is not None


def drop_vhost(name: str) -> None:
    if name != "/":
        _rabbitmqctl("delete_vhost", name)


def _rabbitmqctl(*args: str) -> str | None:
    program = shutil.which("rabbitmqctl") or "/usr/sbin/rabbitmqctl"
    command = [program, "--quiet", *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
