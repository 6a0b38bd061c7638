"""From 0002 to the outbox, with runs of every status in the tables."""

from __future__ import annotations

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command

from durable.store import dispatch, runs, steps
from durable.store.migrate import _alembic_config, migrate
from durable.store.runs import Key, NewRun, Park
from tests.harness.store import Store, open_database, step_of

OLD = """
INSERT INTO durable.workflow_runs (id, workflow_name, status, input, message, rung, available_at)
SELECT ('00000000-0000-4000-8000-00000000000' || row_number() OVER ())::uuid, 'shop.order', status,
       '{"args":[],"kwargs":{}}', '{}', false,
       CASE WHEN status IN ('pending', 'sleeping') THEN now() - interval '1 s'
            ELSE timestamptz 'infinity' END
  FROM unnest('{pending,running,sleeping,waiting,paused,succeeded,failed,canceled}'::text[]) status
"""
NEW = "00000000-0000-4000-8000-0000000000ff"


@pytest.fixture
def old_url(empty_database_url: str) -> str:
    engine = sa.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(empty_database_url),
        poolclass=sa.NullPool,
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA durable")
        config = _alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
    with psycopg.connect(empty_database_url, autocommit=True) as conn:
        conn.execute(OLD)
    return empty_database_url


def test_old_runs_are_read_and_finished_by_new_code(old_url: str) -> None:
    migrate(old_url)
    with open_database(old_url) as database, database.connect() as conn:
        store = Store(conn)
        due = dispatch.due(
            conn,
            "default",
            names=["shop.order"],
            idle_queues=[],
            batch=10,
            ring_again=20.0,
            late_error="{}",
        )
        assert len(due.doorbells) == 2
        assert not due.outbox
        for doorbell in due.doorbells:
            claim = store.hold(doorbell.id)
            steps.record(conn, step_of(claim))
            assert store.park(claim, Park("pending", "hand-back"))
            assert store.finish(store.hold(claim.id))
        counted = conn.execute(
            "SELECT status, count(*) FROM durable.workflow_runs GROUP BY 1 ORDER BY 1"
        ).fetchall()
        assert dict(counted) == {
            "canceled": 1,
            "failed": 1,
            "paused": 1,
            "running": 1,
            "succeeded": 3,
            "waiting": 1,
        }
        run = NewRun(NEW, "default", "shop.order", '{"args":[],"kwargs":{}}', "{}")
        assert runs.insert_keyed(conn, run, Key("k", run.input, 60.0, "after_ttl")) == (NEW, True)
