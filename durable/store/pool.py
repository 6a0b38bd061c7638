"""Runs the store's queries, across forks of this process and restarts of the server."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg
from psycopg.adapt import Loader

from durable import forks
from durable.errors import StoreError
from durable.store.connections import Connection, Connections
from durable.store.errors import is_disconnect, is_hopeless, translated
from durable.store.migrate import ensure_schema

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class _JsonText(Loader):
    """Leaves ``json`` as the text that the codec wrote; parsing is the codec's work."""

    def load(self, data: Any) -> str:
        return str(bytes(data), "utf-8")


class Database:
    """Runs the store's queries, each with a connection of its own for that long.

    Args:
        url: address of the server, asked for at the first connection, so that
            constructing this costs nothing and starts nothing.
        pool_size: most connections that this process opens here.
        connect_timeout: seconds.
        prepare_threshold: how often a statement runs before the server
            prepares it; None: never (PgBouncer).
        auto_migrate: whether the first connection may create the schema.
    """

    def __init__(
        self,
        url: Callable[[], str],
        *,
        pool_size: int = 4,
        connect_timeout: float = 5.0,
        prepare_threshold: int | None = 5,
        auto_migrate: bool = True,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._url = url
        self._pool_size = pool_size
        self._connect_timeout = connect_timeout
        self._prepare_threshold = prepare_threshold
        self._auto_migrate = auto_migrate
        self._sleep = sleep
        self._jitter = jitter
        self._checked = False
        self._connections = self._new_connections()
        forks.call_in_child(self._after_fork)

    @property
    def url(self) -> str:
        """Address of the server, as libpq takes it."""
        return self._url()

    def connect(self, *, autocommit: bool = True) -> Connection:
        """Open a connection outside the pool, for a thread that keeps it.

        The first one of a process checks the schema, and migrates it if need be.

        Raises:
            DatabaseUnavailable: there is no server to talk to.
            SchemaTooNew: the schema needs newer code than this.
            MissingRights: the role may not create the schema.
        """
        with translated():
            conn = psycopg.connect(self.url, autocommit=True, **self._connection_options())
            try:
                _configure(conn)
                if not self._checked:
                    ensure_schema(conn, self.url, auto=self._auto_migrate)
                    self._checked = True
                conn.autocommit = autocommit
            except BaseException:
                conn.close()
                raise
        return conn

    def call(
        self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run ``query(connection, ...)``; once more if the connection turns out dead.

        So every query of the store has to be safe to repeat: one that was
        committed while its answer got lost finds its own work done.

        Raises:
            DatabaseUnavailable: there is no server to talk to.
        """
        try:
            return self._once(query, *args, **kwargs)
        except Exception as exc:  # noqa: BLE001 - sorted out below, off the hot path
            error = exc
        with translated():
            if isinstance(error, StoreError) or not is_disconnect(error):
                raise error
            self.close()
            return self._once(query, *args, **kwargs)

    def patiently(
        self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like `call`, but wait for a server that is away or refuses, for as long as it takes.

        For results of work that has been done: giving up would do it twice. A
        right that was revoked and a full disk are mended like an outage. Only
        what no mending helps is raised: data that Postgres cannot take.
        """
        pause = 0.05
        while True:
            try:
                return self.call(query, *args, **kwargs)
            except StoreError as exc:
                if is_hopeless(exc):
                    raise
                logger.warning("a result waits for Postgres: %s", exc)
                self._sleep(pause * (0.5 + self._jitter()))
                pause = min(pause * 2, 2.0)

    def close(self) -> None:
        """Close this process's connections; the next call opens new ones.

        Also after one of them died: a restart of the server kills every one.
        """
        old, self._connections = self._connections, self._new_connections()
        old.close()

    def _once(
        self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        connections = self._connections
        conn = connections.take()
        try:
            return query(conn, *args, **kwargs)
        finally:
            connections.give_back(conn)

    def _new_connections(self) -> Connections:
        return Connections(self.connect, size=self._pool_size, patience=self._connect_timeout)

    def _after_fork(self) -> None:
        """Forget the parent's connections."""
        forks.keep_inherited(self._connections)
        self._connections = self._new_connections()

    def _connection_options(self) -> dict[str, Any]:
        return {
            "connect_timeout": max(2, round(self._connect_timeout)),
            "prepare_threshold": self._prepare_threshold,
            "application_name": "celery-durable",
            # A server that vanished without a word is noticed in seconds.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        }


def _configure(conn: Connection) -> None:
    conn.adapters.register_loader("json", _JsonText)
