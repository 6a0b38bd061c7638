"""A run that starts other runs: it waits for some of them, and not for another.

Children are runs of their own, on any worker, with their own history. ``.get()``
parks the parent until the child has ended; the child's result is written into
the parent's history in the very commit that ends the child.
"""

from __future__ import annotations

from typing import TypedDict

import durable
from durable import step, workflow
from tasks import services
from tasks.services import NotInTheCatalogue


class Restocked(TypedDict):
    """What `restock` returns."""

    orders: dict[str, str]
    unavailable: dict[str, str]
    stocktaking: str


@step
def order_from_supplier(sku: str, quantity: int) -> str:
    """Order one article; returns the order's number."""
    return services.order_from_supplier(sku, quantity, idempotency_key=durable.idempotency_key())


@step
def confirm(sku: str, order: str) -> None:
    """Tell the warehouse what is on its way."""
    services.mail("warehouse@example.com", f"{sku}: {order}")


@step
def count_shelves(warehouse: str) -> int:
    """Count, which takes long."""
    return services.count_shelves(warehouse)


@workflow
def order_article(sku: str, quantity: int) -> str:
    """The child: order one article."""
    order = order_from_supplier(sku, quantity)
    confirm(sku, order)
    return order


@workflow
def take_stock(warehouse: str) -> int:
    """Another child, which nobody waits for."""
    return count_shelves(warehouse)


@workflow
def restock(wanted: dict[str, int], warehouse: str = "north") -> Restocked:
    """The parent: start all, wait for the orders, report."""
    started = {sku: order_article.delay(sku, quantity) for sku, quantity in wanted.items()}
    stocktaking = take_stock.delay(warehouse)  # goes on when this run has ended
    orders: dict[str, str] = {}
    unavailable: dict[str, str] = {}
    for sku, child in started.items():
        try:
            orders[sku] = child.get()
        except NotInTheCatalogue as exc:  # a child's error arrives as what it is
            unavailable[sku] = str(exc)
    return {"orders": orders, "unavailable": unavailable, "stocktaking": str(stocktaking.id)}
