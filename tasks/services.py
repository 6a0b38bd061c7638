"""Stand-ins for what a shop calls: order book, payments, suppliers, carrier, mail and so on.

Two environment variables make the calls visible, for ``make demo`` and for tests:

- ``SHOP_JOURNAL``, a file: each call first leaves a line ``<call> <tab> <of what>``
  there. It is outside the database on purpose: what was called stays called,
  whatever happens to the caller.
- ``SHOP_PAUSE``, seconds: how long each call takes.
"""

from __future__ import annotations

import os
import time
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Literal, TypedDict

import durable


class Line(TypedDict):
    """So many of one article."""

    sku: str
    quantity: int


class Order(TypedDict):
    """What the order book knows."""

    email: str
    cents: int
    lines: list[Line]


class CardNetworkBusy(durable.TransientError):
    """The card network asks to try again; nothing was charged."""


class NotInTheCatalogue(durable.PermanentError):
    """No supplier has the article, and no further attempt will change that."""


def find_order(order_id: str) -> Order:
    """Look an order up. Every order of this shop is the same."""
    call("find_order", order_id)
    return {
        "email": "ada@example.com",
        "cents": 12_840,
        "lines": [
            {"sku": "mug", "quantity": 2},
            {"sku": "teapot", "quantity": 1},
            {"sku": "tea", "quantity": 6},
            {"sku": "sugar", "quantity": 1},
        ],
    }


def reserve(order_id: str, sku: str, quantity: int) -> str:
    """Set stock aside; returns the shelf."""
    call("reserve", f"{order_id} {quantity} x {sku}")
    return f"shelf-{_number(sku) % 100}"


def charge(order_id: str, cents: int, *, idempotency_key: str) -> str:
    """Charge the card; returns the payment's number.

    As good payment providers do, this one charges once for each
    ``idempotency_key``, however often it is asked. While a journal is kept,
    the first call for an order is refused, so that a retry can be seen.
    """
    asked_before = calls("charge", order_id)
    call("charge", order_id)
    if keeps_journal() and not asked_before:
        raise CardNetworkBusy("the card network is busy, try again")
    if not calls("money taken", idempotency_key):
        _note("money taken", idempotency_key)
    return f"payment-{_number(idempotency_key)} over {cents / 100:.2f}"


def ship(order_id: str, sku: str, quantity: int) -> str:
    """Hand a parcel to the carrier; returns its number."""
    call("ship", f"{order_id} {quantity} x {sku}")
    return f"parcel-{_number(order_id + sku)}"


def mail(address: str, subject: str) -> None:
    """Send a mail."""
    call("mail", f"{address}: {subject}")


def refund(order_id: str, cents: int, *, idempotency_key: str) -> str:
    """Pay money back, once for each ``idempotency_key``; returns the refund's number."""
    call("refund", f"{order_id} {cents / 100:.2f}")
    return f"refund-{_number(idempotency_key)}"


def start_encoding(video: str, *, idempotency_key: str) -> str:
    """Give a video to the encoder; returns its job, the same for the same key."""
    call("start_encoding", video)
    return f"job-{_number(idempotency_key)}"


def encoding_state(job: str) -> Literal["running", "done"]:
    """Ask the encoder. While a journal is kept, it is done when it is asked for the third time."""
    call("encoding_state", job)
    return "running" if keeps_journal() and calls("encoding_state", job) < 3 else "done"  # noqa: PLR2004


def exchange_rate(currency: str) -> Decimal:
    """What a euro is worth today."""
    call("exchange_rate", currency)
    return {"USD": Decimal("1.08"), "GBP": Decimal("0.85")}[currency]


def price(sku: str) -> int:
    """Price of an article, in cents."""
    call("price", sku)
    return 100 + _number(sku) % 5_000


def reviews(sku: str) -> list[str]:
    """What customers say about an article."""
    call("reviews", sku)
    return [f"Best {sku} ever."]


def recommendations(sku: str) -> list[str]:
    """What else to buy."""
    call("recommendations", sku)
    return [f"{sku} deluxe", f"{sku} cosy"]


def order_from_supplier(sku: str, quantity: int, *, idempotency_key: str) -> str:
    """Order an article; returns the order's number."""
    call("order_from_supplier", f"{quantity} x {sku}")
    if sku == "unicorn":
        raise NotInTheCatalogue(f"no supplier has a {sku}")
    return f"order-{_number(idempotency_key)}"


def count_shelves(warehouse: str) -> int:
    """Have everything counted."""
    call("count_shelves", warehouse)
    return _number(warehouse) % 1_000


def call(name: str, of: str) -> None:
    """Leave a line in the journal, then take the time that a call takes."""
    _note(name, of)
    take_time(name, of)


def take_time(name: str, of: str) -> None:  # noqa: ARG001 - tests look at what is called
    """Sleep as long as ``SHOP_PAUSE`` says. Tests put something of their own here."""
    time.sleep(float(os.environ.get("SHOP_PAUSE", "0")))


def calls(name: str, of: str) -> int:
    """How often the journal has this call."""
    journal = _journal()
    if journal is None or not journal.exists():
        return 0
    return journal.read_text(encoding="utf-8").splitlines().count(f"{name}\t{of}")


def keeps_journal() -> bool:
    """Whether somebody looks: then there is trouble to be seen, too."""
    return _journal() is not None


def _note(name: str, of: str) -> None:
    journal = _journal()
    if journal is not None:
        # One write to a file opened for appending: processes do not mix lines.
        with journal.open("a", encoding="utf-8") as file:
            file.write(f"{name}\t{of}\n")


def _journal() -> Path | None:
    name = os.environ.get("SHOP_JOURNAL")
    return Path(name) if name else None


def _number(text: str) -> int:
    return zlib.crc32(text.encode()) % 1_000_000
