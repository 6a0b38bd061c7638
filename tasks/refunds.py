"""A refund that somebody has to approve: asked level by level, each with a time limit.

While it waits, for two days or for two weeks, the run is a row in Postgres:
no worker, no message, no connection. To decide::

    result.send_event("approval", {"approved": True, "by": "ada"})

or, where only the id is known, ``durable.send_event(run_id, "approval", ...)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import durable
from durable import step, workflow
from tasks import services

LEVELS = ("team-lead@example.com", "head-of-sales@example.com")


@dataclass(frozen=True)
class Decision:
    """What the event ``approval`` has to say; other payloads are put aside, the wait goes on.

    Checking it takes pydantic. Without it, give ``schema=`` a function that
    returns the decision or raises ValueError.
    """

    approved: bool
    by: str


class Refund(TypedDict):
    """What `refund` returns."""

    approved: bool
    by: str
    refund: str | None


@step
def ask_for_approval(approver: str, order_id: str, cents: int) -> None:
    """Tell one person that a decision is wanted."""
    services.mail(approver, f"refund {cents / 100:.2f} of order {order_id}?")


@step
def pay_back(order_id: str, cents: int) -> str:
    """Pay once, also if the worker dies before this step is recorded."""
    return services.refund(order_id, cents, idempotency_key=durable.idempotency_key())


@workflow
def refund(
    order_id: str, cents: int, approvers: Sequence[str] = LEVELS, patience: float | str = "48h"
) -> Refund:
    """Pay back what was approved in time; without an answer nothing is paid."""
    decision = decide(order_id, cents, approvers, patience)
    number = pay_back(order_id, cents) if decision.approved else None
    return {"approved": decision.approved, "by": decision.by, "refund": number}


def decide(order_id: str, cents: int, approvers: Sequence[str], patience: float | str) -> Decision:
    """Ask one after the other. Whoever answers while the run waits decides, also the first one."""
    for approver in approvers:
        ask_for_approval(approver, order_id, cents)
        try:
            decision: Decision = durable.wait_for_event(
                "approval", timeout=patience, schema=Decision
            )
        except durable.EventTimeout:
            continue
        return decision
    return Decision(approved=False, by="nobody answered in time")
