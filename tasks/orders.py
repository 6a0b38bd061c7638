"""An order, from the order book to the receipt.

Kill the worker anywhere in it: the next one goes on after the last step that
was finished, and no finished step runs again.
"""

from __future__ import annotations

from typing import TypedDict

import durable
from durable import step, workflow
from tasks import services
from tasks.services import Order


class Fulfilment(TypedDict):
    """What `fulfil` returns."""

    payment: str
    parcels: list[str]


@step
def load_order(order_id: str) -> Order:
    """Read it once: the order is the same at every replay, whatever happens to the book."""
    return services.find_order(order_id)


@step
def reserve_stock(order_id: str, sku: str, quantity: int) -> str:
    """Set one article aside."""
    return services.reserve(order_id, sku, quantity)


@step(max_retries=5, retry_backoff=2, retry_backoff_max=120)
def charge(order_id: str, cents: int) -> str:
    """Charge the card once.

    A worker may die between the charge and the commit of this step. The step
    then runs again, under the same key, and the provider recognises it.
    """
    return services.charge(order_id, cents, idempotency_key=durable.idempotency_key())


@step
def ship(order_id: str, sku: str, quantity: int) -> str:
    """Hand one parcel to the carrier."""
    return services.ship(order_id, sku, quantity)


@step
def send_receipt(order_id: str, email: str, payment: str) -> None:
    """Tell the customer."""
    services.mail(email, f"Your order {order_id}: {payment}")


@workflow(deadline="7d")
def fulfil(order_id: str) -> Fulfilment:
    """Reserve, charge, ship and say so.

    This body runs again from the top whenever a worker takes the run up; a
    step that has finished then returns its recorded result at once.
    """
    order = load_order(order_id)
    for line in order["lines"]:
        reserve_stock(order_id, line["sku"], line["quantity"])
    payment = charge(order_id, order["cents"])
    parcels = [ship(order_id, line["sku"], line["quantity"]) for line in order["lines"]]
    send_receipt(order_id, order["email"], payment)
    return {"payment": payment, "parcels": parcels}
