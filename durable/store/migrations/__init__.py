"""Alembic migrations of the schema ``durable``."""
