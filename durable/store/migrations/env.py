"""Alembic's entry: on the connection that ``store.migrate`` opened and locked, or as text."""

from __future__ import annotations

from alembic import context

from durable.store.schema import SCHEMA, metadata

context.configure(
    connection=context.config.attributes.get("connection"),
    dialect_name="postgresql",
    target_metadata=metadata,
    version_table_schema=SCHEMA,
    include_schemas=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
