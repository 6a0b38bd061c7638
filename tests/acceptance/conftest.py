"""Fixtures of tests that run real workers on the durable sample app."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest


class Trace:
    """What the sample app's bodies wrote: one line for each time one ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def count(self) -> Counter[str]:
        return Counter(self.lines())


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return Trace(tmp_path / "trace")


@pytest.fixture
def app_settings(database_url: str, trace: Trace) -> dict[str, Any]:
    return {"durable_database_url": database_url, "trace": str(trace.path)}


Query = Callable[..., Any]


@pytest.fixture
def query(database_url: str) -> Any:
    """Ask the test's database: ``query(sql, *params)`` gives the first column of the first row."""
    with psycopg.connect(database_url, autocommit=True) as conn:

        def ask(statement: str, *params: object) -> Any:
            row = conn.execute(statement, params).fetchone()
            return None if row is None else row[0]

        yield ask
