"""Django: its settings, and Celery's task class for it underneath."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

ROOT = Path(__file__).parents[2]


def test_a_site_sets_options_and_starts_runs_on_commit(database_url: str) -> None:
    pytest.importorskip("django")
    command = [sys.executable, "-m", "tests.apps.django_site"]
    env = {**os.environ, "SITE_DATABASE_URL": database_url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "lease 30.0",
        "DjangoTask True 7",
        "in the transaction",
        "rolled back",
    ]
    with psycopg.connect(database_url) as conn:
        inputs = conn.execute("SELECT input ->> 'args' FROM durable.workflow_runs").fetchall()
    assert inputs == [("[1]",)]
