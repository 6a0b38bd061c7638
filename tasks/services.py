"""Stand-ins for what a shop calls: order book, warehouse, payments, carrier, mail.

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
from pathlib import Path
from typing import TypedDict

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
    if _journal() and not asked_before:
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


def call(name: str, of: str) -> None:
    """Leave a line in the journal, then take the time that a call takes."""
    _note(name, of)
    time.sleep(float(os.environ.get("SHOP_PAUSE", "0")))


def calls(name: str, of: str) -> int:
    """How often the journal has this call."""
    journal = _journal()
    if journal is None or not journal.exists():
        return 0
    return journal.read_text(encoding="utf-8").splitlines().count(f"{name}\t{of}")


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
