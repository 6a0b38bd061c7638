"""The tables, as SQLAlchemy metadata: for Alembic, for users' own queries, for tests.

At run time the package speaks plain SQL (the other modules of this
folder); this module is imported for migrations only.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

SCHEMA = "durable"

metadata = sa.MetaData(schema=SCHEMA)

_now = sa.text("now()")
_timestamp = sa.DateTime(timezone=True)

workflow_runs = sa.Table(
    "workflow_runs",
    metadata,
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
    sa.Column("available_at", _timestamp, nullable=False, server_default=_now),
    sa.Column("deadline_at", _timestamp),
    sa.Column("created_at", _timestamp, nullable=False, server_default=_now),
    sa.Column("completed_at", _timestamp),
    sa.Column("started_at", _timestamp, comment="first claim"),
    sa.Column("claimed_at", _timestamp, comment="latest claim"),
    sa.Column("expires_at", _timestamp, comment="dropped if not claimed by then"),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0", comment="the fence"),
    sa.Column("wake", sa.Integer, nullable=False, server_default="0", comment="wake-ups so far"),
    sa.Column("rung", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("rung_at", _timestamp, comment="first message since it was last woken"),
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
    sa.Column("subject", sa.Text, comment="whose data it has, by a tag of the user's"),
    sa.Column("erased_at", _timestamp, comment="its data was erased; run_actions says by whom"),
    sa.Column(
        "passes",
        sa.Integer,
        nullable=False,
        server_default="0",
        comment="how often continue_as_new began it anew",
    ),
    sa.Column(
        "handed_back",
        sa.Integer,
        nullable=False,
        server_default="0",
        comment="messages since the last claim that workers without the code got",
    ),
    sa.Column(
        "compensates",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="it has something to undo: a worker has to do so before it is canceled",
    ),
    sa.CheckConstraint(
        "status IN ('pending', 'running', 'sleeping', 'waiting', 'paused',"
        " 'succeeded', 'failed', 'canceled')",
        name="workflow_runs_status",
    ),
)

# Every timer of the system: what the dispatcher has to look at, and nothing else.
sa.Index(
    "workflow_runs_due",
    workflow_runs.c.namespace_id,
    workflow_runs.c.rung,
    workflow_runs.c.available_at,
    postgresql_where=sa.text("available_at < 'infinity'"),
)
# Who holds what: take-over of a dead worker, release of a dead child.
sa.Index(
    "workflow_runs_running",
    workflow_runs.c.worker_id,
    postgresql_where=sa.text("status = 'running'"),
)

sa.Index(
    "workflow_runs_children",
    workflow_runs.c.parent_run_id,
    workflow_runs.c.fan_out_id,
    postgresql_where=sa.text("parent_run_id IS NOT NULL"),
)
sa.Index(
    "workflow_runs_held",
    workflow_runs.c.fan_out_id,
    workflow_runs.c.fan_index,
    postgresql_where=sa.text("held AND status = 'waiting'"),
)
# Canceled parents whose tied children are still to be canceled: as a rule none.
sa.Index(
    "workflow_runs_cascades",
    workflow_runs.c.namespace_id,
    postgresql_where=sa.text("cascades"),
)

# All of one person, to be found or erased.
sa.Index(
    "workflow_runs_subject",
    workflow_runs.c.namespace_id,
    workflow_runs.c.subject,
    postgresql_where=sa.text("subject IS NOT NULL"),
)

step_attempts = sa.Table(
    "step_attempts",
    metadata,
    # No foreign key: its check would cost each step a second look at the run
    # row that the fence has just locked. A trigger on workflow_runs cascades.
    # Columns of fixed size come first, and small numbers before texts in the
    # key: no padding, a fifth less to store for a small step.
    sa.Column("workflow_run_id", pg.UUID, nullable=False),
    sa.Column("id", pg.UUID, nullable=False, server_default=sa.text("gen_random_uuid()")),
    sa.Column("created_at", _timestamp, nullable=False, server_default=_now),
    sa.Column("completed_at", _timestamp),
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
    sa.Column("due_at", _timestamp, comment="end of a sleep, or of a wait with a timeout"),
    sa.PrimaryKeyConstraint(
        "workflow_run_id", "ordinal", "attempt", "set_aside", "branch", "step_name"
    ),
)

# Sent to a run; consumed by its waits of that type, in the order of `seq`.
workflow_events = sa.Table(
    "workflow_events",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True, server_default=sa.text("gen_random_uuid()")),
    sa.Column("seq", sa.BigInteger, sa.Identity(always=True), nullable=False),
    sa.Column("namespace_id", sa.Text, nullable=False),
    sa.Column(
        "workflow_run_id",
        pg.UUID,
        sa.ForeignKey(workflow_runs.c.id, ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("event_type", sa.Text, nullable=False),
    sa.Column("payload", pg.JSON, nullable=False),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("received_at", _timestamp, nullable=False, server_default=_now),
    sa.Column("consumed_at", _timestamp),
    sa.Column("consumed_branch", sa.Text),
    sa.Column("consumed_ordinal", sa.Integer),
    sa.Column("error", sa.Text, comment="why its payload was refused by the wait's schema"),
)
sa.Index(
    "workflow_events_key",
    workflow_events.c.workflow_run_id,
    workflow_events.c.idempotency_key,
    unique=True,
    postgresql_where=sa.text("idempotency_key IS NOT NULL"),
)
sa.Index(
    "workflow_events_run",
    workflow_events.c.workflow_run_id,
    workflow_events.c.event_type,
    workflow_events.c.seq,
)

# How many items of a fan-out have not ended, spread over rows: thousands of
# ends at once do not queue for one.
fan_outs = sa.Table(
    "fan_outs",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True),
    sa.Column("shard", sa.SmallInteger, primary_key=True, comment="-1: counts the shards"),
    sa.Column(
        "workflow_run_id",
        pg.UUID,
        sa.ForeignKey(workflow_runs.c.id, ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("remaining", sa.Integer, nullable=False),
    sa.Column("stop_at_first", sa.Boolean, nullable=False),
    sa.Column("limited", sa.Boolean, nullable=False, comment="whether items are held"),
    sa.Column("stopped_by", sa.Integer, comment="in shard -1: the item that failed first"),
)
sa.Index("fan_outs_run", fan_outs.c.workflow_run_id)

# Taken by the first start with a key; free again `ttl` after the end of its run.
idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("namespace_id", sa.Text, primary_key=True),
    sa.Column("workflow_name", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("workflow_run_id", pg.UUID, nullable=False),
    sa.Column("input_hash", sa.Text, comment="NULL: erased, any input is the same"),
    sa.Column("ttl", pg.INTERVAL, nullable=False, comment="counted from the end of the run"),
    sa.Column("created_at", _timestamp, nullable=False, server_default=_now),
)
sa.Index("idempotency_keys_run", idempotency_keys.c.workflow_run_id)

# What was sent to runs in somebody's transaction: a dispatcher delivers it
# after the commit. No foreign key: it would lock the run until then.
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", pg.UUID, primary_key=True, server_default=sa.text("gen_random_uuid()")),
    sa.Column("seq", sa.BigInteger, sa.Identity(always=True), nullable=False),
    sa.Column("namespace_id", sa.Text, nullable=False),
    sa.Column("workflow_run_id", pg.UUID, nullable=False),
    sa.Column("kind", sa.Text, nullable=False, comment="event or cancel"),
    sa.Column("event_type", sa.Text),
    sa.Column("payload", pg.JSON),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("reason", sa.Text),
    sa.Column("actor", sa.Text, nullable=False, server_default=sa.text("SESSION_USER")),
    sa.Column("created_at", _timestamp, nullable=False, server_default=_now),
)
sa.Index("outbox_seq", outbox.c.namespace_id, outbox.c.seq)
sa.Index("outbox_run", outbox.c.workflow_run_id)

workers = sa.Table(
    "workers",
    metadata,
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
    sa.Column("idle_beats", sa.Integer, nullable=False, comment="beats in a row with a free slot"),
    sa.Column("started_at", _timestamp, nullable=False, server_default=_now),
    sa.Column("beat_at", _timestamp, nullable=False, server_default=_now),
    sa.Column(
        "versions",
        pg.ARRAY(sa.Text),
        nullable=False,
        server_default="{}",
        comment="name@version of each version that it runs",
    ),
)

# What all workers together know of a service's health.
circuit_breakers = sa.Table(
    "circuit_breakers",
    metadata,
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
    sa.Column("opened_at", _timestamp, comment="beginning of the outage"),
    sa.Column("next_probe_at", _timestamp, comment="from then on one call is let through"),
    sa.CheckConstraint("state IN ('closed', 'open', 'half_open')", name="circuit_breakers_state"),
)

# What people did to runs.
run_actions = sa.Table(
    "run_actions",
    metadata,
    sa.Column("order_id", pg.UUID, primary_key=True),
    sa.Column(
        "workflow_run_id",
        pg.UUID,
        sa.ForeignKey(workflow_runs.c.id, ondelete="CASCADE"),
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
    sa.Column("at", _timestamp, nullable=False, server_default=_now),
)
sa.Index("run_actions_run", run_actions.c.workflow_run_id, run_actions.c.seq)

schema_info = sa.Table(
    "schema_info",
    metadata,
    sa.Column("min_code_version", sa.Integer, primary_key=True, autoincrement=False),
)
