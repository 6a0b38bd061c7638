"""Transactions of the caller's: ours to write in, not to begin, commit or roll back.

`borrow` makes of what the caller has (a SQLAlchemy session or connection, a
psycopg connection, Django's connection) something on which the queries of the
store run as on a connection of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from durable.errors import MissingRights, OptionError

_ACCEPTED = (
    "a SQLAlchemy Session or Connection (drivers psycopg and psycopg2), a psycopg connection, or"
    " Django's connection"
)
_DRIVERS = frozenset({"psycopg", "psycopg_async", "psycopg2"})
_NO_RIGHT = "42501"

Run = Callable[[str, Mapping[str, Any]], "Rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a statement gave, whichever driver ran it."""

    rows: Sequence[Any]
    rowcount: int

    def fetchone(self) -> Any:
        """Return the first row."""
        return self.rows[0] if self.rows else None

    def fetchall(self) -> list[Any]:
        """Return all rows."""
        return list(self.rows)


class Borrowed:
    """A caller's transaction, with as much of a connection's interface as starting runs needs.

    Attributes:
        what: what it is, for errors.
        prepare_threshold: nothing is prepared on a connection that is not ours.
    """

    prepare_threshold = None

    def __init__(self, what: str, run: Run) -> None:
        self.what = what
        self._run = run

    def execute(self, statement: str, params: Mapping[str, Any] | None = None) -> Rows:
        """Run a statement in the transaction.

        Raises:
            MissingRights: the caller's role may not use the schema ``durable``.
            Exception: what the driver raises: a serialization failure, say, is
                the caller's to repeat.
        """
        try:
            return self._run(statement, params or {})
        except Exception as exc:
            if _sqlstate(exc) != _NO_RIGHT:
                raise
            raise MissingRights(
                f"the role of transaction= ({self.what}) lacks a right: {_first_line(exc)}. Give it"
                " what `celery -A <your app> durable migrate --role <role>` prints"
            ) from exc


# Two servers that started in the same microsecond and have databases of the
# same name and number are one.
_IDENTITY = """
SELECT d.datname::text, d.oid::text,
       (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint::text,
       to_regclass('durable.outbox') IS NOT NULL
  FROM pg_database d WHERE d.datname = current_database()
"""

Identity = tuple[str, str, str]


def identity(conn: Any) -> tuple[Identity, bool]:
    """Return what tells this database from all others, and whether it has our schema."""
    *which, ours = conn.execute(_IDENTITY).fetchone()
    return (which[0], which[1], which[2]), bool(ours)


def borrow(transaction: object) -> Borrowed:
    """Make a caller's transaction usable.

    Raises:
        OptionError: it is none of those that can be, or not in a state to be written in.
    """
    for make in (_psycopg, _django, _psycopg2, _sqlalchemy):
        found = make(transaction)
        if found is not None:
            return found
    raise OptionError(f"transaction={_shown(transaction)}: give {_ACCEPTED}")


# --- psycopg


def _psycopg(given: Any) -> Borrowed | None:
    if isinstance(given, psycopg.AsyncConnection):
        raise OptionError(
            f"transaction={_shown(given)} is asynchronous: give a psycopg.Connection, or use a"
            " SQLAlchemy AsyncSession: `await session.run_sync(lambda s: task.apply_async(args,"
            " transaction=s))`"
        )
    if isinstance(given, (psycopg.Cursor, psycopg.ServerCursor)):
        raise OptionError(f"transaction={_shown(given)} is a cursor: give its connection")
    if not isinstance(given, psycopg.Connection):
        return None
    _check_state(given, "with connection.transaction():")

    def run(statement: str, params: Mapping[str, Any]) -> Rows:
        with given.cursor(row_factory=tuple_row) as cursor:
            return _rows(cursor, statement, params)

    return Borrowed("a psycopg connection", run)


def _psycopg2(given: Any) -> Borrowed | None:
    module: Any = sys.modules.get("psycopg2.extensions")
    if module is None or not isinstance(given, module.connection):
        return None
    _check_state(given, "autocommit = False")

    def run(statement: str, params: Mapping[str, Any]) -> Rows:
        with given.cursor(cursor_factory=module.cursor) as cursor:
            return _rows(cursor, statement, params)

    return Borrowed("a psycopg2 connection", run)


# --- Django


def _django(given: Any) -> Borrowed | None:
    if not hasattr(given, "in_atomic_block") or not hasattr(given, "vendor"):
        return None
    if given.vendor != "postgresql":
        raise OptionError(
            f"transaction=: Django's connection {given.alias!r} is to {given.vendor}, and runs are"
            " kept in Postgres: they cannot be one commit"
        )
    if given.in_atomic_block and given.needs_rollback:
        raise OptionError(
            "transaction=: Django has marked this transaction to be rolled back, after an error"
            " inside it: nothing can be started in it any more"
        )
    if not given.in_atomic_block and given.get_autocommit():
        raise OptionError(
            "transaction=: Django's connection is not in a transaction, it commits each statement"
            " at once: use `with transaction.atomic():` around it"
        )

    def run(statement: str, params: Mapping[str, Any]) -> Rows:
        with given.cursor() as cursor:
            return _rows(cursor, statement, params)

    return Borrowed(f"Django's connection {given.alias!r}", run)


# --- SQLAlchemy


def _sqlalchemy(given: Any) -> Borrowed | None:
    if "sqlalchemy" not in sys.modules:
        return None
    from sqlalchemy import Connection, Engine
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.orm import Session, scoped_session

    _refuse_async_sqlalchemy(given)
    if isinstance(given, scoped_session):
        given = given()
    if isinstance(given, Engine):
        raise OptionError(f"transaction={_shown(given)} is an engine: give a Session or Connection")
    if not isinstance(given, (Session, Connection)):
        return None
    try:
        with _rethrown_as_option_error(SQLAlchemyError):
            connection = given.connection() if isinstance(given, Session) else given
            _check_sqlalchemy(connection)
    except AttributeError as exc:  # SQLAlchemy's own word for some closed ones
        raise OptionError(f"transaction={_shown(given)} cannot be used: {exc}") from exc

    def run(statement: str, params: Mapping[str, Any]) -> Rows:
        result = connection.exec_driver_sql(statement, dict(params))
        if not result.returns_rows:
            return Rows((), result.rowcount)
        rows = [tuple(row) for row in result.fetchall()]
        return Rows(rows, len(rows))

    return Borrowed(f"a SQLAlchemy {type(given).__name__}", run)


def _refuse_async_sqlalchemy(given: Any) -> None:
    module: Any = sys.modules.get("sqlalchemy.ext.asyncio")
    if module is None:
        return
    kinds = (module.AsyncSession, module.AsyncConnection, module.async_scoped_session)
    if isinstance(given, kinds):
        raise OptionError(
            f"transaction={_shown(given)} is asynchronous: use `await session.run_sync(lambda s:"
            " task.apply_async(args, transaction=s))`, with the driver psycopg"
        )


def _check_sqlalchemy(connection: Any) -> None:
    dialect = connection.dialect
    if dialect.name != "postgresql" or dialect.driver not in _DRIVERS:
        raise OptionError(
            f"transaction=: its driver is {dialect.name}+{dialect.driver}, and a run can be started"
            " by postgresql+psycopg and postgresql+psycopg2 only. Use one of them, or start the run"
            " after the commit"
        )
    if connection.closed:
        raise OptionError("transaction=: the SQLAlchemy connection is closed")
    _check_state(connection.connection.driver_connection, "another isolation level than AUTOCOMMIT")


@contextmanager
def _rethrown_as_option_error(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as exc:
        raise OptionError(
            f"transaction= cannot be used: {_first_line(exc)}. Roll back, or open a new one"
        ) from exc


# --- of all


def _check_state(raw: Any, instead: str) -> None:
    """Refuse a connection of a driver that is closed, aborted, or commits each statement."""
    status = TransactionStatus.UNKNOWN if raw.closed else raw.info.transaction_status
    if status == TransactionStatus.UNKNOWN:
        raise OptionError("transaction=: its connection to Postgres is closed")
    if status == TransactionStatus.INERROR:
        raise OptionError(
            "transaction=: an error has aborted it, and nothing can be started in it any more: roll"
            " it back first"
        )
    if raw.autocommit and status == TransactionStatus.IDLE:
        raise OptionError(
            "transaction=: no transaction is open, its connection commits each statement at once:"
            f" use `{instead}`, or leave transaction= out"
        )


def _rows(cursor: Any, statement: str, params: Mapping[str, Any]) -> Rows:
    cursor.execute(statement, params)
    rows = cursor.fetchall() if cursor.description else ()
    return Rows(rows, cursor.rowcount)


def _sqlstate(exc: BaseException) -> str | None:
    """Find the SQLSTATE, also under what SQLAlchemy and Django wrap around it."""
    for each in (exc, getattr(exc, "orig", None), exc.__cause__):
        state: str | None = getattr(each, "sqlstate", None) or getattr(each, "pgcode", None)
        if state:
            return state
    return None


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


def _shown(given: object) -> str:
    shown = type(given)
    return f"<{shown.__module__}.{shown.__qualname__}>"
