"""A Postgres server for tests, and fresh databases on it."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from durable.store.migrate import migrate
from tests.harness.names import PREFIX, is_left_over, unique_name


def with_database(url: str, database: str) -> str:
    """The same server's URL with another database name."""
    return make_url(url).set(database=database).render_as_string(hide_password=False)


class PostgresServer:
    """One server on which tests make databases and leave none behind.

    Args:
        url: any database of the server, as a role that may create databases.
        prepare: brings a new database to the newest schema.
    """

    def __init__(self, url: str, prepare: Callable[[str], None] = migrate) -> None:
        self.url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._prepare = prepare
        self._template: str | None = None
        self._made: set[str] = set()
        self._sweep()

    def create_database(self, *, migrated: bool = True) -> str:
        """Make a database and return its URL; a migrated one is copied from a template."""
        template = self._migrated_template() if migrated else "template1"
        return self._create(template)

    def drop_database(self, url: str) -> None:
        """Drop it, whoever is still connected."""
        name = make_url(url).database or ""
        self._drop(name)
        self._made.discard(name)

    def execute(self, statement: str, *params: object) -> list[tuple[object, ...]]:
        """Run one statement as administrator, outside any test's database."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            cursor = conn.execute(statement.encode(), params)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        for name in self._made:
            self._drop(name)
        self._made.clear()

    def _migrated_template(self) -> str:
        if self._template is None:
            url = self._create("template1", "template")
            self._prepare(url)
            self._template = make_url(url).database
        assert self._template is not None
        return self._template

    def _create(self, template: str, what: str = "") -> str:
        name = unique_name(what)
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        self._made.add(name)
        return with_database(self.url, name)

    def _drop(self, name: str) -> None:
        statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute(statement)

    def _sweep(self) -> None:
        query = "SELECT datname FROM pg_catalog.pg_database WHERE starts_with(datname, %s)"
        for (name,) in self.execute(query, PREFIX):
            if is_left_over(str(name)):
                self._drop(str(name))
