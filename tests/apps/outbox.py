"""Workflows that are started, and told things, in transactions and by SQL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psycopg
from celery import Celery
from sqlalchemy import text

import durable
from durable import Durable, RecoverableError, Workflow, step
from tests.apps import settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("outbox")
app.conf.update(settings)
app.conf.task_routes = {"outbox.slow": {"priority": 4}}
Durable(app)


@app.task(base=Workflow, name="outbox.echo")
def echo(value: object, twice: object = None) -> object:
    return [value, twice]


@app.task(base=Workflow, name="outbox.slow", queue="slow", deadline="1h")
def slow(value: object) -> object:
    return value


@app.task(base=Workflow, name="outbox.approve", bind=True)
def approve(self: Any, timeout: float | None = None) -> object:
    try:
        return durable.wait_for_event("approval", timeout=timeout)
    except durable.EventTimeout:
        return "nobody answered"


@step(retry_backoff=0.1)
def reserve(sku: str) -> str:
    """Write a row, start a run and send an event; the first attempt fails after that."""
    session = durable.session()
    session.execute(text("INSERT INTO stock (sku) VALUES (:sku)"), {"sku": sku})
    child = echo.apply_async((sku,), transaction=session)
    keyed = echo.apply_async((sku,), idempotency_key=sku, transaction=session)
    many = durable.start_many(echo, [(sku,), (sku,)], transaction=session)
    if durable.current().step_attempt == 1:
        raise RecoverableError("not this time")
    return " ".join([child.id, keyed.id, *(each.id for each in many)])


@app.task(base=Workflow, name="outbox.order")
def order(sku: str) -> str:
    return reserve(sku)


@step(retry_backoff=0.1)
def approve_another(run_id: str) -> None:
    durable.send_event(run_id, "approval", "granted", transaction=durable.session())
    if durable.current().step_attempt == 1:
        raise RecoverableError("not this time")


@app.task(base=Workflow, name="outbox.approves")
def approves(run_id: str) -> None:
    approve_another(run_id)


@app.task(base=Workflow, name="outbox.misplaced")
def misplaced(url: str) -> list[str]:
    """What the body of a workflow is no place for."""
    refused = []
    with psycopg.connect(url) as conn:
        for start in (
            lambda: echo.apply_async((1,), transaction=conn),
            lambda: echo.apply_async((1,), idempotency_key="k"),
            lambda: durable.start_many(echo, [(1,)]),
            lambda: durable.send_event(durable.current().id, "e", transaction=conn),
        ):
            try:
                start()
            except RuntimeError as exc:
                refused.append(f"{type(exc).__name__}: {exc}"[:60])
    return refused


@app.task(name="outbox.plain")
def plain(value: object) -> object:
    return value
