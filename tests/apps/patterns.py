"""The example workflows of ``tasks/`` and of the README, whose outside world does as the test says.

The test writes lines into the file next to the journal: ``hold <tab> <call>``
keeps a call from coming back (the file ``held`` then has its process), ``fail <tab> <call>`` has it fail, where ``<call>`` is
how the call's line in the journal begins.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery, shared_task

import durable
from durable import Durable, step, workflow  # noqa: F401 - the README's code uses it
from tasks import services
from tests.apps import settings_from_environment

settings = settings_from_environment()
ORDERS = Path(settings.pop("trace", os.devnull)).with_name("orders")
HELD = ORDERS.with_name("held")
MODULES = (
    "orders",
    "imports",
    "refunds",
    "videos",
    "invoices",
    "storefront",
    "restock",
    "subscriptions",
    "research",
)

app = Celery("patterns", include=[f"tasks.{module}" for module in MODULES])
app.conf.update(settings)
Durable(app)


def ordered(what: str, call: str) -> bool:
    lines = ORDERS.read_text().splitlines() if ORDERS.exists() else []
    orders = [line.split("\t", 1) for line in lines]
    return any(order == what and call.startswith(start) for order, start in orders)


def take_time(name: str, of: str) -> None:
    call = f"{name}\t{of}"
    if ordered("hold", call):
        part = HELD.with_suffix(f".{os.getpid()}")
        part.write_text(f"{os.getpid()}\t{call}")
        part.replace(HELD)
    while ordered("hold", call):
        time.sleep(0.01)
    if ordered("fail", call):
        raise ConnectionError(f"no answer from {name}")


services.take_time = take_time


# --- the README's workflow, as it is printed there, and what it takes for granted

README = Path(__file__).parents[2] / "README.md"


@shared_task
def send_label(order_id: str) -> None:
    services.mail("customer@example.com", f"label for {order_id}")


@step
def inspect(sku: str) -> int:
    services.call("inspect", sku)
    return 100 * len(sku)


@step
def pay_back(order_id: str, cents: int) -> int:
    services.refund(order_id, cents, idempotency_key=durable.idempotency_key())
    return cents


_section = README.read_text(encoding="utf-8").partition("## What a workflow can do")[2]
_code = _section.partition("```python\n")[2].partition("```")[0]
exec(_code)
