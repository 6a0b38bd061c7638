"""Types are kept through the decorators, as ``tests/typing/user_code.py`` uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USER_CODE = ROOT / "tests" / "typing" / "user_code.py"


def mypy(*args: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mypy")
    return subprocess.run(
        [sys.executable, "-m", "mypy", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_user_code_passes_strict_and_its_mistakes_are_seen() -> None:
    done = mypy(str(USER_CODE))
    assert done.returncode == 0, done.stdout


def test_a_mistake_that_is_not_marked_is_an_error(tmp_path: Path) -> None:
    code = tmp_path / "more.py"
    code.write_text(
        "from durable import workflow\n"
        "@workflow(queue='orders')\n"
        "def fulfil(order_id: str) -> None: ...\n"
        "fulfil.delay(42)\n"
    )
    done = mypy(str(code))
    assert 'Argument 1 to "delay" of "WorkflowTask" has incompatible type "int"' in done.stdout
