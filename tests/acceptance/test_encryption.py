"""Encryption at rest, in real runs: nothing of a user is readable in Postgres."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet

from durable import cli
from durable.encryption import name_of
from durable.errors import EncryptionError
from tests.apps.private import SECRET
from tests.harness import apps, wait_for

OLD, NEW = (Fernet.generate_key().decode() for _ in range(2))
ROOT = Path(__file__).parents[2]
CELERY = (sys.executable, "-m", "celery", "-A", "tests.apps.private")
TABLES = ("workflow_runs", "step_attempts", "workflow_events", "fan_outs")


@pytest.fixture
def app_name() -> str:
    return "tests.apps.private"


@pytest.fixture
def keys() -> list[str]:
    return [OLD]


@pytest.fixture
def app_settings(app_settings: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    return {**app_settings, "durable_encryption_keys": keys, "durable_lease": 2}


@pytest.fixture
def dump(database_url: str) -> Iterator[Any]:
    """All that Postgres holds of runs, as text."""
    with psycopg.connect(database_url, autocommit=True) as conn:

        def read() -> str:
            rows = [conn.execute(f"SELECT t::text FROM durable.{t} t".encode()) for t in TABLES]
            return "\n".join(row[0] for found in rows for row in found.fetchall())

        yield read


def finish(app_module: Any) -> Any:
    """Run the workflow that puts a secret into every column."""
    result = app_module.everything.apply_async(
        ("ada", SECRET),
        link=app_module.after.s(password=SECRET),
        headers={"tenant": "t1"},
    )
    result.send_event("pin", {"wrong": SECRET})
    result.send_event("pin", {"pin": SECRET})
    wait_for(lambda: result.run().reason == "event later", timeout=20, what="the second wait")
    return result


def test_nothing_of_a_user_is_readable_in_postgres(
    app_module: Any, start_worker: Any, dump: Any, query: Any, trace: Any
) -> None:
    worker = start_worker()
    result = finish(app_module)
    assert SECRET not in dump()
    assert query("SELECT progress::text FROM durable.workflow_runs WHERE id = %s", result.id)
    result.send_event("later", SECRET)
    assert result.get(timeout=20) == {
        "user": "ada",
        "password": SECRET,
        "refused": f"the card {SECRET} is refused",
        "child": f"the child's {SECRET}",
        "plain": f"the plain task's {SECRET}",
        "event": {"pin": SECRET},
        "later": SECRET,
    }
    wait_for(lambda: "after" in trace.lines(), what="the callback, whose arguments are encrypted")
    assert SECRET not in dump()
    assert trace.count()["login ada"] == 1
    # Still JSON, and SQL sees that it is encrypted, and by which key.
    kind, key = json.loads(
        query(
            "SELECT json_build_array(input ->> '__type__', input ->> '__key__')::text"
            " FROM durable.workflow_runs WHERE id = %s",
            result.id,
        )
    )
    assert (kind, key) == ("durable:encrypted", name_of(OLD))
    # People with the key read it through the handle.
    assert result.run().input == json.dumps(
        {"args": ["ada", SECRET], "kwargs": {}}, separators=(",", ":")
    )
    assert SECRET in (result.steps()[0].output or "")
    refused, taken, _ = result.events()
    assert (refused.error, json.loads(taken.payload)) == (
        f"the pin {SECRET} is wrong",
        {"pin": SECRET},
    )
    # Nor is it in the log, but for what the user's own plain task has returned.
    logged = [line for line in worker.logs().splitlines() if SECRET in line]
    assert all("private.plain" in line for line in logged), logged


def test_a_failure_is_encrypted_and_comes_back(
    app_module: Any, celery_worker: Any, dump: Any
) -> None:
    result = app_module.fails.delay(SECRET)
    with pytest.raises(Exception, match=f"the card {SECRET} is refused"):
        result.get(timeout=20)
    assert SECRET not in dump()


def test_what_sql_gathers_is_encrypted_and_comes_back(
    app_module: Any, celery_worker: Any, dump: Any
) -> None:
    secrets = [SECRET, f"bad {SECRET}", f"{SECRET}!"]
    result = app_module.spread.delay(secrets)
    assert result.get(timeout=20) == [SECRET, f"bad {SECRET} is bad", f"{SECRET}!"]
    assert SECRET not in dump()


# --- keys


def with_keys(settings: dict[str, Any], *keys: str) -> dict[str, str]:
    """The environment of a process that has these keys."""
    return apps.environment({**settings, "durable_encryption_keys": list(keys)})


def set_keys(app: Any, *keys: str) -> None:
    """Have this process read its keys anew."""
    app.conf.durable_encryption_keys = list(keys)
    for made in ("codec", "settings"):
        app.durable.__dict__.pop(made, None)


def command(app: Any, *args: str) -> str:
    """Run ``celery -A app durable ...``."""
    done = CliRunner().invoke(cli.durable, args, obj=SimpleNamespace(app=app))
    assert done.exit_code == 0, done.output
    return done.output


def due_now(query: Any, run_id: str) -> None:
    query("UPDATE durable.workflow_runs SET available_at = now() WHERE id = %s RETURNING 1", run_id)


def test_a_worker_without_the_key_leaves_runs_to_one_that_has_it(
    app_module: Any,
    start_worker: Any,
    celery_setup_config: dict[str, Any],
    query: Any,
    trace: Any,
) -> None:
    """One in the middle, whose body takes any error for its own, and one whose chain is to go on."""
    first = start_worker()
    waiting = app_module.careful.delay(SECRET)
    ended = app_module.child.apply_async([SECRET], link=app_module.after.s(password=SECRET))
    wait_for(lambda: waiting.run().status == "waiting", timeout=20, what="the run to wait")
    wait_for(lambda: "after" in trace.lines(), timeout=20, what="the callback")
    first.kill()
    # The input is plain, as if encryption had been switched on after the start.
    query(
        "UPDATE durable.workflow_runs SET input = %s WHERE id = %s RETURNING 1",
        json.dumps({"args": [SECRET], "kwargs": {}}),
        waiting.id,
    )
    # As if the worker had died between the end and what follows it.
    query("DELETE FROM durable.workflow_runs WHERE workflow_name = 'private.after' RETURNING 1")
    query(
        "UPDATE durable.workflow_runs SET tail = true, rung = false, available_at = now()"
        " WHERE id = %s RETURNING 1",
        ended.id,
    )
    without = start_worker(env=with_keys(celery_setup_config, NEW))  # it can ring them, and no more
    waiting.send_event("pin", 1)
    for run in (waiting, ended):
        told = f"run {run.id} waits for a worker that can decrypt it"
        wait_for(lambda told=told: told in without.logs(), timeout=20, what=told)
    row = wait_for(
        lambda: (found := waiting.run()).status == "sleeping" and found, what="it to be parked"
    )
    assert row.reason.startswith("a worker could not decrypt it: it is encrypted with the key ")
    assert name_of(OLD) in row.reason
    assert (waiting.state, ended.state) == ("RETRY", "SUCCESS")
    without.kill()
    due_now(query, waiting.id)
    due_now(query, ended.id)
    start_worker()
    assert waiting.get(timeout=20) == [SECRET, 1]
    wait_for(lambda: trace.count()["after"] == 2, timeout=20, what="the callback")
    assert trace.count()["login careful"] == 1


def test_a_client_without_the_key_is_told_which_run_and_which_key(
    app_module: Any, celery_worker: Any, app: Any
) -> None:
    result = app_module.child.delay(SECRET)
    result.get(timeout=20)
    set_keys(app, NEW)
    with pytest.raises(EncryptionError) as caught:
        app.AsyncResult(result.id).get(timeout=5)
    assert str(caught.value) == (
        f"the outcome of run {result.id} cannot be read: it is encrypted with the key"
        f" {name_of(OLD)}, which is not among the durable_encryption_keys of this process (it has"
        f" the key {name_of(NEW)}): add that key to the list"
    )
    assert "durable:encrypted" in app.AsyncResult(result.id).run().input


def test_rotation_while_a_worker_writes(
    app: Any,
    app_module: Any,
    start_worker: Any,
    celery_setup_config: dict[str, Any],
    dump: Any,
    tmp_path: Path,
    trace: Any,
) -> None:
    """Old keys read, the new one writes; a run goes on over the rotation, nothing is lost."""
    worker = start_worker()
    gates = [str(tmp_path / f"gate{n}") for n in range(30)]
    done = app_module.child.delay(SECRET)
    result = app_module.gated.delay(gates, SECRET)
    wait_for(lambda: "gate" in trace.lines(), timeout=20, what="the first step")
    done.get(timeout=20)
    set_keys(app, NEW, OLD)
    assert "are encrypted by key " + name_of(OLD) in command(app, "reencrypt", "--dry-run")
    worker.kill()
    start_worker(env=with_keys(celery_setup_config, NEW, OLD))
    rotation = subprocess.Popen(
        [*CELERY, "durable", "reencrypt", "--batch", "1"],
        env={
            **os.environ,
            **with_keys(celery_setup_config, NEW, OLD),
            "PYTHONPATH": str(ROOT),
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for gate in gates:  # the worker writes step by step meanwhile
        Path(gate).touch()
    told, _ = rotation.communicate(timeout=60)
    assert (rotation.returncode, "values rewritten" in told) == (0, True), told
    assert OLD not in told
    found = result.get(timeout=40)
    assert found == [{"user": gate, "password": SECRET} for gate in gates]
    assert all(trace.count()[f"login {gate}"] == 1 for gate in gates)
    command(app, "reencrypt")
    assert command(app, "reencrypt", "--dry-run") == "0 values are to be rewritten.\n"
    held = dump()
    assert name_of(NEW) in held
    assert name_of(OLD) not in held
    assert SECRET not in held
    set_keys(app, NEW)  # the old key can go
    assert app.AsyncResult(result.id).get(timeout=5) == found
    assert app.AsyncResult(done.id).get(timeout=5) == f"the child's {SECRET}"
