"""The example workflows where they need no worker, and the page that walks through them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from celery import Celery, current_app

from durable import Durable
from tasks import model, research, videos
from tasks.model import Message, message

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "patterns.md").read_text(encoding="utf-8")
EXCERPTS = re.findall(r"```python\n# (tasks/\w+\.py)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def _app() -> Iterator[None]:
    """The current app, so that a workflow can be called directly: without any database."""
    before = current_app._get_current_object()
    app = Celery("unit", broker="memory://")
    Durable(app, database_url="postgresql://127.0.0.1:1/nowhere")
    app.set_current()
    yield
    before.set_current()
    app.close()


def test_the_page_has_excerpts_of_each_module() -> None:
    named = set(re.findall(r"`(tasks/\w+\.py)` \|", PAGE))
    assert {path for path, _ in EXCERPTS} == named


@pytest.mark.parametrize(("path", "excerpt"), EXCERPTS)
def test_an_excerpt_of_the_page_is_what_the_module_has(path: str, excerpt: str) -> None:
    assert excerpt in (ROOT / path).read_text(encoding="utf-8")


def test_links_of_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\((\.\./[^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings


def test_the_example_app_has_every_workflow(tmp_path: Path) -> None:
    code = "import celery_app; celery_app.app.loader.import_default_modules()\n"
    code += "print(*celery_app.app.tasks)"
    env = {**os.environ, "DURABLE_EMBEDDED_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    modules = {path.stem for path in (ROOT / "tasks").glob("*.py")} - {"__init__"}
    tasks = {name.split(".")[1] for name in done.stdout.split() if name.startswith("tasks.")}
    assert tasks == modules - {"services", "model"}


def test_pauses_double_up_to_the_longest_and_add_up_to_our_patience() -> None:
    pauses = list(videos.pauses(10, 60, 200))
    assert pauses == [10, 20, 40, 60, 60, 10]
    assert sum(pauses) == 200


@pytest.mark.usefixtures("_app")
def test_a_model_that_asks_for_tools_without_end_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def insatiable(messages: Sequence[Message], *, seconds: float) -> Message:
        asked.append(len(messages))
        return message("assistant", "", [{"id": "1", "name": "telepathy", "arguments": {}}])

    monkeypatch.setattr(model, "complete", insatiable)
    with pytest.raises(research.TooManyTurns, match="after 8 turns"):
        research.answer("why?")
    assert len(asked) == research.MOST_TURNS


def test_a_tool_that_does_not_exist_is_told_to_the_model() -> None:
    told = research.use_tool({"id": "7", "name": "telepathy", "arguments": {}})
    assert told == message("tool", "error: there is no tool 'telepathy'", answers="7")


def test_the_model_gives_the_same_answer_to_the_same_conversation() -> None:
    conversation = [message("system", "research"), message("user", "tea")]
    first, second = (model.complete(conversation) for _ in range(2))
    assert first == second
    assert [call["name"] for call in first["tool_calls"]] == ["search"]
