"""Whose data a run has, and that it was erased."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

TIMESTAMP = sa.DateTime(timezone=True)


def upgrade() -> None:
    for column in (
        sa.Column("subject", sa.Text, comment="whose data it has, by a tag of the user's"),
        sa.Column("erased_at", TIMESTAMP, comment="its data was erased; run_actions says by whom"),
    ):
        op.add_column("workflow_runs", column, schema="durable")
    op.create_index(
        "workflow_runs_subject",
        "workflow_runs",
        ["namespace_id", "subject"],
        schema="durable",
        postgresql_where=sa.text("subject IS NOT NULL"),
    )
