"""Runs, step attempts, workers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0001"
down_revision = None

NOW = sa.text("now()")
TIMESTAMP = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "workflow_runs",
        sa.Column("id", pg.UUID, primary_key=True, server_default=sa.text("gen_random_uuid()")),
        sa.Column("namespace_id", sa.Text, nullable=False, server_default="default"),
        sa.Column("workflow_name", sa.Text, nullable=False),
        sa.Column("version", sa.Text),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("worker_id", sa.Text, comment="worker of the last claim; stays after the end"),
        sa.Column("config", pg.JSONB, nullable=False, server_default="{}"),
        sa.Column("context", pg.JSONB),
        sa.Column("input", pg.JSON, comment='{"args": [...], "kwargs": {...}}'),
        sa.Column("output", pg.JSON),
        sa.Column("error", pg.JSON),
        sa.Column("available_at", TIMESTAMP, nullable=False, server_default=NOW),
        sa.Column("deadline_at", TIMESTAMP),
        sa.Column("created_at", TIMESTAMP, nullable=False, server_default=NOW),
        sa.Column("completed_at", TIMESTAMP),
        sa.Column("started_at", TIMESTAMP, comment="first claim"),
        sa.Column("claimed_at", TIMESTAMP, comment="latest claim"),
        sa.Column("expires_at", TIMESTAMP, comment="dropped if not claimed by then"),
        sa.Column("attempt", sa.Integer, nullable=False, server_default="0", comment="the fence"),
        sa.Column(
            "wake", sa.Integer, nullable=False, server_default="0", comment="wake-ups so far"
        ),
        sa.Column("rung", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("rung_at", TIMESTAMP, comment="first message since it was last woken"),
        sa.Column("tail", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("queue", sa.Text),
        sa.Column("message", pg.JSON, comment="publish options, canvas included"),
        sa.Column("child_pid", sa.Integer),
        sa.Column("retries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("recoveries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("generation", sa.Integer, nullable=False, server_default="0"),
        sa.Column("control", sa.Text, comment="asked of a running run: cancel"),
        sa.Column("reason", sa.Text, comment="why it is parked, paused or ended from outside"),
        sa.Column("progress", pg.JSON),
        sa.CheckConstraint(
            "status IN ('pending', 'running', 'sleeping', 'waiting', 'paused',"
            " 'succeeded', 'failed', 'canceled')",
            name="workflow_runs_status",
        ),
        schema="durable",
    )
    op.create_index(
        "workflow_runs_due",
        "workflow_runs",
        ["namespace_id", "rung", "available_at"],
        schema="durable",
        postgresql_where=sa.text("available_at < 'infinity'"),
    )
    op.create_index(
        "workflow_runs_running",
        "workflow_runs",
        ["worker_id"],
        schema="durable",
        postgresql_where=sa.text("status = 'running'"),
    )
    op.create_table(
        "step_attempts",
        sa.Column("workflow_run_id", pg.UUID, nullable=False),
        sa.Column("id", pg.UUID, nullable=False, server_default=sa.text("gen_random_uuid()")),
        sa.Column("created_at", TIMESTAMP, nullable=False, server_default=NOW),
        sa.Column("completed_at", TIMESTAMP),
        sa.Column("ordinal", sa.Integer, nullable=False, comment="position in the branch"),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column(
            "set_aside",
            sa.SmallInteger,
            nullable=False,
            server_default="0",
            comment="0: counts; else the generation that discarded it",
        ),
        sa.Column("branch", sa.Text, nullable=False, server_default=""),
        sa.Column("step_name", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("config", pg.JSONB, nullable=False, server_default="{}"),
        sa.Column("context", pg.JSONB),
        sa.Column("output", pg.JSON),
        sa.Column("error", pg.JSON),
        sa.PrimaryKeyConstraint(
            "workflow_run_id", "ordinal", "attempt", "set_aside", "branch", "step_name"
        ),
        schema="durable",
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text, primary_key=True, comment="host name and incarnation"),
        sa.Column("namespace_id", sa.Text, nullable=False),
        sa.Column("hostname", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("concurrency", sa.Integer, nullable=False),
        sa.Column("queues", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("workflows", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("beat", sa.BigInteger, nullable=False),
        sa.Column("free_slots", sa.Integer, nullable=False),
        sa.Column(
            "idle_beats", sa.Integer, nullable=False, comment="beats in a row with a free slot"
        ),
        sa.Column("started_at", TIMESTAMP, nullable=False, server_default=NOW),
        sa.Column("beat_at", TIMESTAMP, nullable=False, server_default=NOW),
        schema="durable",
    )
    op.create_table(
        "schema_info",
        sa.Column("min_code_version", sa.Integer, primary_key=True, autoincrement=False),
        schema="durable",
    )
    op.execute("INSERT INTO durable.schema_info VALUES (1)")
    # Deleting runs deletes their steps: what a foreign key with ON DELETE
    # CASCADE would do, without its price on every insert of a step.
    op.execute("""
        CREATE FUNCTION durable.delete_steps_of_deleted_runs() RETURNS trigger
        LANGUAGE plpgsql AS $$
        BEGIN
            DELETE FROM durable.step_attempts s USING deleted d WHERE s.workflow_run_id = d.id;
            RETURN NULL;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER delete_steps AFTER DELETE ON durable.workflow_runs
        REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT
        EXECUTE FUNCTION durable.delete_steps_of_deleted_runs()
    """)
