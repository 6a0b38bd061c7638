"""How a woken run gets ahead of a backlog of new ones, where the broker has priorities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from durable._accept import AUTO, HIGHEST_PRIORITY, OFF

# RabbitMQ takes what is over a queue's x-max-priority for that, and ignores
# priorities where a queue has none; so its highest needs no look at the queue.
# Redis has a list for each step of priority, and reads them from 0 on; a
# message without a priority is in the first.
_HIGHEST = {"amqp": HIGHEST_PRIORITY, "redis": 0}
_MORE_URGENT: dict[str, Callable[[int, int], int]] = {"amqp": max, "redis": min}


def ahead(options: Mapping[str, Any], wish: int | str, driver: str) -> Mapping[str, Any]:
    """Return the options of a woken run's message; its own priority counts if more urgent.

    Args:
        options: of the run's first message.
        wish: ``durable_wake_priority``.
        driver: kind of the broker.

    Example:
        >>> ahead({"queue": "orders", "priority": 3}, "auto", "amqp")
        {'queue': 'orders', 'priority': 255}
        >>> ahead({"queue": "orders", "priority": 3}, 6, "redis")
        {'queue': 'orders', 'priority': 3}
        >>> ahead({"queue": "orders"}, "auto", "filesystem")
        {'queue': 'orders'}
    """
    priority = _HIGHEST.get(driver) if wish == AUTO else wish
    if priority is None or priority == OFF:
        return options
    own = options.get("priority")
    if own is not None and driver in _MORE_URGENT:
        priority = _MORE_URGENT[driver](int(own), int(priority))
    return {**options, "priority": int(priority)}
