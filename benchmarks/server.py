"""The Postgres that benchmarks run on: a configured one, else the embedded, fsync on."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from durable import embedded
from durable.store.migrate import migrate


@contextmanager
def fresh_database() -> Iterator[str]:
    """URL of a new, migrated database, dropped afterwards."""
    configured = os.environ.get("DURABLE_DATABASE_URL")
    if configured:
        yield from _database_on(configured)
        return
    with tempfile.TemporaryDirectory(prefix="durable-bench-") as directory:
        yield from _database_on(embedded.start(Path(directory) / "pg").url)


def _database_on(server: str) -> Iterator[str]:
    name = f"durable_bench_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        url = make_url(server).set(database=name, drivername="postgresql")
        address = url.render_as_string(hide_password=False)
        try:
            migrate(address)
            yield address
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
