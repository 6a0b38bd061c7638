"""Runs that have something to undo if they fail or are canceled."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column(
        "workflow_runs",
        sa.Column(
            "compensates",
            sa.Boolean,
            nullable=False,
            server_default=sa.false(),
            comment="it has something to undo: a worker has to do so before it is canceled",
        ),
        schema="durable",
    )
