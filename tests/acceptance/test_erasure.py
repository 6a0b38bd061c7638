"""Erasure of real runs, by command: of one run, and of all of a subject."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from celery import Celery
from click.testing import CliRunner

from durable import cli
from durable.errors import RunErased
from tests.apps.private import SECRET
from tests.harness import wait_for

TABLES = ("workflow_runs", "step_attempts", "workflow_events", "run_actions")


@pytest.fixture
def app_name() -> str:
    return "tests.apps.private"


def command(app: Celery, *args: str, answer: str = "") -> tuple[int, str]:
    """Run ``celery -A app durable erase ...``."""
    obj = SimpleNamespace(app=app)
    done = CliRunner().invoke(cli.durable, ["erase", *args], obj=obj, input=answer)
    return done.exit_code, done.output


def test_all_data_of_a_subject_is_erased_and_nothing_else(
    app: Celery,
    app_module: Any,
    celery_worker: Any,
    database_url: str,
) -> None:
    result = app_module.everything.apply_async(
        ("ada", SECRET), subject="customer-42", link=app_module.after.s(password=SECRET)
    )
    # By a producer that leaves it to the worker to make a run of the message.
    by_name = Celery.send_task(
        app,
        "private.spread",
        [[SECRET, f"bad {SECRET}"]],
        headers={"durable_subject": "customer-42"},
    )
    other = app_module.child.apply_async([f"another {SECRET}"], subject="customer-43")
    result.send_event("pin", {"wrong": SECRET})
    result.send_event("pin", {"pin": SECRET})
    wait_for(lambda: result.run().reason == "event later", timeout=20, what="the second wait")
    code, said = command(app, "--subject", "customer-42", "--yes")
    assert (code, "has not ended. Cancel first" in said) == (1, True), said
    result.send_event("later", SECRET)
    assert (result.get(timeout=20)["later"], other.get(timeout=20)) != (None, None)
    by_name.get(timeout=20)
    # The callback is another run, without a subject, and no child.
    with psycopg.connect(database_url, autocommit=True) as conn:

        def left() -> str:
            rows = [conn.execute(f"SELECT t::text FROM durable.{t} t".encode()) for t in TABLES]
            lines = [row[0] for found in rows for row in found.fetchall()]
            return "\n".join(line for line in lines if SECRET in line)

        wait_for(
            lambda: (
                conn.execute(
                    "SELECT bool_and(available_at = 'infinity') FROM durable.workflow_runs"
                ).fetchone()
                == (True,)
            ),
            what="the callbacks to be delivered",
        )
        code, said = command(app, "--subject", "customer-42", answer="n\n")
        assert (code, "Erase the data of 5 runs, for good?" in said) == (1, True), said
        assert result.id in left()
        code, said = command(app, "--subject", "customer-42", "--yes", "--reason", "request 7")
        assert (code, "The data of 5 runs was erased." in said) == (0, True), said
        for line in left().splitlines():
            assert other.id in line or "private.after" in line
        [audit] = conn.execute("SELECT DISTINCT action, reason FROM durable.run_actions").fetchall()
        assert audit == ("erase", "request 7")
    with pytest.raises(RunErased, match=f"run {result.id} has ended, and its data was erased"):
        app.AsyncResult(result.id).get(timeout=5)
    assert app.AsyncResult(result.id).state == "SUCCESS"
    assert [step.name for step in result.steps()][:2] == [
        "tests.apps.private.login",
        "tests.apps.private.refuse",
    ]
    assert other.get(timeout=5) == f"the child's another {SECRET}"

    # One run by its id.
    code, said = command(app, other.id, "--yes")
    assert (code, "The data of 1 run was erased." in said) == (0, True), said
    assert other.run().input is None
    assert command(app, other.id, "--yes")[1].strip() == "It was erased before."
    code, said = command(app, "o-42", "--yes")
    assert (code, "Traceback" in said, "'o-42' is not the id of a run" in said) == (1, False, True)
