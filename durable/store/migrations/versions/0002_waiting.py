"""Events, children, fan-out: what a run can wait for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0002"
down_revision = "0001"

NOW = sa.text("now()")
TIMESTAMP = sa.DateTime(timezone=True)

# Whatever a run waits for wakes it in this way: by primary key alone, raising
# `wake`. A waker that asked for status = 'waiting' in its WHERE would match
# nothing beside an uncommitted park, and the wake-up would be lost. As it is,
# it waits for the park's row lock and finds the run parked; or the park comes
# second, sees another `wake` than at its claim, and does not park.
_WAKE = """
CREATE FUNCTION durable.wake(run uuid) RETURNS void LANGUAGE sql AS $$
    UPDATE durable.workflow_runs
       SET wake = wake + 1,
           available_at = CASE WHEN status = 'waiting' AND NOT held THEN now()
                               ELSE available_at END,
           status = CASE WHEN status = 'waiting' AND NOT held THEN 'pending' ELSE status END
     WHERE id = run AND status NOT IN ('succeeded', 'failed', 'canceled')
    RETURNING CASE WHEN status = 'pending' THEN pg_notify('durable', namespace_id) END
$$
"""

# The outcome of a task goes into the history of the run that started it, once.
# Sender and waiter meet at one row, keyed by the task's id. Whoever comes
# second waits at the primary key for the first to commit: a waiter then finds
# the outcome, a sender finds that it is awaited and wakes the run.
_DELIVER = """
CREATE FUNCTION durable.deliver(
    run uuid, task text, task_name text, outcome text, value json, failure json, why text
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    awaited boolean;
BEGIN
    INSERT INTO durable.step_attempts AS s
           (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output, error,
            context, completed_at)
    SELECT run, task, 0, 'result', 1, 'result',
           CASE WHEN outcome = 'succeeded' THEN 'succeeded' ELSE 'failed' END, value, failure,
           jsonb_build_object('task', task_name, 'outcome', outcome, 'reason', why), now()
      FROM durable.workflow_runs
     WHERE id = run AND status NOT IN ('succeeded', 'failed', 'canceled')
    ON CONFLICT (workflow_run_id, ordinal, attempt, set_aside, branch, step_name) DO UPDATE
       SET status = excluded.status, output = excluded.output, error = excluded.error,
           context = excluded.context, completed_at = excluded.completed_at
     WHERE s.status = 'running'
    RETURNING s.config ? 'awaited' INTO awaited;
    IF awaited THEN
        PERFORM durable.wake(run);
    END IF;
END $$
"""

# In the commit that ends a child, whichever way it ends: by its worker, a
# deadline, a cancel, a take-over. The shards keep thousands of ends from
# queuing for one row; a shard's last end counts the shard off, under the lock
# of the row that says how many are left, so that two last ends see each other.
_CHILD_ENDED = """
CREATE FUNCTION durable.on_child_end() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    shards_left integer;
    open_items integer;
    stops boolean;
BEGIN
    IF NEW.reports THEN
        PERFORM durable.deliver(NEW.parent_run_id, NEW.id::text, NEW.workflow_name, NEW.status,
                                CASE WHEN NEW.status = 'succeeded' THEN NEW.output END,
                                CASE WHEN NEW.status = 'failed' THEN NEW.error END, NEW.reason);
    END IF;
    IF NEW.fan_out_id IS NULL THEN
        RETURN NULL;
    END IF;
    UPDATE durable.workflow_runs
       SET held = false, status = 'pending', available_at = now()
     WHERE id = (SELECT id FROM durable.workflow_runs
                  WHERE fan_out_id = NEW.fan_out_id AND held
                  ORDER BY fan_index LIMIT 1 FOR UPDATE SKIP LOCKED);
    IF FOUND THEN
        PERFORM pg_notify('durable', NEW.namespace_id);
    END IF;
    UPDATE durable.fan_outs SET remaining = remaining - 1
     WHERE id = NEW.fan_out_id AND shard = NEW.fan_index % 16
    RETURNING remaining, stop_at_first INTO open_items, stops;
    IF open_items = 0 THEN
        UPDATE durable.fan_outs SET remaining = remaining - 1
         WHERE id = NEW.fan_out_id AND shard = -1
        RETURNING remaining INTO shards_left;
    END IF;
    IF shards_left = 0 OR (stops AND NEW.status <> 'succeeded') THEN
        PERFORM durable.wake(NEW.parent_run_id);
    END IF;
    RETURN NULL;
END $$
"""

_TRIGGER = """
CREATE TRIGGER child_ended AFTER UPDATE OF status ON durable.workflow_runs
FOR EACH ROW
WHEN (NEW.parent_run_id IS NOT NULL
      AND NEW.completed_at IS NOT NULL AND OLD.completed_at IS NULL)
EXECUTE FUNCTION durable.on_child_end()
"""


def upgrade() -> None:
    for column in (
        sa.Column("parent_run_id", pg.UUID),
        sa.Column("on_parent_cancel", sa.Text, comment="abandon (as NULL) or cancel"),
        sa.Column("fan_out_id", pg.UUID),
        sa.Column("fan_index", sa.Integer, comment="position among the items, from 0"),
        sa.Column(
            "reports",
            sa.Boolean,
            nullable=False,
            server_default=sa.false(),
            comment="its outcome goes into the parent's history",
        ),
        sa.Column(
            "held",
            sa.Boolean,
            nullable=False,
            server_default=sa.false(),
            comment="an item over max_concurrency",
        ),
    ):
        op.add_column("workflow_runs", column, schema="durable")
    op.create_index(
        "workflow_runs_children",
        "workflow_runs",
        ["parent_run_id", "fan_out_id"],
        schema="durable",
        postgresql_where=sa.text("parent_run_id IS NOT NULL"),
    )
    op.create_index(
        "workflow_runs_held",
        "workflow_runs",
        ["fan_out_id", "fan_index"],
        schema="durable",
        postgresql_where=sa.text("held"),
    )
    op.add_column(
        "step_attempts",
        sa.Column("due_at", TIMESTAMP, comment="end of a sleep, or of a wait with a timeout"),
        schema="durable",
    )
    op.create_table(
        "workflow_events",
        sa.Column("id", pg.UUID, primary_key=True, server_default=sa.text("gen_random_uuid()")),
        sa.Column("seq", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("namespace_id", sa.Text, nullable=False),
        sa.Column(
            "workflow_run_id",
            pg.UUID,
            sa.ForeignKey("durable.workflow_runs.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("event_type", sa.Text, nullable=False),
        sa.Column("payload", pg.JSON, nullable=False),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("received_at", TIMESTAMP, nullable=False, server_default=NOW),
        sa.Column("consumed_at", TIMESTAMP),
        sa.Column("consumed_branch", sa.Text),
        sa.Column("consumed_ordinal", sa.Integer),
        sa.Column("error", sa.Text, comment="why its payload was refused by the wait's schema"),
        schema="durable",
    )
    op.create_index(
        "workflow_events_key",
        "workflow_events",
        ["workflow_run_id", "idempotency_key"],
        unique=True,
        schema="durable",
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index(
        "workflow_events_run",
        "workflow_events",
        ["workflow_run_id", "event_type", "seq"],
        schema="durable",
    )
    op.create_table(
        "fan_outs",
        sa.Column("id", pg.UUID, primary_key=True),
        sa.Column("shard", sa.SmallInteger, primary_key=True, comment="-1: counts the shards"),
        sa.Column(
            "workflow_run_id",
            pg.UUID,
            sa.ForeignKey("durable.workflow_runs.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("remaining", sa.Integer, nullable=False),
        sa.Column("stop_at_first", sa.Boolean, nullable=False),
        schema="durable",
    )
    op.create_index("fan_outs_run", "fan_outs", ["workflow_run_id"], schema="durable")
    for statement in (_WAKE, _DELIVER, _CHILD_ENDED, _TRIGGER):
        op.execute(statement)
