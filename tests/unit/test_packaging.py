"""The files around the package agree with each other."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_compose_has_everything_an_application_needs() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = compose["services"]
    assert {"postgres", "rabbitmq", "worker", "beat", "flower"} == set(services)
    for name in ("worker", "beat", "flower"):
        assert set(services[name]["depends_on"]) == {"postgres", "rabbitmq"}
        assert "-A celery_app" in services[name]["command"]
        database = services[name]["environment"]["DURABLE_DATABASE_URL"]
        settings = services["postgres"]["environment"]
        credentials = f"{settings['POSTGRES_USER']}:{settings['POSTGRES_PASSWORD']}"
        assert database == f"postgresql://{credentials}@postgres:5432/{settings['POSTGRES_DB']}"


def test_what_the_image_copies_exists() -> None:
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name


def test_the_installed_version_is_this_trees() -> None:
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert version("celery-durable") == declared[1]


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench", "dev"])
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c "
        '"import sys; sys.version_info = (3, 8); exec(sys.argv[2])" "$@"\n'
    )
    old.chmod(0o755)
    command = ["make", "dev", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"celery-durable needs Python 3.10 or newer, and {old} is 3.8" in done.stderr
    assert "Traceback" not in done.stderr
