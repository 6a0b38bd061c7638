"""The schema: made once, the same for everybody, and fit for old and new code at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg import sql

from durable.errors import MissingRights, SchemaTooNew, SchemaTooOld
from durable.store import dispatch, queries, runs, steps, workers
from durable.store.migrate import CODE_VERSION, HEAD, migrate
from durable.store.schema import metadata
from tests.harness.names import unique_name
from tests.harness.postgres import PostgresServer, with_database
from tests.harness.store import RECOVERY, Store, open_database, step_of

ROOT = Path(__file__).parents[2]

#: Forks when the imports are done, so that all children get to the lock at once.
START_TEN = """
import os, sys
import alembic.command, alembic.config, sqlalchemy
from durable.store import queries
from durable.store.pool import Database

read, write = os.pipe()
children = []
for _ in range(10):
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)
        Database(lambda: sys.argv[1]).call(queries.known, [], "default")
        sys.exit()
    children.append(child)
os.close(write)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def first_use(url: str, **options: bool) -> None:
    with open_database(url, **options) as database:
        database.call(queries.known, [], "default")


def engine(url: str) -> sa.Engine:
    return sa.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=sa.NullPool
    )


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(statement.encode())


def test_ten_processes_that_start_at_once_make_one_schema(empty_database_url: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", START_TEN, empty_database_url]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with psycopg.connect(empty_database_url) as conn:
        assert conn.execute("SELECT version_num FROM durable.alembic_version").fetchall() == [
            (HEAD,)
        ]


def test_the_migrated_schema_is_what_the_metadata_says(database_url: str) -> None:
    with engine(database_url).connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "include_schemas": True,
                "version_table_schema": "durable",
                "include_name": lambda name, kind, _: kind != "schema" or name == "durable",
            },
        )
        assert compare_metadata(context, metadata) == []


def test_a_second_migration_finds_nothing_to_do(database_url: str) -> None:
    with open_database(database_url) as database, database.connect() as conn:
        run_id = Store(conn).start()
        migrate(database_url)
        assert Store(conn).status(run_id) == "pending"


def test_deleting_runs_deletes_their_steps(database_url: str) -> None:
    with open_database(database_url) as database, database.connect() as conn:
        store = Store(conn)
        doomed, kept = store.running(), store.running()
        for claim in (doomed, kept):
            steps.record(conn, step_of(claim))
        conn.execute("DELETE FROM durable.workflow_runs WHERE id = %s", (doomed.id,))
        assert store.steps(doomed.id) == []
        assert len(store.steps(kept.id)) == 1


# --- old code, new schema; new code, old schema


def test_code_older_than_the_schema_works(database_url: str) -> None:
    execute(
        database_url,
        "UPDATE durable.alembic_version SET version_num = '9999';"
        "ALTER TABLE durable.workflow_runs ADD COLUMN novelty text",
    )
    first_use(database_url)
    with open_database(database_url) as database, database.connect() as conn:
        store = Store(conn)
        claim = store.running()
        steps.record(conn, step_of(claim))
        assert store.finish(claim)


def test_code_older_than_the_schema_allows_is_refused_with_both_versions(
    database_url: str,
) -> None:
    execute(database_url, f"INSERT INTO durable.schema_info VALUES ({CODE_VERSION + 1})")
    with pytest.raises(SchemaTooNew) as caught:
        first_use(database_url)
    assert str(caught.value) == (
        f"the schema 'durable' needs celery-durable code version {CODE_VERSION + 1} or newer, this"
        f" is {CODE_VERSION}: upgrade celery-durable in this process before it starts"
    )


def test_migrating_a_schema_that_is_newer_than_the_code_is_refused(database_url: str) -> None:
    execute(database_url, "UPDATE durable.alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaTooNew) as caught:
        migrate(database_url)
    assert str(caught.value) == (
        f"the schema 'durable' is at revision 9999, newer than this code's {HEAD}: there is"
        " nothing to migrate. Run migrations with the newest celery-durable that you deploy"
    )


def test_without_auto_migrate_a_missing_schema_is_refused(empty_database_url: str) -> None:
    with pytest.raises(SchemaTooOld) as caught:
        first_use(empty_database_url, auto_migrate=False)
    assert str(caught.value) == (
        f"the schema 'durable' is missing, this code needs {HEAD}, and durable_auto_migrate is"
        " off: run `celery -A <your app> durable migrate` with a role that may create tables"
    )
    with psycopg.connect(empty_database_url) as conn:
        assert conn.execute("SELECT to_regnamespace('durable')").fetchone() == (None,)


def test_without_auto_migrate_a_current_schema_is_used(database_url: str) -> None:
    first_use(database_url, auto_migrate=False)


# --- rights


@pytest.fixture
def role(postgres_server: PostgresServer, database_url: str) -> Iterator[str]:
    """A login role without any right of its own."""
    name = unique_name("role")
    postgres_server.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
    postgres_server.execute(f"DROP OWNED BY {name}")
    postgres_server.execute(f"DROP ROLE {name}")


def as_role(url: str, role: str) -> str:
    made = sa.make_url(url).set(username=role)
    return made.render_as_string(hide_password=False)


def test_a_role_with_the_rights_that_the_error_names_runs_everything_but_migrations(
    database_url: str, role: str
) -> None:
    execute(
        database_url,
        f"GRANT USAGE ON SCHEMA durable TO {role};"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA durable TO {role}",
    )
    url = as_role(database_url, role)
    first_use(url)
    with open_database(url) as database, database.connect() as conn:
        store = Store(conn)
        store.beat("w1")
        claim = store.running()
        steps.record(conn, step_of(claim))
        runs.set_progress(conn, claim.id, claim.attempt, "{}")
        workers.release_child(conn, "w1", 1, RECOVERY)
        dispatch.due(
            conn,
            "default",
            names=["shop.order"],
            idle_queues=[],
            batch=1,
            ring_again=20.0,
            late_error="{}",
        )
        store.finish(store.hold(claim.id))
        conn.execute("DELETE FROM durable.workflow_runs")
        assert store.steps(claim.id) == []
        workers.leave(conn, "w1")


def test_a_role_without_rights_is_told_which_it_needs(database_url: str, role: str) -> None:
    with pytest.raises(MissingRights) as caught:
        first_use(as_role(database_url, role))
    assert str(caught.value) == (
        "the database role lacks a right: permission denied for schema durable. It needs USAGE on"
        " the schema 'durable' and SELECT, INSERT, UPDATE, DELETE on its tables; CREATE on the"
        " database only for migrations (or set durable_auto_migrate = False)"
    )


def test_a_role_that_may_not_create_the_schema_is_told_so(
    postgres_server: PostgresServer, empty_database_url: str, role: str
) -> None:
    with pytest.raises(MissingRights, match=r"permission denied for database .* CREATE on the"):
        first_use(as_role(empty_database_url, role))


def test_the_owner_of_the_schema_migrates_without_a_right_on_the_database(
    empty_database_url: str, role: str
) -> None:
    execute(empty_database_url, f"CREATE SCHEMA durable AUTHORIZATION {role}")
    first_use(as_role(empty_database_url, role))
    execute(empty_database_url, "DROP SCHEMA durable CASCADE")


def test_an_unknown_database_is_an_error_at_first_use(postgres_server: PostgresServer) -> None:
    url = with_database(postgres_server.url, "no_such_database")
    with pytest.raises(Exception, match='database "no_such_database" does not exist'):
        first_use(url)
