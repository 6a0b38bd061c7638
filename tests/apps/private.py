"""Workflows whose data nobody is to see: each value of a user has SECRET in it.

The trace has one line for each body that ran, for tests that count them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery

import durable
from durable import Durable, Workflow, step
from tests.apps import settings_from_environment

SECRET = "hunter2"

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("private")
app.conf.update(settings)
Durable(app)


def trace(*words: object) -> None:
    with TRACE.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


@step
def login(user: str, password: str) -> dict[str, Any]:
    trace("login", user)
    return {"user": user, "password": password}


@step(max_retries=0)
def refuse(card_number: str) -> None:
    raise durable.PermanentError(f"the card {card_number} is refused")


@step
def gate(path: str) -> None:
    trace("gate")
    while path and not Path(path).exists():
        time.sleep(0.01)


@app.task(name="private.child", base=Workflow)
def child(password: str) -> str:
    return f"the child's {password}"


@app.task(name="private.plain")
def plain(password: str) -> str:
    return f"the plain task's {password}"


@app.task(name="private.after", base=Workflow)
def after(result: Any, password: str) -> str:
    trace("after")
    return f"after {password}"


@app.task(name="private.everything", base=Workflow, bind=True)
def everything(self: Any, user: str, password: str) -> dict[str, Any]:
    """Put a secret into whatever the database has a column for."""
    found = login(user, password)
    durable.set_progress(1, 2, at=password)
    try:
        refuse(password)
    except durable.PermanentError as exc:
        found["refused"] = str(exc)
    found["child"] = child.delay(password).get()
    found["plain"] = plain.delay(password).get()
    found["event"] = durable.wait_for_event("pin", schema=checked_pin)
    found["later"] = durable.wait_for_event("later")
    return found


def checked_pin(payload: dict[str, str]) -> dict[str, str]:
    if "wrong" in payload:
        raise ValueError(f"the pin {payload['wrong']} is wrong")
    return payload


@app.task(name="private.signs_in", base=Workflow)
def signs_in(user: str, password: str, *, card_number: str = "") -> dict[str, Any]:
    return login(user, password)


@app.task(name="private.fails", base=Workflow)
def fails(password: str) -> None:
    refuse(password)


@app.task(name="private.gated", base=Workflow)
def gated(paths: list[str], password: str) -> list[Any]:
    """A step with a secret, then a wait for the test, over and over."""
    found = []
    for path in paths:
        found.append(login(path, password))
        gate(path)
    return found


@app.task(name="private.careful", base=Workflow)
def careful(password: str) -> Any:
    """Takes whatever goes wrong for its own affair."""
    try:
        found = login("careful", password)["password"]
    except Exception as exc:  # noqa: BLE001 - the point
        return f"lost: {exc}"
    return [found, durable.wait_for_event("pin")]


@app.task(name="private.spread", base=Workflow)
def spread(passwords: list[str]) -> Any:
    """Items' outcomes are gathered by SQL; two of them fail."""
    return [
        str(each) if isinstance(each, Exception) else each
        for each in durable.fan_out(guarded, passwords, return_exceptions=True)
    ]


@step(max_retries=0)
def guarded(password: str) -> str:
    if password.startswith("bad"):
        raise durable.PermanentError(f"{password} is bad")
    return password


@step(max_retries=0)
def guarded_card(card_number: str) -> str:
    if card_number == "bad":
        raise durable.PermanentError("it is bad")
    return "good"


@app.task(name="private.guards", base=Workflow)
def guards(numbers: list[str]) -> list[str]:
    return durable.fan_out(guarded_card, numbers)


@app.task(name="private.quotes", base=Workflow)
def quotes(logins: list[dict[str, str]]) -> dict[str, Any]:
    return {"quoted": logins}
