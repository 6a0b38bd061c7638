"""The libraries through which a process acts on the world, each call wrapped.

Remote control, monitoring events and what a client only reads from a result
backend are no crash points: nothing that lasts depends on them.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any

import psycopg
from amqp.exceptions import RecoverableConnectionError
from celery import Celery
from celery.backends.base import DisabledBackend
from kombu.message import Message
from kombu.messaging import Producer
from psycopg.sql import Composable

from durable.testing.crashes import Injector

_LOST = "the connection broke (durable.testing.crashes)"
_WORDS = 3

#: What of a backend's interface writes.
_BACKEND_WRITES = (
    "store_result",
    "on_chord_part_return",
    "set_chord_size",
    "apply_chord",
    "add_to_chord",
    "save_group",
)


def wrap_all(injector: Injector) -> None:
    """Wrap everything in this process."""
    _wrap_statements(injector)
    _wrap_transactions(injector)
    _wrap_pipelines(injector)
    _wrap_libpq(injector)
    _wrap_publish(injector)
    _wrap_acknowledgement(injector)
    _wrap_backends(injector)


# --- Postgres


def _wrap_statements(injector: Injector) -> None:
    for name in ("execute", "executemany"):
        _patch(psycopg.Cursor, name, functools.partial(_statement, injector))


def _statement(
    injector: Injector, original: Callable[..., Any], cursor: Any, query: Any, *args: Any, **kw: Any
) -> Any:
    params = args[0] if args else kw.get("params")
    return injector.around(
        f"sql {_statement_name(query)}",
        _flattened(params),
        lambda: original(cursor, query, *args, **kw),
        found=lambda _: _first_column(cursor),
        lose=lambda: _broken(cursor.connection),
    )


def _wrap_transactions(injector: Injector) -> None:
    """BEGIN, COMMIT and the like, which psycopg sends by itself."""

    def exec_command(
        original: Callable[..., Any], conn: Any, command: Any, *args: Any, **kwargs: Any
    ) -> Generator[Any, Any, Any]:
        name = f"sql {_statement_name(command)}"
        injector.reach(name, "before", ())
        if injector.reach(name, "refused", ()):
            raise _broken(conn)
        result = yield from original(conn, command, *args, **kwargs)
        injector.reach(name, "after", ())
        if injector.reach(name, "lost", ()):
            raise _broken(conn)
        return result

    _patch(psycopg.Connection, "_exec_command", exec_command)


def _wrap_pipelines(injector: Injector) -> None:
    """The end of a pipeline commits what was sent in it."""

    def leave(original: Callable[..., Any], pipeline: Any, *exc_info: Any) -> Any:
        return injector.around(
            "sql end of pipeline",
            (),
            lambda: original(pipeline, *exc_info),
            lose=lambda: _broken(pipeline._conn),  # noqa: SLF001
        )

    _patch(psycopg.Pipeline, "__exit__", leave)


class _Libpq:
    """A connection's libpq, for code that goes past psycopg's cursors."""

    _BLOCKING = frozenset({"exec_", "exec_params", "exec_prepared", "prepare"})

    def __init__(self, injector: Injector, conn: Any, pgconn: Any) -> None:
        self._injector = injector
        self._conn = conn
        self._pgconn = pgconn

    def __getattr__(self, name: str) -> Any:
        original = getattr(self._pgconn, name)
        if name not in self._BLOCKING:
            return original

        def call(command: bytes, *args: Any, **kwargs: Any) -> Any:
            return self._injector.around(
                f"sql {name} {_statement_name(command)}",
                [bytes(value).decode() for value in _flattened(args) if isinstance(value, bytes)],
                lambda: original(command, *args, **kwargs),
                lose=lambda: _broken(self._conn),
            )

        return call


def _wrap_libpq(injector: Injector) -> None:
    """Libpq's own class is closed, so what a connection shows of it is wrapped: not to psycopg."""

    def get(conn: Any) -> Any:
        pgconn = conn.__dict__["pgconn"]
        caller = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001
        return pgconn if caller.startswith("psycopg") else _Libpq(injector, conn, pgconn)

    def put(conn: Any, pgconn: Any) -> None:
        conn.__dict__["pgconn"] = pgconn

    psycopg.Connection.pgconn = property(get, put)  # type: ignore[assignment]


def _broken(conn: Any) -> Exception:
    conn.close()
    return psycopg.OperationalError(_LOST)


_names: dict[str, str] = {}


def _statement_name(query: Any) -> str:
    """Name a statement after the constant that holds it, else by its first words."""
    if isinstance(query, Composable):
        query = query.as_string(None)
    text = query.decode(errors="replace") if isinstance(query, bytes) else str(query)
    if text not in _names:
        _names.update(_named_statements())
        _names.setdefault(text, " ".join(re.findall(r"[^\s|()\"]+", text)[:_WORDS]))
    return _names[text]


def _named_statements() -> dict[str, str]:
    found = {}
    for path, module in list(sys.modules.items()):
        if path.startswith("durable."):
            for name, value in list(vars(module).items()):
                if isinstance(value, str) and name.isupper() and " " in value:
                    found[value] = f"{path.rpartition('.')[2]}.{name}"
    return found


def _first_column(cursor: Any) -> Iterable[str]:
    """Peek at what a statement returned: ids of runs stand in the first column."""
    result = cursor.pgresult
    if result is None or not result.nfields:
        return
    for row in range(result.ntuples):
        yield (result.get_value(row, 0) or b"").decode(errors="replace")


def _flattened(values: Any) -> Iterable[object]:
    if isinstance(values, dict):
        values = values.values()
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        return
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


# --- broker


def _wrap_publish(injector: Injector) -> None:
    def publish(
        original: Callable[..., Any],
        producer: Any,
        body: Any,
        priority: Any,
        content_type: Any,
        content_encoding: Any,
        headers: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        def perform() -> Any:
            return original(
                producer, body, priority, content_type, content_encoding, headers, *args, **kwargs
            )

        if not (headers and "task" in headers):
            return perform()
        return injector.around(
            f"publish {headers['task']}", [headers["id"]], perform, lose=_broker_lost
        )

    _patch(Producer, "_publish", publish)


def _wrap_acknowledgement(injector: Injector) -> None:
    for name in ("ack", "reject", "requeue"):

        def settle(
            original: Callable[..., Any], message: Any, *args: Any, _name: str = name, **kwargs: Any
        ) -> Any:
            def perform() -> Any:
                return original(message, *args, **kwargs)

            headers = message.headers or {}
            if "task" not in headers:
                return perform()
            return injector.around(
                f"{_name} {headers['task']}", [headers["id"]], perform, lose=_broker_lost
            )

        _patch(Message, name, settle)


def _broker_lost() -> Exception:
    # Every transport of kombu's takes it for a connection to be made anew.
    error: Exception = RecoverableConnectionError(_LOST)
    return error


# --- result backend


def _wrap_backends(injector: Injector) -> None:
    """Backends are found when an app makes its own."""

    def get_backend(original: Callable[..., Any], app: Any) -> Any:
        backend = original(app)
        if not isinstance(backend, DisabledBackend):
            _wrap_backend(type(backend), injector)
        return backend

    _patch(Celery, "_get_backend", get_backend)


def _wrap_backend(backend: type, injector: Injector) -> None:
    for name in _BACKEND_WRITES:
        owner = next((cls for cls in backend.__mro__ if name in vars(cls)), None)
        if owner is not None and not hasattr(vars(owner)[name], "__wrapped__"):
            _patch(owner, name, functools.partial(_backend_write, injector, name))


def _backend_write(
    injector: Injector, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    state = f" {args[3]}" if name == "store_result" else ""
    ids = [getattr(value, "id", value) for value in args[1:]]
    return injector.around(
        f"backend {name}{state}", ids, lambda: original(*args, **kwargs), lose=_backend_lost
    )


def _backend_lost() -> Exception:
    return ConnectionResetError(_LOST)


def _patch(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)
