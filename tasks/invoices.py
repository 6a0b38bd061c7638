"""An invoice in another currency, by a service that is sometimes down.

The circuit breaker is shared by all workers. After three failures in a row,
wherever they happened, nobody calls the service any more: the runs park. When
30 seconds are over exactly one of them tries, and if that went well all go on.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TypedDict

import durable
from durable import step, workflow
from tasks import services

exchange = durable.CircuitBreaker("exchange-rates", failure_threshold=3, reset_timeout="30s")


class Invoice(TypedDict):
    """What `send_invoice` returns."""

    order_id: str
    amount: str


# A refused call uses one of the step's retries, as any failed attempt does. Ten
# of them are an outage of five minutes at least; None would wait without end.
@step(max_retries=10, retry_backoff_max="1m", timeout="10s")
@exchange
def exchange_rate(currency: str) -> Decimal:
    """Ask for today's rate."""
    return services.exchange_rate(currency)


@step
def send(order_id: str, amount: str) -> None:
    """Mail the invoice."""
    services.mail("customer@example.com", f"invoice of {order_id}: {amount}")


@workflow
def send_invoice(order_id: str, cents: int, currency: str) -> Invoice:
    """Convert and send."""
    amount = f"{cents * exchange_rate(currency) / 100:.2f} {currency}"
    send(order_id, amount)
    return {"order_id": order_id, "amount": amount}
