"""One worker for all tests of a module: what a worker of its own would not tell better."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
from celery import Celery

from tests.harness import LocalWorker, WorkerNode, apps, brokers, services, wait_for
from tests.harness.postgres import PostgresServer

ROOT = Path(__file__).parents[2]


@dataclass
class Shared:
    """A sample app, the database it uses, and a worker of it that runs already.

    Attributes:
        module: the sample app's module, as the test process has it.
        env: what another process needs to load the app.
        trace: file of JSON lines that the app's bodies and hooks write.
    """

    module: ModuleType
    settings: dict[str, Any]
    conn: psycopg.Connection[Any]
    directory: Path
    trace: Path
    queue: str
    workers: list[WorkerNode] = field(default_factory=list)

    @property
    def app(self) -> Celery:
        app: Celery = self.module.app
        return app

    @property
    def worker(self) -> WorkerNode:
        return self.workers[0]

    @property
    def env(self) -> dict[str, str]:
        settings = apps.environment(self.settings)
        return {**os.environ, **settings, "TMPDIR": str(self.directory), "PYTHONPATH": str(ROOT)}

    def start_worker(self, **options: Any) -> WorkerNode:
        """Start a worker; it ends with the module."""
        name = f"w{len(self.workers) + 1}"
        options = {"log_path": self.directory / f"{name}.log", **options}
        worker = LocalWorker(self.module.__name__, name=name, env=self.env, **options)
        self.workers.append(WorkerNode(worker, self.app))
        worker.start()
        worker.wait_ready()
        return self.workers[-1]

    def notes(self, run_id: str, what: str | None = None) -> list[Any]:
        """What bodies and hooks noted of a run: ``(what, value)``, or the values of one kind."""
        lines = self.trace.read_text().splitlines() if self.trace.exists() else []
        notes = [(note, value) for run, note, value in map(json.loads, lines) if run == run_id]
        return notes if what is None else [value for note, value in notes if note == what]

    def wait_for_note(self, run_id: str, what: str) -> Any:
        """Wait until a body or hook noted something of a run; its first value."""
        return wait_for(lambda: self.notes(run_id, what), what=f"note {what!r} of {run_id}")[0]

    def query(self, statement: str, *params: object) -> Any:
        """First column of the first row."""
        row = self.conn.execute(statement, params).fetchone()
        return None if row is None else row[0]

    def status(self, run_id: str) -> Any:
        return self.query("SELECT status FROM durable.workflow_runs WHERE id = %s", run_id)

    def wait_for_status(self, run_id: str, *statuses: str) -> None:
        wait_for(lambda: self.status(run_id) in statuses, what=f"{run_id} to be {statuses}")

    def wait_for_name(self, run_id: str) -> str:
        """Wait for a run to be there; the last part of its workflow's name."""
        ask = "SELECT workflow_name FROM durable.workflow_runs WHERE id = %s"
        name: str = wait_for(lambda: self.query(ask, run_id), what=f"run {run_id}")
        return name.rpartition(".")[2]

    def celery(self, *args: str) -> str:
        """Run a ``celery`` command on the app; its output."""
        return self._run("-m", "celery", "-A", self.module.__name__, *args)

    def python(self, code: str) -> str:
        """Run a program that can load the app; its output."""
        return self._run("-c", code)

    def _run(self, *args: str) -> str:
        command = [sys.executable, *args]
        done = subprocess.run(
            command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@contextmanager
def running(
    module: str,
    server: PostgresServer,
    directory: Path,
    *,
    backend: bool = False,
    worker: Sequence[str] | None = (),
    **settings: Any,
) -> Iterator[Shared]:
    """Load a sample app and start a worker of it.

    Args:
        backend: whether Celery gets a (Redis) result backend.
        worker: more arguments of ``celery worker``; None: start none.
        **settings: of the app.
    """
    if backend:
        services.require(services.REDIS)
    redis = services.is_reachable(services.REDIS)
    broker = brokers.redis() if redis else brokers.filesystem(directory / "broker")
    url = server.create_database()
    trace = directory / "trace"
    settings = {
        **broker.settings,
        "durable_database_url": url,
        "trace": str(trace),
        **settings,
    }
    if backend:
        prefix = broker.transport_options["global_keyprefix"]
        settings["result_backend"] = broker.url
        settings["result_backend_transport_options"] = {"global_keyprefix": prefix}
    app = apps.load_app(module, settings)
    try:
        with psycopg.connect(url, autocommit=True) as conn:
            shared = Shared(sys.modules[module], settings, conn, directory, trace, broker.queue)
            try:
                if worker is not None:
                    more = ("--without-mingle", "--without-gossip", *worker)
                    shared.start_worker(args=more)
                yield shared
            finally:
                for each in shared.workers:
                    each.teardown()
                app.durable.close()
    finally:
        apps.unload_app(module)
        broker.teardown()
        server.drop_database(url)
