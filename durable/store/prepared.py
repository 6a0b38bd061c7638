"""Statements of the hot path, run by libpq itself."""

from __future__ import annotations

import time
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

from psycopg import pq
from psycopg.errors import error_from_result

if TYPE_CHECKING:
    from durable.store.pool import Connection


class PreparedWrite:
    """A data-changing statement that is prepared once a connection, with text parameters.

    psycopg's own path adapts parameters and runs through generators that
    cooperate with event loops. A step needs neither, and without them costs
    about a fifth less. Where blocking would be wrong (gevent, eventlet) or
    preparing is switched off (PgBouncer), it is psycopg's path after all.

    Args:
        name: of the prepared statement.
        text: SQL with ``%s`` for each parameter.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name = name.encode()
        self._text = text
        parts = text.split("%s")
        numbered = (f"{part}${number}" for number, part in enumerate(parts[:-1], 1))
        self._numbered = ("".join(numbered) + parts[-1]).encode()

    def __call__(self, conn: Connection, params: tuple[object, ...]) -> int:
        """Run it, in a transaction of its own; the number of rows that it changed."""
        if conn.prepare_threshold is None or not _may_block():
            return conn.execute(self._text, params).rowcount
        prepared = conn.__dict__.setdefault("durable_prepared", set())
        pgconn = conn.pgconn
        if self._name not in prepared:
            _checked(pgconn.prepare(self._name, self._numbered), conn)
            prepared.add(self._name)
        values = [None if value is None else str(value).encode() for value in params]
        return _checked(pgconn.exec_prepared(self._name, values), conn).command_tuples or 0


def _checked(result: Any, conn: Connection) -> Any:
    if result.status == pq.ExecStatus.COMMAND_OK:
        return result
    raise error_from_result(result, encoding=conn.info.encoding)


def _may_block() -> bool:
    """Tell whether this thread is one: gevent and eventlet replace the builtin ``sleep``."""
    return isinstance(time.sleep, BuiltinFunctionType)
