"""Versions that workers have, messages handed back, passes of a run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column(
        "workers",
        sa.Column(
            "versions",
            pg.ARRAY(sa.Text),
            nullable=False,
            server_default="{}",
            comment="name@version of each version that it runs",
        ),
        schema="durable",
    )
    op.add_column(
        "workflow_runs",
        sa.Column(
            "passes",
            sa.Integer,
            nullable=False,
            server_default="0",
            comment="how often continue_as_new began it anew",
        ),
        schema="durable",
    )
    op.add_column(
        "workflow_runs",
        sa.Column(
            "handed_back",
            sa.Integer,
            nullable=False,
            server_default="0",
            comment="messages since the last claim that workers without the code got",
        ),
        schema="durable",
    )
