"""Example workflows. ``docs/patterns.md`` walks through them.

===============  =========================================================
`orders`         an order, from the order book to the receipt
`imports`        a file into a table, batch by batch, with progress
`refunds`        an approval with time limit and escalation
`videos`         polling with exponential back-off
`invoices`       a circuit breaker
`storefront`     optional parts: degraded, and said so
`restock`        a parent and its children
`subscriptions`  idempotency: a payment, and an upsert
`research`       a language model with tools, and an editor's approval
===============  =========================================================

`services` and `model` stand for the outside world.
"""
