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
# the outcome, a sender finds that it is awaited and wakes the run. A failure
# wakes it in any case: what it waits for may come after that task in a chain.
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
     WHERE id = run  -- also one that has ended: it may be restarted
    ON CONFLICT (workflow_run_id, ordinal, attempt, set_aside, branch, step_name) DO UPDATE
       SET status = excluded.status, output = excluded.output, error = excluded.error,
           context = excluded.context, completed_at = excluded.completed_at
     WHERE s.status = 'running'
    RETURNING coalesce(s.config ? 'awaited', false) OR outcome <> 'succeeded' INTO awaited;
    IF awaited THEN
        PERFORM durable.wake(run);
    END IF;
END $$
"""

# In the commit that ends a child, whichever way it ends: by its worker, a
# deadline, a cancel, a take-over. Of a fan-out it takes locks in one order:
# the child's row, which the caller has, a held item, the child's shard, the
# whole (shard -1), the parent. The parent's own statements lock none of these
# while they hold its row, so nobody waits in a circle.
#   Sixteen shards keep thousands of ends from queuing for one row; a shard's
# last end counts the shard off, under the lock of the row that says how many
# are left, so that two last ends see each other.
#   With a canceled parent its fan-out has stopped too, for a restart to see.
# Nothing is counted and nothing waited for: the cascade cancels many items in
# one commit, and would lock their shards in any order.
#   Once a fan-out has stopped, its ends change nothing: no more items start,
# and the parent was woken by the failure that stopped it. Of two failures at
# once the second waits for the first, and finds the fan-out stopped.
#   Each end of an item that had been started starts one that is held. SKIP
# LOCKED has two ends start two items without waiting; where it finds none, the
# plain lock looks again at those that others have locked, since a transaction
# that comes to nothing would otherwise leave its item held for ever.
_CHILD_ENDED = """
CREATE FUNCTION durable.on_child_end() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    whole durable.fan_outs;
    next_item uuid;
    items_left integer;
    shards_left integer;
BEGIN
    IF NEW.reports THEN
        PERFORM durable.deliver(NEW.parent_run_id, NEW.id::text, NEW.workflow_name, NEW.status,
                                CASE WHEN NEW.status = 'succeeded' THEN NEW.output END,
                                CASE WHEN NEW.status = 'failed' THEN NEW.error END, NEW.reason);
    END IF;
    IF NEW.fan_out_id IS NULL THEN
        RETURN NULL;
    END IF;
    IF NEW.status <> 'succeeded' AND EXISTS (
        SELECT FROM durable.workflow_runs
         WHERE id = NEW.parent_run_id AND status = 'canceled') THEN
        UPDATE durable.fan_outs SET stopped_by = NEW.fan_index
         WHERE shard = -1 AND id = (
               SELECT id FROM durable.fan_outs
                WHERE id = NEW.fan_out_id AND shard = -1 AND stopped_by IS NULL
                  FOR UPDATE SKIP LOCKED);
        RETURN NULL;
    END IF;
    SELECT * INTO whole FROM durable.fan_outs WHERE id = NEW.fan_out_id AND shard = -1;
    IF NOT FOUND OR whole.stopped_by IS NOT NULL THEN
        RETURN NULL;
    END IF;
    IF whole.stop_at_first AND NEW.status <> 'succeeded' THEN
        UPDATE durable.fan_outs SET stopped_by = NEW.fan_index
         WHERE id = NEW.fan_out_id AND shard = -1 AND stopped_by IS NULL;
        IF FOUND THEN
            PERFORM durable.wake(NEW.parent_run_id);
        END IF;
        RETURN NULL;
    END IF;
    IF whole.limited AND NOT OLD.held THEN
        SELECT id INTO next_item FROM durable.workflow_runs
         WHERE fan_out_id = NEW.fan_out_id AND held AND status = 'waiting'
         ORDER BY fan_index LIMIT 1 FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            SELECT id INTO next_item FROM durable.workflow_runs
             WHERE fan_out_id = NEW.fan_out_id AND held AND status = 'waiting'
             ORDER BY fan_index LIMIT 1 FOR UPDATE;
        END IF;
        IF FOUND THEN
            UPDATE durable.workflow_runs
               SET held = false, status = 'pending', available_at = now()
             WHERE id = next_item;
            PERFORM pg_notify('durable', NEW.namespace_id);
        END IF;
    END IF;
    UPDATE durable.fan_outs SET remaining = remaining - 1
     WHERE id = NEW.fan_out_id AND shard = NEW.fan_index % 16
    RETURNING remaining INTO items_left;
    IF items_left = 0 THEN
        UPDATE durable.fan_outs SET remaining = remaining - 1
         WHERE id = NEW.fan_out_id AND shard = -1
        RETURNING remaining INTO shards_left;
        IF shards_left = 0 THEN
            PERFORM durable.wake(NEW.parent_run_id);
        END IF;
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

# An item that had ended and was restarted by somebody is awaited again, unless
# its fan-out is settled or has stopped: the end was counted, and so will be the
# next one. The same locks in the same order.
_CHILD_AGAIN = """
CREATE FUNCTION durable.on_child_again() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    items_left integer;
BEGIN
    UPDATE durable.fan_outs SET remaining = remaining + 1
     WHERE id = NEW.fan_out_id AND shard = NEW.fan_index % 16
    RETURNING remaining INTO items_left;
    IF items_left = 1 THEN
        UPDATE durable.fan_outs SET remaining = remaining + 1
         WHERE id = NEW.fan_out_id AND shard = -1;
    END IF;
    RETURN NULL;
END $$
"""

_AGAIN_TRIGGER = """
CREATE TRIGGER child_again AFTER UPDATE OF status ON durable.workflow_runs
FOR EACH ROW
WHEN (NEW.fan_out_id IS NOT NULL AND NEW.completed_at IS NULL AND OLD.completed_at IS NOT NULL)
EXECUTE FUNCTION durable.on_child_again()
"""

# A canceled run takes its tied children along, by `store.cascade`, which comes
# after this commit. The mark is set in it: whoever dies in between, a
# dispatcher goes on.
_CANCELED = """
CREATE FUNCTION durable.on_cancel() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE durable.workflow_runs SET cascades = true
     WHERE id = NEW.id AND EXISTS (
           SELECT FROM durable.workflow_runs child
            WHERE child.parent_run_id = NEW.id AND child.on_parent_cancel = 'cancel'
              AND child.completed_at IS NULL);
    IF FOUND THEN
        PERFORM pg_notify('durable', NEW.namespace_id);
    END IF;
    RETURN NULL;
END $$
"""

_CANCELED_TRIGGER = """
CREATE TRIGGER canceled AFTER UPDATE OF status ON durable.workflow_runs
FOR EACH ROW
WHEN (NEW.status = 'canceled' AND OLD.status <> 'canceled')
EXECUTE FUNCTION durable.on_cancel()
"""

# A tied child that is being started while its parent is canceled. The lock has
# one of the two see the other: the parent's end waits for it and, with a fresh
# snapshot in the trigger above, finds the child; or the child waits, and finds
# its parent canceled. Items of a fan-out do without: the statement that inserts
# them has locked their parent, and inserts none unless that runs.
_TIED = """
CREATE FUNCTION durable.on_tied_start() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    parent_status text;
BEGIN
    SELECT status INTO parent_status FROM durable.workflow_runs
     WHERE id = NEW.parent_run_id FOR SHARE;
    IF parent_status = 'canceled' THEN
        NEW.status = 'canceled';
        NEW.reason = 'its parent was canceled';
        NEW.completed_at = now();
        NEW.held = false;
        NEW.rung = false;
        NEW.available_at = CASE WHEN NEW.tail THEN now() ELSE 'infinity' END;
    END IF;
    RETURN NEW;
END $$
"""

_TIED_TRIGGER = """
CREATE TRIGGER tied_start BEFORE INSERT ON durable.workflow_runs
FOR EACH ROW
WHEN (NEW.on_parent_cancel = 'cancel' AND NEW.fan_out_id IS NULL)
EXECUTE FUNCTION durable.on_tied_start()
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
        sa.Column(
            "cascades",
            sa.Boolean,
            nullable=False,
            server_default=sa.false(),
            comment="it was canceled, and its tied children are still to be",
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
        postgresql_where=sa.text("held AND status = 'waiting'"),
    )
    op.create_index(
        "workflow_runs_cascades",
        "workflow_runs",
        ["namespace_id"],
        schema="durable",
        postgresql_where=sa.text("cascades"),
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
        sa.Column("limited", sa.Boolean, nullable=False, comment="whether items are held"),
        sa.Column("stopped_by", sa.Integer, comment="in shard -1: the item that failed first"),
        schema="durable",
    )
    op.create_index("fan_outs_run", "fan_outs", ["workflow_run_id"], schema="durable")
    op.create_table(
        "circuit_breakers",
        sa.Column("namespace_id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False, server_default="closed"),
        sa.Column("failures", sa.Integer, nullable=False, server_default="0", comment="in a row"),
        sa.Column(
            "generation",
            sa.BigInteger,
            nullable=False,
            server_default="0",
            comment="the fence: raised with every change of state",
        ),
        sa.Column("opened_at", TIMESTAMP, comment="beginning of the outage"),
        sa.Column("next_probe_at", TIMESTAMP, comment="from then on one call is let through"),
        sa.CheckConstraint(
            "state IN ('closed', 'open', 'half_open')", name="circuit_breakers_state"
        ),
        schema="durable",
    )
    op.create_table(
        "run_actions",
        sa.Column("order_id", pg.UUID, primary_key=True),
        sa.Column(
            "workflow_run_id",
            pg.UUID,
            sa.ForeignKey("durable.workflow_runs.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("seq", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("before", sa.Text, nullable=False),
        sa.Column("control", sa.Text),
        sa.Column("after", sa.Text, nullable=False),
        sa.Column("detail", sa.Text),
        sa.Column("at", TIMESTAMP, nullable=False, server_default=NOW),
        schema="durable",
    )
    op.create_index("run_actions_run", "run_actions", ["workflow_run_id", "seq"], schema="durable")
    for statement in (
        _WAKE,
        _DELIVER,
        _CHILD_ENDED,
        _TRIGGER,
        _CHILD_AGAIN,
        _AGAIN_TRIGGER,
        _CANCELED,
        _CANCELED_TRIGGER,
        _TIED,
        _TIED_TRIGGER,
    ):
        op.execute(statement)
