"""Tasks that belong to no app. Imported by programs that a test starts, never by the tests."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from durable import Workflow, step, workflow


@step
def word(text: str) -> str:
    return text


@workflow(deadline="1h")
def greet(name: str) -> str:
    return word("hello") + " " + word(name)


@shared_task(base=Workflow, bind=True)
def part(self: Any, text: str) -> str:
    return f"shared: {word(text)} {isinstance(self, Workflow)}"
