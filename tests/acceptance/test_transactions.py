"""Runs and events of somebody's transaction, through a real worker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery.exceptions import TimeoutError as CeleryTimeoutError
from sqlalchemy.orm import Session

import durable
from tests.acceptance.shared import ROOT, Shared, running
from tests.conftest import WORKERS
from tests.harness import services, transactions, wait_for
from tests.harness.postgres import PostgresServer

INPUTS = "SELECT json_agg(input -> 'args' ->> 0 ORDER BY created_at) FROM durable.workflow_runs"


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("outbox")
    with running("tests.apps.outbox", postgres_server, directory, worker=None) as shared:
        shared.start_worker(
            queues=(shared.queue, "slow"), args=("--without-mingle", "--without-gossip")
        )
        shared.conn.execute("CREATE TABLE stock (sku text)")
        shared.conn.execute("CREATE TABLE orders (id text, state text, run uuid)")
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


@pytest.fixture
def session(shared: Shared) -> Iterator[Session]:
    url = shared.settings["durable_database_url"]
    with Session(transactions.engine(url, "postgresql+psycopg")) as session:
        yield session


def test_a_run_begins_with_the_commit(shared: Shared, session: Session) -> None:
    run = shared.module.echo.apply_async(("o-1",), transaction=session)
    never = shared.module.echo.delay("another")
    assert never.get(timeout=10) == ["another", None]  # the worker is not what is missing
    with pytest.raises(CeleryTimeoutError):
        run.get(timeout=0.1)
    session.commit()
    assert run.get(timeout=10) == ["o-1", None]


def test_an_event_wakes_its_run_with_the_commit(shared: Shared, session: Session) -> None:
    run = shared.module.approve.delay()
    shared.wait_for_status(run.id, "waiting")
    run.send_event("approval", "granted", transaction=session)
    assert shared.status(run.id) == "waiting"
    session.commit()
    assert run.get(timeout=10) == "granted"
    assert shared.query("SELECT count(*) FROM durable.outbox") == 0


def test_what_a_step_starts_in_its_session_is_one_commit_with_it(shared: Shared) -> None:
    """Its first attempt has started them too, and is rolled back."""
    run = shared.module.order.delay("tea")
    ids = run.get(timeout=20).split()
    assert len(set(ids)) == 4
    started = (
        "SELECT count(*) FROM durable.workflow_runs"
        " WHERE workflow_name = 'outbox.echo' AND input -> 'args' ->> 0 = 'tea'"
    )
    assert shared.query(started) == 4
    assert shared.query("SELECT count(*) FROM stock") == 1
    for run_id in ids:
        assert shared.module.echo.AsyncResult(run_id).get(timeout=10) == ["tea", None]


def test_what_a_step_sends_in_its_session_is_one_commit_with_it(shared: Shared) -> None:
    waits = shared.module.approve.delay()
    shared.module.approves.delay(waits.id).get(timeout=20)
    assert waits.get(timeout=10) == "granted"
    assert len(waits.events()) == 1


def test_the_body_of_a_workflow_is_refused(shared: Shared) -> None:
    refused = shared.module.misplaced.delay(shared.settings["durable_database_url"])
    assert refused.get(timeout=10) == [
        "NotInWorkflow: transaction= belongs in a step: what the body",
        "NotInWorkflow: idempotency_key= belongs in a step: what the ",
        "NotInWorkflow: durable.start_many() belongs in a step: what ",
        "NotInWorkflow: transaction= belongs in a step: what the body",
    ]


def test_an_idempotency_key_gives_the_handle_of_its_run(shared: Shared) -> None:
    runs = [
        shared.module.echo.apply_async(("o-2",), idempotency_key="o-2", queue=shared.queue)
        for _ in range(2)
    ]
    assert [run.get(timeout=10) for run in runs] == [["o-2", None]] * 2
    assert shared.module.echo.apply_async(("o-2",), idempotency_key="o-2").get(timeout=1)


def test_start_many_runs_them_all(shared: Shared) -> None:
    results = durable.start_many(shared.module.echo, [(n,) for n in range(150)])
    assert [each.get(timeout=30)[0] for each in results] == list(range(150))


# --- by SQL


def test_a_trigger_starts_tells_and_cancels_runs(shared: Shared, session: Session) -> None:
    conn: Any = shared.conn
    conn.execute("""
        CREATE FUNCTION on_order() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                NEW.run := durable.enqueue('outbox.approve', idempotency_key => NEW.id);
            ELSIF NEW.state = 'paid' THEN
                PERFORM durable.send_event(NEW.run, 'approval', to_json(NEW.id));
            ELSE
                PERFORM durable.cancel(NEW.run, 'order ' || NEW.state);
            END IF;
            RETURN NEW;
        END $$
    """)
    conn.execute("""
        CREATE TRIGGER on_order BEFORE INSERT OR UPDATE ON orders
        FOR EACH ROW EXECUTE FUNCTION on_order()
    """)
    with conn.transaction(force_rollback=True):
        conn.execute("INSERT INTO orders VALUES ('o-9', 'new')")
    with conn.transaction():
        conn.execute("INSERT INTO orders VALUES ('o-3', 'new'), ('o-4', 'new')")
    paid, returned = (
        shared.module.approve.AsyncResult(str(row[0]))
        for row in conn.execute("SELECT run FROM orders ORDER BY id").fetchall()
    )
    for run in (paid, returned):
        shared.wait_for_status(run.id, "waiting")
    with conn.transaction(force_rollback=True):
        conn.execute("UPDATE orders SET state = 'returned'")
    conn.execute("UPDATE orders SET state = 'paid' WHERE id = 'o-3'")
    conn.execute("UPDATE orders SET state = 'returned' WHERE id = 'o-4'")
    assert paid.get(timeout=10) == "o-3"
    shared.wait_for_status(returned.id, "canceled")
    assert returned.run().reason == "order returned"


def test_a_run_of_sql_goes_the_tasks_own_way(shared: Shared) -> None:
    run_id = str(shared.query("SELECT durable.enqueue('outbox.slow', '[7]')"))
    assert shared.module.slow.AsyncResult(run_id).get(timeout=10) == 7
    row = "SELECT queue || ' ' || (message ->> 'queue') || ' ' || (message ->> 'priority')"
    assert shared.query(f"{row} FROM durable.workflow_runs WHERE id = %s", run_id) == "slow slow 4"
    deadline = "SELECT (deadline_at - created_at)::text FROM durable.workflow_runs WHERE id = %s"
    assert shared.query(deadline, run_id) == "01:00:00"


def test_what_sql_says_of_the_way_goes_first(shared: Shared) -> None:
    run_id = str(
        shared.query(
            "SELECT durable.enqueue('outbox.slow', '[7]', queue => %s, priority => 2,"
            " countdown => '10 milliseconds', deadline => '1 day')",
            shared.queue,
        )
    )
    assert shared.module.slow.AsyncResult(run_id).get(timeout=10) == 7
    row = "SELECT queue || ' ' || (message ->> 'priority') || ' ' || (deadline_at - created_at)"
    found = shared.query(f"{row} FROM durable.workflow_runs WHERE id = %s", run_id)
    assert found == f"{shared.queue} 2 1 day"


def test_a_run_of_sql_with_other_arguments_than_the_task_takes_fails(shared: Shared) -> None:
    run_id = str(shared.query("SELECT durable.enqueue('outbox.echo', '[1, 2, 3]')"))
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments"):
        shared.module.echo.AsyncResult(run_id).get(timeout=10)


def test_psql_starts_a_run(shared: Shared) -> None:
    if shutil.which("psql") is None:
        services.missing("psql is not installed")
    url = shared.settings["durable_database_url"]
    statement = "SELECT durable.enqueue('outbox.echo', '[1]', '{\"twice\": 2}')"
    done = subprocess.run(
        ["psql", "-XAtq", "-c", statement, url],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert shared.module.echo.AsyncResult(done.stdout.strip()).get(timeout=10) == [1, 2]


# --- Django


def test_a_django_site_starts_runs_in_its_transactions(shared: Shared) -> None:
    """Its process ends right after the commit, before anything that waits for that."""
    pytest.importorskip("django")
    before = shared.query("SELECT count(*) FROM durable.workflow_runs")
    env = {
        **os.environ,
        "SITE_DATABASE_URL": shared.settings["durable_database_url"],
        "SITE_QUEUE": shared.queue,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.apps.django_shop"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    run = shared.module.echo.AsyncResult(done.stdout.strip())
    assert run.get(timeout=10) == ["transaction=", None]
    rows = shared.conn.execute(
        "SELECT input -> 'args' ->> 0 FROM durable.workflow_runs ORDER BY created_at DESC,"
        " input ->> 'args' LIMIT %s",
        (shared.query("SELECT count(*) FROM durable.workflow_runs") - before,),
    ).fetchall()
    assert sorted(row[0] for row in rows) == [
        "of a class of its own",
        "on commit",
        "on commit, with a key",
        "transaction=",
    ]


# --- without a worker


def test_an_event_in_time_counts_though_it_is_delivered_later(
    postgres_server: PostgresServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Committed before the timeout, while no worker was up to deliver it."""
    with running("tests.apps.outbox", postgres_server, tmp_path) as shared:
        request.node.stash[WORKERS] = shared.workers
        run = shared.module.approve.delay(timeout=1.5)
        shared.wait_for_status(run.id, "waiting")
        shared.worker.kill()
        with psycopg.connect(shared.settings["durable_database_url"]) as conn:
            run.send_event("approval", "granted", transaction=conn)
        due = "SELECT available_at <= clock_timestamp() FROM durable.workflow_runs WHERE id = %s"
        wait_for(lambda: shared.query(due, run.id), what="the timeout to pass")
        shared.worker.restart()
        assert run.get(timeout=20) == "granted"
