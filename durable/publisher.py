"""Sends messages to the broker, and waits for it only so long."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery.utils.log import get_logger
from kombu.connection import ConnectionPool
from kombu.exceptions import LimitExceeded, OperationalError
from kombu.pools import ProducerPool

from durable import forks

if TYPE_CHECKING:
    from celery import Celery

logger = get_logger(__name__)


class _Connections(ConnectionPool):
    """Not closed in a forked child: closing shuts the parent's sockets down."""

    close_after_fork = False


class _Producers(ProducerPool):
    close_after_fork = False


class Publisher:
    """Connections of its own to the app's broker, on which nothing waits for long.

    Celery's own would wait without end for a broker that has accepted the
    connection and does not answer. Its retry policy is no help: it counts
    errors, and a stalled broker makes none. So each wait on the socket is
    limited, which costs the healthy path nothing.

    Args:
        app: whose broker.
        timeout: gives the seconds that `publish` may take.
    """

    def __init__(
        self,
        app: Celery,
        timeout: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._timeout = timeout
        self._monotonic = monotonic
        self._pool: ProducerPool | None = None
        forks.call_in_child(self._after_fork)

    @cached_property
    def driver(self) -> str:
        """The broker's kind: ``amqp``, ``redis`` and so on."""
        with self._app.connection_for_write() as connection:  # not connected by this
            return str(connection.transport.driver_type)

    def publish(self, send: Callable[[Any], object], *, retry: bool = True) -> None:
        """Call ``send(producer)``; once more if it fails at once, on a connection made anew.

        That is what a broker which was restarted since the last message looks
        like. A failure that took long is a broker that does not answer; it
        would not answer the second time either.

        Raises:
            OperationalError: the broker did not take it.
        """
        patience = self._timeout() / 2  # two tries, the first of which was short
        started = self._monotonic()
        try:
            self._once(send, patience)
        except OperationalError:
            if not retry or self._monotonic() - started > patience:
                raise
            self._once(send, patience)

    def close(self) -> None:
        """Close this process's connections; the next message opens a new one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.connections.force_close_all()

    def _once(self, send: Callable[[Any], object], patience: float) -> None:
        if self._pool is None:
            self._pool = self._open(patience)
        try:
            producer = self._pool.acquire(block=True, timeout=patience)
        except LimitExceeded as exc:
            raise OperationalError("all broker connections (broker_pool_limit) are in use") from exc
        with producer:
            try:
                with producer.connection._reraise_as_library_errors():  # noqa: SLF001 - as Celery
                    send(producer)
            except Exception:
                _disconnect(producer.connection)
                raise

    def _open(self, patience: float) -> ProducerPool:
        app = self._app
        connection = app.connection_for_write(connect_timeout=patience)
        driver = connection.transport.driver_type
        connection.transport_options.update(_limits(driver, patience))
        limit = app.conf.broker_pool_limit
        connections = _Connections(connection, limit=limit)
        return _Producers(connections, limit=limit, Producer=app.amqp.Producer)

    def _after_fork(self) -> None:
        forks.keep_inherited(self._pool)
        self._pool = None


def _limits(driver: str, seconds: float) -> dict[str, object]:
    """Transport options that limit each wait on a socket; other transports have no sockets."""
    once: dict[str, object] = {
        "max_retries": 0,
        "interval_start": 0,
        "connect_retries_timeout": seconds,
    }
    if driver == "redis":
        return {
            **once,
            "socket_timeout": seconds,
            "socket_connect_timeout": seconds,
            "retry_on_timeout": False,
        }
    if driver == "amqp":
        return {**once, "read_timeout": seconds, "write_timeout": seconds}
    return once


def _disconnect(connection: Any) -> None:
    """Drop a connection whose state nobody knows; try the next broker of the URL next time."""
    try:
        connection.maybe_switch_next()
        connection.collect()
    except Exception:  # it is gone already
        logger.debug("dropping a broken broker connection", exc_info=True)
