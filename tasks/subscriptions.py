"""A renewal that takes the money once and counts it once, whatever dies in between.

Two ways, for two kinds of effect. The payment is outside: the step may run
again, and its key tells the provider that it is the same payment. The
subscription is a row in our own database: ``durable.session()`` makes row and
step one commit, so that even an addition is done exactly once.
"""

from __future__ import annotations

from typing import TypedDict

from sqlalchemy import Column, Integer, MetaData, Table, Text
from sqlalchemy.dialects.postgresql import insert

import durable
from durable import step, workflow
from tasks import services

subscriptions = Table(
    "demo_subscriptions",
    MetaData(),
    Column("id", Text, primary_key=True),
    Column("last_payment", Text, nullable=False),
    Column("months", Integer, nullable=False),
)


class Renewal(TypedDict):
    """What `renew` returns."""

    payment: str
    months: int


@step(max_retries=5)
def charge(subscription_id: str, cents: int) -> str:
    """Charge the card, once for each key; the key is the same on every attempt of this step."""
    return services.charge(subscription_id, cents, idempotency_key=durable.idempotency_key())


@step
def prepare() -> None:
    """Make the table, as a migration would."""
    subscriptions.create(durable.session().connection(), checkfirst=True)


@step
def add_month(subscription_id: str, payment: str) -> int:
    """Add a month to the subscription, new or not; returns its months."""
    row = insert(subscriptions).values(id=subscription_id, last_payment=payment, months=1)
    upsert = row.on_conflict_do_update(
        index_elements=[subscriptions.c.id],
        set_={"last_payment": payment, "months": subscriptions.c.months + 1},
    )
    months = durable.session().execute(upsert.returning(subscriptions.c.months)).scalar_one()
    # Not committed yet: a worker that dies here leaves the subscription as it was.
    services.call("index", subscription_id)
    return int(months)


@workflow
def renew(subscription_id: str, cents: int) -> Renewal:
    """Take the money, then add the month."""
    prepare()
    payment = charge(subscription_id, cents)
    return {"payment": payment, "months": add_month(subscription_id, payment)}
