"""Code as a user writes it, for ``mypy --strict``: never run, only checked.

What has to be an error carries ``type: ignore`` with its code; mypy complains
of one that ignores nothing, so an error that is no longer seen is seen here.
"""

from __future__ import annotations

import asyncio
import uuid
from datetime import datetime
from decimal import Decimal
from typing import Any, TypedDict

import psycopg
from celery import Celery
from sqlalchemy.orm import Session
from typing_extensions import assert_type

import durable
from durable import Durable, PermanentError, RecoverableError, Workflow, run_step, step, workflow
from durable.result import DurableResult

app = Celery("shop")
extension: Durable = Durable(app, database_url="postgresql://localhost/shop", lease="30s")


class Payment(TypedDict):
    id: str
    cents: int


# --- steps


@step
def load(order_id: str) -> dict[str, int]:
    return {order_id: 1}


@step(max_retries=5, retry_backoff=2, retry_backoff_max="2m", autoretry_for=(OSError,))
def charge(order_id: str, cents: int, *, currency: str = "EUR") -> Payment:
    if cents < 0:
        raise PermanentError("nothing to charge")
    if not currency:
        raise RecoverableError("busy", retry_after="90s")
    assert_type(durable.idempotency_key(), str)
    assert_type(durable.session(), Session)
    return {"id": order_id, "cents": cents}


assert_type(load("o-42"), dict[str, int])
assert_type(charge("o-42", 100, currency="USD"), Payment)
charge("o-42", "100")  # type: ignore[arg-type]
charge("o-42", 100, colour="red")  # type: ignore[call-arg]
charge("o-42")  # type: ignore[call-arg]
load("o-42").append(1)  # type: ignore[attr-defined]
assert_type(durable.fan_out(load, ["o-1", "o-2"], max_concurrency=3), list[dict[str, int]])
assert_type(durable.fan_out(load, ["o-1"], return_exceptions=True), list[Any])
assert_type(durable.gather(load.s("o-1"), charge.s("o-1", 100)), list[Any])
charge.s("o-42", "100")  # type: ignore[arg-type]


# --- workflows


@workflow
def quote(amount: Decimal) -> Decimal:
    assert_type(run_step("double", lambda value: value * 2, amount), Decimal)
    run_step("charge", charge, "o-42", "100")  # type: ignore[arg-type]
    return amount


@workflow(queue="orders", deadline="7d", max_retries=3)
def fulfil(order_id: str, cents: int = 0) -> Payment:
    assert_type(durable.now(), datetime)
    assert_type(durable.uuid4(), uuid.UUID)
    assert_type(durable.random(), float)
    assert_type(durable.is_replaying(), bool)
    assert_type(durable.current().step, str | None)
    assert_type(durable.current().version, str | None)
    assert_type(durable.patched("gift-wrap"), bool)
    if cents > 100:
        durable.continue_as_new(order_id, cents=0)
    durable.set_progress(1, total=3, file="orders.csv")
    return charge(order_id, cents)


@workflow(version="3", accepts=["1", "2"])
def poll(mailbox: str) -> str:
    if mailbox:
        durable.continue_as_new(mailbox[1:])
    return "done"


assert_type(poll.delay("abc"), DurableResult)


@workflow(bind=True)
def bound(self: Any, order_id: str) -> str:
    return f"{self.request.id} {order_id}"


# --- coroutines


@step(timeout="30s")
async def fetch(url: str, *, tries: int = 1) -> bytes:
    return url.encode()


@step
def size(page: bytes) -> int:
    return len(page)


@workflow(queue="crawl")
async def crawl(urls: list[str], depth: int = 1) -> dict[str, int]:
    pages = await asyncio.gather(*(fetch(url, tries=2) for url in urls))
    assert_type(pages, list[bytes])
    assert_type(await fetch("x"), bytes)
    assert_type(size(pages[0]), int)
    assert_type(await durable.aio.run_step("size", len, pages), int)
    assert_type(await durable.aio.run_step("fetch", fetch.function, "x"), bytes)
    assert_type(await durable.aio.fan_out(fetch, urls), list[bytes])
    assert_type(await durable.aio.fan_out(size, pages), list[int])
    await durable.aio.sleep("1h")
    await durable.aio.get(crawl.delay(urls, depth=2))
    await fetch(42)  # type: ignore[arg-type]
    await durable.aio.run_step("size", len, 42)  # type: ignore[call-overload]
    durable.aio.sleep("1h")  # type: ignore[unused-coroutine]
    fetch("x")  # type: ignore[unused-coroutine]
    return {url: len(page) for url, page in zip(urls, pages, strict=True)}


async def call_it() -> None:
    assert_type(await crawl(["x"]), dict[str, int])


assert_type(crawl.delay(["x"]), DurableResult)
crawl.delay("x")  # type: ignore[arg-type]
crawl.delay(["x"], colour="red")  # type: ignore[call-arg]


# --- calls

assert_type(fulfil("o-42"), Payment)
assert_type(fulfil.delay("o-42", cents=3), DurableResult)
assert_type(fulfil.apply_async(("o-42",), countdown=60), DurableResult)
assert_type(bound.delay("o-42"), DurableResult)
assert_type(fulfil.apply_async(("o-42",), idempotency_key="o-42"), DurableResult)
assert_type(durable.start_many(fulfil, [("o-42", 1), {"order_id": "o-43"}]), list[DurableResult])
assert_type(
    durable.start_many(fulfil.s(1), (("o-42",) for _ in range(3)), chunk=500), list[DurableResult]
)
durable.start_many(fulfil, ["o-42"])  # type: ignore[list-item]
durable.start_many(fulfil, [("o-42",)], size=1)  # type: ignore[call-arg]
fulfil.delay(42)  # type: ignore[arg-type]
fulfil.delay("o-42", colour="red")  # type: ignore[call-arg]
quote.delay()  # type: ignore[call-arg]
bound.delay()  # type: ignore[call-arg]
fulfil.s("o-42") | quote.si(Decimal(1))


def in_a_transaction(session: Session, connection: psycopg.Connection[Any]) -> None:
    assert_type(fulfil.apply_async(("o-42",), transaction=session), DurableResult)
    run = fulfil.apply_async(("o-42",), transaction=connection)
    assert_type(run.send_event("approval", {"ok": True}, transaction=session), str)
    assert_type(durable.send_event(run.id, "approval", transaction=connection), str)
    try:
        fulfil.apply_async(("o-42",), idempotency_key="o-42", idempotency_ttl="1d")
    except durable.IdempotencyConflict as conflict:
        assert_type(conflict.run_id, str)


# --- handles


def look(result: DurableResult) -> None:
    assert_type(result.run().status, str)
    assert_type(result.run().version, str | None)
    assert_type(result.run().passes, int)
    assert_type(result.run().deadline_at, datetime | None)
    assert_type([each.name for each in result.steps()], list[str])
    assert_type(result.cancel("out of stock"), bool)


# --- the base class


@app.task(base=Workflow, name="shop.refund")  # type: ignore[untyped-decorator]  # as all of Celery
def refund(order_id: str) -> Payment:
    return charge(order_id, -1)


class ShopTask(Workflow):
    deadline = "1h"


@workflow(base=ShopTask)
def restock(sku: str) -> None: ...


@workflow(base=int)  # type: ignore[arg-type]
def wrong(sku: str) -> None: ...
