"""The connections of one process: lent for a statement at a time, opened when needed."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from durable.errors import DatabaseUnavailable

Connection = psycopg.Connection[Any]


class Connections:
    """A stack of connections, at most ``size`` of them; the last one used is used first.

    psycopg's pool does more, with threads of its own, and lending takes it a
    tenth of what a step costs in all. Here it is two operations on objects
    that C makes atomic, and a server that is away is told by the error itself.

    Args:
        connect: opens a connection.
        size: most connections.
        patience: seconds to wait while all are in use.
    """

    def __init__(self, connect: Callable[[], Connection], *, size: int, patience: float) -> None:
        self._connect = connect
        self._size = size
        self._patience = patience
        self._idle: deque[Connection] = deque()
        self._closed = False
        # One token a connection; who holds it may take or open one.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(size):
            self._tokens.put(None)

    def take(self) -> Connection:
        """Borrow a connection; give it back.

        Raises:
            DatabaseUnavailable: all are in use for longer than ``patience``.
            psycopg.Error: a new one could not be opened.
        """
        try:
            self._tokens.get(True, self._patience)
        except queue.Empty:
            raise DatabaseUnavailable(
                f"all {self._size} connections of this process (durable_pool_size) were in use for"
                f" {self._patience:g} s"
            ) from None
        try:
            return self._idle.pop()
        except IndexError:
            pass
        try:
            return self._connect()
        except BaseException:
            self._tokens.put(None)
            raise

    def give_back(self, conn: Connection) -> None:
        """Return a borrowed connection. One that broke, or is in a transaction, is closed."""
        if self._closed or conn.pgconn.transaction_status != TransactionStatus.IDLE:
            conn.close()
        else:
            self._idle.append(conn)
        self._tokens.put(None)

    def close(self) -> None:
        """Close the idle ones now, and those in use when they are given back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
