"""A database that is there and cannot be used: told at ``.delay()`` and at a worker's start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery import Celery
from sqlalchemy import make_url

from durable import Durable, Workflow
from durable.errors import DatabaseReadOnly, MissingRights, SchemaTooNew
from durable.store.migrate import CODE_VERSION
from tests.harness.names import unique_name
from tests.harness.postgres import PostgresServer

ROOT = Path(__file__).parents[2]

APP = """
from celery import Celery
from durable import Durable, Workflow

app = Celery("shop", broker="memory://")
Durable(app)

@app.task(base=Workflow)
def fulfil(order_id): ...
"""

#: What the end of a worker's output has to be, beside Celery's own warnings.
NO_DATABASE = (
    "celery-durable: no database: set durable_database_url (app.conf, or Durable(app,"
    " database_url=...)) or the environment variable DURABLE_DATABASE_URL to a postgresql:// URL;"
    " the value 'embedded' starts a Postgres of its own"
)


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(statement.encode())


@pytest.fixture
def workflow(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes a workflow on a database."""
    apps: list[Celery] = []

    def make(url: str) -> Any:
        app = Celery("shop", broker="memory://", set_as_current=False)
        apps.append(app)
        app.conf.durable_database_url = url  # goes before the environment
        Durable(app)

        @app.task(shared=False, base=Workflow, name="shop.fulfil")
        def fulfil(order_id: str) -> None: ...

        return fulfil

    yield make
    for app in apps:
        app.durable.close()
        app.close()


def needs_newer_code(url: str) -> None:
    execute(url, f"INSERT INTO durable.schema_info VALUES ({CODE_VERSION + 1})")


NEWER = (
    f"the schema 'durable' needs celery-durable code version {CODE_VERSION + 1} or newer, this is"
    f" {CODE_VERSION}: upgrade celery-durable in this process before it starts"
)


# --- when a run is started


def test_a_schema_that_needs_newer_code_refuses_a_start(workflow: Any, database_url: str) -> None:
    needs_newer_code(database_url)
    with pytest.raises(SchemaTooNew) as caught:
        workflow(database_url).delay("o-42")
    assert str(caught.value) == NEWER


def test_a_read_only_database_refuses_a_start_and_names_the_setting(
    workflow: Any, database_url: str
) -> None:
    url = make_url(database_url).update_query_dict(
        {"options": "-cdefault_transaction_read_only=on"}
    )
    with pytest.raises(DatabaseReadOnly, match="point durable_database_url at the primary"):
        workflow(url.render_as_string(hide_password=False)).delay("o-42")


def test_a_role_that_may_only_read_is_told_what_it_needs(
    workflow: Any, postgres_server: PostgresServer, database_url: str
) -> None:
    role = unique_name("role")
    postgres_server.execute(f"CREATE ROLE {role} LOGIN")
    try:
        execute(
            database_url,
            f"GRANT USAGE ON SCHEMA durable TO {role};"
            f"GRANT SELECT ON ALL TABLES IN SCHEMA durable TO {role}",
        )
        url = make_url(database_url).set(username=role).render_as_string(hide_password=False)
        with pytest.raises(MissingRights) as caught:
            workflow(url).delay("o-42")
        text = str(caught.value)
        assert "permission denied for table workflow_runs" in text
        assert "SELECT, INSERT, UPDATE, DELETE on its tables" in text
    finally:
        execute(database_url, f"DROP OWNED BY {role}")
        postgres_server.execute(f"DROP ROLE {role}")


def test_what_was_refused_left_nothing_behind(workflow: Any, database_url: str) -> None:
    fulfil = workflow(database_url)
    for args, options in [
        ((float("nan"),), {}),
        (("o-42",), {"task_id": "order-42"}),
        (("o-42",), {"countdown": "soon"}),
        (("o-42",), {"dedline": 1}),
        ((), {}),
    ]:
        with pytest.raises((TypeError, ValueError)):
            fulfil.apply_async(args, **options)
    with psycopg.connect(database_url) as conn:
        assert conn.execute("SELECT count(*) FROM durable.workflow_runs").fetchone() == (0,)


def test_a_message_whose_run_is_in_another_database_is_an_error_in_the_workers_log(
    workflow: Any, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = workflow(database_url).app.durable
    worker.lease.renew(worker.clock.monotonic())
    assert worker.claim(worker.clock.uuid()) is None
    assert "is durable_database_url the same where it was started?" in caplog.text


# --- at a worker's start


def start_worker(directory: Path, url: str, **env: str) -> tuple[int, list[str]]:
    """Start one that is to refuse; its exit code and what it said, warnings of Celery aside."""
    (directory / "shop_app.py").write_text(APP)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{directory}", **env}
    environment["DURABLE_DATABASE_URL"] = url
    environment["C_FORCE_ROOT"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", "celery", "-A", "shop_app", "worker"]
    done = subprocess.run(
        [*command, "--pool", "solo", "--without-mingle", "--without-gossip"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=directory,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()


def test_a_worker_without_a_database_ends_with_one_line(tmp_path: Path) -> None:
    code, lines = start_worker(tmp_path, "")
    assert code == 1
    assert lines == [NO_DATABASE]


def test_a_worker_with_a_wrong_setting_ends_with_one_line(tmp_path: Path) -> None:
    code, lines = start_worker(tmp_path, "embedded", DURABLE_LEESE="3")
    assert code == 1
    problem = "environment variable DURABLE_LEESE is not a setting; did you mean DURABLE_LEASE?"
    assert lines == [f"celery-durable: {problem}"]


def test_a_worker_older_than_the_schema_allows_ends_with_one_line(
    tmp_path: Path, database_url: str
) -> None:
    needs_newer_code(database_url)
    code, lines = start_worker(tmp_path, database_url)
    assert code == 1
    assert lines[-1].endswith(f"celery-durable: {NEWER}")  # Celery's log has begun
    assert not any("Traceback" in line for line in lines)
