"""Transactions as users have them, one of each kind, on one database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import dict_row
from sqlalchemy import NullPool, create_engine, make_url
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.harness import services


@dataclass(frozen=True)
class Open:
    """An open transaction of a user's.

    Attributes:
        given: what goes into ``transaction=``.
    """

    given: Any
    commit: Callable[[], object]
    rollback: Callable[[], object]


def engine(url: str, driver: str, **options: Any) -> Any:
    return create_engine(make_url(url).set(drivername=driver), poolclass=NullPool, **options)


@contextmanager
def session(url: str, driver: str) -> Iterator[Open]:
    with Session(engine(url, driver)) as made:
        yield Open(made, made.commit, made.rollback)


@contextmanager
def scoped(url: str) -> Iterator[Open]:
    made = scoped_session(sessionmaker(engine(url, "postgresql+psycopg")))
    try:
        yield Open(made, made.commit, made.rollback)
    finally:
        made.remove()


@contextmanager
def connection(url: str, driver: str) -> Iterator[Open]:
    with engine(url, driver).connect() as made:
        yield Open(made, made.commit, made.rollback)


@contextmanager
def raw(url: str) -> Iterator[Open]:
    with psycopg.connect(url, row_factory=dict_row) as made:  # rows of the user's own form
        yield Open(made, made.commit, made.rollback)


@contextmanager
def raw_block(url: str) -> Iterator[Open]:
    with psycopg.connect(url, autocommit=True) as made:
        made.execute("BEGIN")
        yield Open(made, lambda: made.execute("COMMIT"), lambda: made.execute("ROLLBACK"))


@contextmanager
def raw_psycopg2(url: str) -> Iterator[Open]:
    import psycopg2
    from psycopg2.extras import RealDictCursor

    made = psycopg2.connect(url, cursor_factory=RealDictCursor)
    try:
        yield Open(made, made.commit, made.rollback)
    finally:
        made.close()


@contextmanager
def django(url: str, **options: Any) -> Iterator[Open]:
    """Django's connection, in a transaction that ``set_autocommit(False)`` has begun."""
    services.require_module("django")
    from django import setup
    from django.conf import settings

    if not settings.configured:
        settings.configure(USE_TZ=True)
        setup()
    from django.db.backends.postgresql.base import DatabaseWrapper

    parts = make_url(url)
    configured = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.database,
        "USER": parts.username or "",
        "PASSWORD": parts.password or "",
        "HOST": parts.host or parts.query.get("host", ""),
        "PORT": parts.port or "",
        "OPTIONS": options,
        "TIME_ZONE": None,
        "CONN_HEALTH_CHECKS": False,
        "CONN_MAX_AGE": 0,
        "AUTOCOMMIT": True,
        "ATOMIC_REQUESTS": False,
        "TEST": {},
    }
    made = DatabaseWrapper(configured, alias="default")
    made.set_autocommit(False)
    try:
        yield Open(made, made.commit, made.rollback)
    finally:
        made.close()


KINDS: dict[str, Callable[[str], Any]] = {
    "session": lambda url: session(url, "postgresql+psycopg"),
    "session of psycopg2": lambda url: session(url, "postgresql+psycopg2"),
    "scoped session": scoped,
    "connection": lambda url: connection(url, "postgresql+psycopg"),
    "connection of psycopg2": lambda url: connection(url, "postgresql+psycopg2"),
    "psycopg": raw,
    "psycopg, autocommit": raw_block,
    "psycopg2": raw_psycopg2,
    "django": django,
    "django, binding on the server": lambda url: django(url, server_side_binding=True),
}
