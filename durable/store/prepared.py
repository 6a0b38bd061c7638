"""Statements of the hot path, run by libpq itself."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

from psycopg import OperationalError, pq
from psycopg.errors import InvalidSqlStatementName, error_from_result

if TYPE_CHECKING:
    from durable.store.connections import Connection

Row = tuple[str | None, ...]

_PARAMETER = re.compile(r"%\((\w+)\)s")


class Prepared:
    """A statement that is prepared once a connection, with text in and text out.

    psycopg's own path adapts parameters and results and runs through
    generators that cooperate with event loops. The few statements that every
    run and step needs can do without, and cost about a fifth less. Where
    blocking would be wrong (gevent, eventlet) or preparing is switched off
    (PgBouncer), psycopg's path is taken after all.

    Args:
        name: of the prepared statement.
        text: SQL with ``%(name)s`` for each parameter; what it returns is cast to text.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name = name.encode()
        self._text = text
        self._params = list(dict.fromkeys(_PARAMETER.findall(text)))
        numbered = _PARAMETER.sub(lambda found: f"${self._params.index(found[1]) + 1}", text)
        self._numbered = numbered.encode()

    def changed(self, conn: Connection, params: Mapping[str, object]) -> int:
        """Run it, in a transaction of its own; the number of rows that it changed."""
        if not _may_block(conn):
            return conn.execute(self._text, params).rowcount
        return self._run(conn, params).command_tuples or 0

    def row(self, conn: Connection, params: Mapping[str, object]) -> Row | None:
        """Run it, in a transaction of its own; its first row, as text."""
        if not _may_block(conn):
            found: Row | None = conn.execute(self._text, params).fetchone()
            return found
        result = self._run(conn, params)
        if not result.ntuples:
            return None
        values = (result.get_value(0, column) for column in range(result.nfields))
        return tuple(None if value is None else str(value, "utf-8") for value in values)

    def _run(self, conn: Connection, params: Mapping[str, object]) -> Any:
        prepared: set[bytes] = conn.__dict__.setdefault("durable_prepared", set())
        pgconn = conn.pgconn
        if self._name not in prepared:
            _check(pgconn.prepare(self._name, self._numbered), conn)
            prepared.add(self._name)
        given = [params[name] for name in self._params]
        values: Any = [None if value is None else str(value).encode() for value in given]
        try:
            return _check(pgconn.exec_prepared(self._name, values), conn)
        except InvalidSqlStatementName:
            # psycopg follows a ROLLBACK with DEALLOCATE ALL, once it has prepared
            # something itself. Nothing was executed, so it may be done again.
            prepared.clear()
            _check(pgconn.prepare(self._name, self._numbered), conn)
            prepared.add(self._name)
            return _check(pgconn.exec_prepared(self._name, values), conn)


def _check(result: Any, conn: Connection) -> Any:
    if result.status in {pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK}:
        return result
    error = error_from_result(result, encoding=conn.info.encoding)
    if error.sqlstate is None:  # not from the server: the connection broke
        raise OperationalError(str(error))
    raise error


def _may_block(conn: Connection) -> bool:
    """Tell whether this thread is one: gevent and eventlet replace the builtin ``sleep``."""
    return conn.prepare_threshold is not None and isinstance(time.sleep, BuiltinFunctionType)
