"""Brings the schema up to date, safely when many processes start at once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from durable.errors import SchemaTooNew, SchemaTooOld
from durable.store.errors import translated

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

#: The newest migration that this code knows.
HEAD = "0006"

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
        SchemaTooOld: it is missing or older, and ``auto`` is off.
        MissingRights: the role may not create the schema.
    """
    current = _current_revision(conn)
    if current is None or current < HEAD:
        if not auto:
            state = "is missing" if current is None else f"is at revision {current}"
            raise SchemaTooOld(
                f"the schema 'durable' {state}, this code needs {HEAD}, and"
                " durable_auto_migrate is off: run `celery -A <your app> durable migrate`"
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


def _create_schema(connection: Connection) -> None:
    """Make the schema, or refuse one that this code cannot migrate.

    ``IF NOT EXISTS`` would ask for a right on the database even where the
    schema exists, and the role owns it.
    """
    if connection.exec_driver_sql("SELECT to_regnamespace('durable')").scalar() is None:
        connection.exec_driver_sql("CREATE SCHEMA durable")
        return
    if connection.exec_driver_sql("SELECT to_regclass('durable.alembic_version')").scalar():
        query = "SELECT max(version_num) FROM durable.alembic_version"
        current = connection.exec_driver_sql(query).scalar()
        if current is not None and current > HEAD:
            raise SchemaTooNew(
                f"the schema 'durable' is at revision {current}, newer than this code's {HEAD}:"
                " there is nothing to migrate. Run migrations with the newest celery-durable that"
                " you deploy"
            )


def migrate(url: str) -> None:
    """Apply all missing migrations, in one transaction, under a lock.

    Ten processes that start at once wait for each other; nine of them then
    find nothing to do.

    Raises:
        SchemaTooNew: a newer version of the package has migrated already.
        MissingRights: the role may not create the schema or its tables.
    """
    import sqlalchemy as sa
    from alembic import command

    config = _alembic_config()
    engine = sa.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(url),
        poolclass=sa.pool.NullPool,
    )
    with translated(), engine.begin() as connection:
        connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        _create_schema(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def migration_sql() -> str:
    """Return all migrations as one SQL script, for a database administrator to read and run."""
    from alembic import command

    script = io.StringIO()
    config = _alembic_config(output_buffer=script)
    command.upgrade(config, "head", sql=True)
    return f"CREATE SCHEMA IF NOT EXISTS durable;\n\n{script.getvalue()}"


def role_sql(role: str) -> str:
    """Return the least rights that workers and clients need, as SQL for an existing role.

    Example:
        >>> print(role_sql("shop"))  # doctest: +ELLIPSIS
        GRANT USAGE ON SCHEMA durable TO "shop";
        ...
    """
    quoted = '"' + role.replace('"', '""') + '"'
    return f"""\
GRANT USAGE ON SCHEMA durable TO {quoted};
GRANT SELECT, INSERT, UPDATE, DELETE
   ON durable.workflow_runs, durable.step_attempts, durable.workflow_events, durable.fan_outs,
      durable.circuit_breakers, durable.run_actions, durable.idempotency_keys, durable.outbox,
      durable.workers TO {quoted};
GRANT SELECT ON durable.schema_info, durable.alembic_version TO {quoted};
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA durable TO {quoted};
"""


def _alembic_config(**options: Any) -> Config:
    from alembic.config import Config

    config = Config(**options)
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
