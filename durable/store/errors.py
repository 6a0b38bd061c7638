"""Turns what psycopg raises into errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from durable.errors import DatabaseReadOnly, DatabaseUnavailable, MissingRights, StoreError


def is_disconnect(exc: BaseException) -> bool:
    """Tell whether ``exc`` means that the connection or the server is gone.

    SQLSTATE class 08 (connection), 57P (shutdown), 53 (resources), 25006
    (failed over to a standby) or none at all on an ``OperationalError``,
    which is how libpq reports a socket that broke.

    >>> is_disconnect(psycopg.OperationalError("server closed the connection"))
    True
    >>> is_disconnect(psycopg.errors.UniqueViolation())
    False
    """
    if isinstance(exc, (DatabaseUnavailable, DatabaseReadOnly)):
        return True
    if not isinstance(exc, psycopg.Error):
        return False
    state = exc.sqlstate
    if state is None:
        return isinstance(exc, (psycopg.OperationalError, psycopg.InterfaceError))
    return state[:2] in {"08", "53"} or state[:3] == "57P" or state == "25006"


@contextmanager
def translated(where: str = "") -> Iterator[None]:
    """Raise the package's own errors for what a user or an operator can mend."""
    try:
        yield
    except psycopg.errors.ReadOnlySqlTransaction as exc:
        raise DatabaseReadOnly(
            f"Postgres{where} accepts no writes ({_first_line(exc)}): point"
            " durable_database_url at the primary"
        ) from exc
    except psycopg.errors.InsufficientPrivilege as exc:
        raise MissingRights(
            f"the database role lacks a right{where}: {_first_line(exc)}. It needs USAGE on the"
            " schema 'durable' and SELECT, INSERT, UPDATE, DELETE on its tables; CREATE on the"
            " database only for migrations (or set durable_auto_migrate = False)"
        ) from exc
    except psycopg.Error as exc:
        if is_disconnect(exc):
            raise DatabaseUnavailable(
                f"no connection to Postgres{where}: {_first_line(exc)}. Check that the server"
                " is up and that durable_database_url is right"
            ) from exc
        raise StoreError(f"Postgres refused a statement{where}: {_first_line(exc)}") from exc
    except Exception as exc:
        cause = getattr(exc, "orig", None)  # SQLAlchemy wraps what psycopg raised
        if isinstance(cause, psycopg.Error):
            with translated(where):
                raise cause from exc
        raise


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__


def is_hopeless(exc: BaseException) -> bool:
    """Tell whether the same statement would be refused for ever: SQLSTATE class 22, bad data.

    >>> is_hopeless(psycopg.errors.UntranslatableCharacter())
    True
    >>> is_hopeless(psycopg.errors.InsufficientPrivilege())
    False
    """
    cause = exc if isinstance(exc, psycopg.Error) else exc.__cause__
    return isinstance(cause, psycopg.Error) and (cause.sqlstate or "").startswith("22")
