"""Brings the schema up to date, safely when many processes start at once."""

from __future__ import annotations

from pathlib import Path

import psycopg

from durable.errors import SchemaTooNew
from durable.store.errors import translated

#: The newest migration that this code knows.
HEAD = "0001"

#: Raised when a migration makes older code unsafe; the migration then writes
#: the least version that may still run into ``schema_info``.
CODE_VERSION = 1

_LOCK = 0x64757261  # "dura": one migration at a time, database-wide

# What the schema holds. Alembic's table is read without Alembic: the check
# runs in every process, the import costs 150 ms.
_STATE = """
SELECT (SELECT max(version_num) FROM durable.alembic_version),
       (SELECT max(min_code_version) FROM durable.schema_info)
"""


def ensure_schema(conn: psycopg.Connection[tuple[object, ...]], url: str, *, auto: bool) -> None:
    """Check the schema and, if it is missing or older than this code, migrate it.

    Code that is merely older than the schema goes on working; code older
    than the schema's ``min_code_version`` is refused.

    Args:
        conn: an autocommit connection to the database.
        url: address of the same database, for the migration itself.
        auto: whether a migration may run here (``durable_auto_migrate``).

    Raises:
        SchemaTooNew: the schema needs newer code.
        MissingRights: the role may not create the schema.
    """
    current = _current_revision(conn)
    if current is None or current < HEAD:
        if not auto:
            state = "is missing" if current is None else f"is at revision {current}"
            raise SchemaTooNew(
                f"the schema 'durable' {state}, this code needs {HEAD}, and"
                " durable_auto_migrate is off: run durable.store.migrate.migrate(url)"
                " with a role that may create tables"
            )
        migrate(url)


def _current_revision(conn: psycopg.Connection[tuple[object, ...]]) -> str | None:
    try:
        row = conn.execute(_STATE).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None
    assert row is not None
    revision, needed = row
    if isinstance(needed, int) and needed > CODE_VERSION:
        raise SchemaTooNew(
            f"the schema 'durable' needs celery-durable code version {needed} or newer, this"
            f" is {CODE_VERSION}: upgrade celery-durable in this process before it starts"
        )
    return None if revision is None else str(revision)


def migrate(url: str) -> None:
    """Apply all missing migrations, in one transaction, under a lock.

    Ten processes that start at once wait for each other; nine of them then
    find nothing to do.
    """
    import sqlalchemy as sa
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    engine = sa.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(url),
        poolclass=sa.pool.NullPool,
    )
    with translated(), engine.begin() as connection:
        connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        connection.execute(sa.text("CREATE SCHEMA IF NOT EXISTS durable"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
