"""A product page that is published even if parts of it cannot be had.

The price has to be there. Reviews and recommendations are tried, and tried once
more; then the page goes without, and the result says what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypedDict

import durable
from durable import step, workflow
from tasks import services

logger = logging.getLogger(__name__)


class Page(TypedDict):
    """What `publish_page` returns. ``degraded`` names what the page goes without."""

    sku: str
    cents: int
    reviews: list[str]
    recommendations: list[str]
    degraded: list[str]


@step
def price(sku: str) -> int:
    """Needed: if it fails for good, so does the run."""
    return services.price(sku)


@step(max_retries=1, retry_backoff=0.2)
def reviews(sku: str) -> list[str]:
    """Optional."""
    return services.reviews(sku)


@step(max_retries=1, retry_backoff=0.2)
def recommendations(sku: str) -> list[str]:
    """Optional."""
    return services.recommendations(sku)


@step
def publish(page: Page) -> None:
    """Put it online."""
    services.call("publish", page["sku"])


@workflow
def publish_page(sku: str) -> Page:
    """Collect what there is, and publish it."""
    degraded: list[str] = []
    page: Page = {
        "sku": sku,
        "cents": price(sku),
        "reviews": optional("reviews", reviews, sku, degraded),
        "recommendations": optional("recommendations", recommendations, sku, degraded),
        "degraded": degraded,
    }
    publish(page)
    return page


def optional(
    name: str, get: Callable[[str], list[str]], sku: str, degraded: list[str]
) -> list[str]:
    """What a step returns, or nothing and a note of it.

    That a step has failed for good is recorded as a result is: on a replay it
    fails in the same way, at once, and the run takes the same path.
    """
    try:
        return get(sku)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the page can do without
        if not durable.is_replaying():
            logger.warning("the page of %s goes without %s: %s", sku, name, exc)
        degraded.append(name)
        return []
