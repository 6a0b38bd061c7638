"""The outbox, idempotency keys, and the functions for those who speak SQL."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0004"
down_revision = "0003"

NOW = sa.text("now()")
TIMESTAMP = sa.DateTime(timezone=True)

# What a deleted run leaves: as with steps, a foreign key would cost each insert
# a look at the run, and lock it.
_DELETE_KEYS = """
CREATE FUNCTION durable.delete_keys_of_deleted_runs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM durable.idempotency_keys k USING deleted d WHERE k.workflow_run_id = d.id;
    RETURN NULL;
END $$
"""
_DELETE_KEYS_TRIGGER = """
CREATE TRIGGER delete_keys AFTER DELETE ON durable.workflow_runs
REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT
EXECUTE FUNCTION durable.delete_keys_of_deleted_runs()
"""

# Whose a key is: `candidate`, if it was free and is taken now, or an earlier
# run. Of many at once the primary key lets one insert, and the others wait for
# its commit; each statement here has a snapshot of its own, so they find it
# then. One that is there already is only read: a lock on it would last as long
# as the caller's transaction, and keep everybody else with that key waiting.
# Of two that find a key free again, the second finds another run in the row
# than it had seen, and looks again.
_TAKE_KEY = """
CREATE FUNCTION durable.take_key(
    namespace text, workflow text, given text, plain json, candidate uuid, keep interval,
    reuse text, OUT run uuid, OUT same boolean
) LANGUAGE plpgsql AS $$
DECLARE
    hash text := encode(sha256(convert_to(plain::jsonb::text, 'UTF8')), 'hex');
    free boolean;
BEGIN
    LOOP
        SELECT k.workflow_run_id, k.input_hash IS NULL OR k.input_hash = hash,
               r.id IS NULL OR (r.completed_at IS NOT NULL
               AND (r.completed_at + k.ttl <= now() OR reuse = 'after_end'
                    OR (reuse = 'after_failure' AND r.status IN ('failed', 'canceled'))))
          INTO run, same, free
          FROM durable.idempotency_keys k
          LEFT JOIN durable.workflow_runs r ON r.id = k.workflow_run_id
         WHERE k.namespace_id = namespace AND k.workflow_name = workflow AND k.key = given;
        IF FOUND AND (NOT free OR run = candidate) THEN
            RETURN;
        END IF;
        INSERT INTO durable.idempotency_keys AS k
               (namespace_id, workflow_name, key, workflow_run_id, input_hash, ttl)
        VALUES (namespace, workflow, given, candidate, hash, keep)
        ON CONFLICT (namespace_id, workflow_name, key) DO UPDATE
           SET workflow_run_id = excluded.workflow_run_id, input_hash = excluded.input_hash,
               ttl = excluded.ttl, created_at = excluded.created_at
         WHERE free AND k.workflow_run_id = run
        RETURNING k.workflow_run_id, true INTO run, same;
        IF FOUND THEN
            RETURN;
        END IF;
    END LOOP;
END $$
"""

# One event, from the outbox to its run. Two dispatchers both take the oldest
# one; the second waits here for the first, so that the order is kept. The wake
# comes first, as it locks the run: `seq` is then the order of the commits. That
# this commit may be forgotten in a crash of the server does no harm: the row is
# then in the outbox again, and nobody has seen the event without a later commit.
_DELIVER_EVENT = """
CREATE FUNCTION durable.deliver_event(outbox_id uuid) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    sent durable.outbox;
BEGIN
    DELETE FROM durable.outbox WHERE id = outbox_id RETURNING * INTO sent;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM durable.wake(sent.workflow_run_id);
    INSERT INTO durable.workflow_events
           (id, workflow_run_id, namespace_id, event_type, payload, idempotency_key, received_at)
    SELECT sent.id, r.id, r.namespace_id, sent.event_type, sent.payload, sent.idempotency_key,
           sent.created_at
      FROM durable.workflow_runs r
     WHERE r.id = sent.workflow_run_id AND r.namespace_id = sent.namespace_id
    ON CONFLICT DO NOTHING;
END $$
"""

# --- for callers in SQL

_REFUSE = """
CREATE FUNCTION durable.refuse(problem text, fix text, state text DEFAULT '22023') RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = state, MESSAGE = problem, HINT = fix;
END $$
"""

_NAMESPACE = """
CREATE FUNCTION durable.namespace_or_default(given text) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT coalesce(given, nullif(current_setting('durable.namespace', true), ''), 'default')
$$
"""

_CHECK_NAME = r"""
CREATE FUNCTION durable.check_name(what text, given text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF given IS NULL OR btrim(given) = '' OR length(given) > 255
       OR given ~ '[\x01-\x1f\x7f-\x9f]' THEN
        PERFORM durable.refuse(
            what || ' is ' || coalesce(quote_literal(left(given, 80)), 'NULL'),
            'Give a name of 1 to 255 printable characters.');
    END IF;
END $$
"""

# jsonb takes neither NUL nor lone surrogates, and says so in other words. The
# value itself stays json, which keeps the order of keys and numbers as written.
_CHECK_JSON = r"""
CREATE FUNCTION durable.check_json(what text, given json, kind text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    most integer := coalesce(
        nullif(current_setting('durable.max_payload_bytes', true), ''), '1048576')::integer;
    value jsonb;
BEGIN
    IF given IS NULL THEN
        PERFORM durable.refuse(what || ' is NULL', 'Give JSON, such as ''[]'', ''{}'' or ''null''.');
    END IF;
    IF kind IS NOT NULL AND json_typeof(given) <> kind THEN
        PERFORM durable.refuse(
            what || ' is a JSON ' || json_typeof(given) || ', and has to be an ' || kind,
            'Use json_build_array(...) for args and json_build_object(...) for kwargs.');
    END IF;
    IF octet_length(given::text) > most THEN
        PERFORM durable.refuse(
            what || ' has ' || octet_length(given::text) || ' bytes, more than the limit of ' || most,
            'Keep the data in a table and pass its key, or raise the setting'
            || ' durable.max_payload_bytes of the database.', '54000');
    END IF;
    BEGIN
        value := given::jsonb;
    EXCEPTION WHEN data_exception THEN
        PERFORM durable.refuse(
            what || ' cannot be stored: ' || sqlerrm,
            'Remove NUL characters (\u0000), lone surrogates and absurd numbers.');
    END;
    IF jsonb_path_exists(value, 'strict $.**{99}') THEN
        PERFORM durable.refuse(
            what || ' is nested more than 98 levels deep', 'Store it flatter.', '54000');
    END IF;
END $$
"""

_CHECK_INTERVAL = """
CREATE FUNCTION durable.check_interval(what text, given interval) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF given < interval '0' OR given > interval '100 years' THEN
        PERFORM durable.refuse(
            what || ' is ' || given::text, 'Give an interval from zero to a hundred years.');
    END IF;
END $$
"""

_CHECK_RUN = """
CREATE FUNCTION durable.check_run(run uuid, namespace text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    theirs text;
    found_status text;
BEGIN
    SELECT r.namespace_id, r.status INTO theirs, found_status
      FROM durable.workflow_runs r WHERE r.id = run;
    IF NOT FOUND THEN
        PERFORM durable.refuse(
            'there is no run ' || coalesce(run::text, 'NULL'),
            'Pass the id that durable.enqueue(), .delay() or .apply_async() returned; the'
            || ' transaction that started it has to be committed, or be this one.', 'DU001');
    ELSIF theirs <> namespace THEN
        PERFORM durable.refuse(
            'run ' || run::text || ' belongs to namespace ' || quote_literal(theirs) || ', not to '
            || quote_literal(namespace),
            'Pass namespace => ' || quote_literal(theirs) || ' if that run is meant.', 'DU001');
    END IF;
    RETURN found_status;
END $$
"""

# `message` stays NULL: only the app knows the way to the workflow's queue. The
# dispatcher that rings the run first adds it.
_ENQUEUE = """
CREATE FUNCTION durable.enqueue(
    workflow text,
    args json DEFAULT '[]',
    kwargs json DEFAULT '{}',
    queue text DEFAULT NULL,
    countdown interval DEFAULT NULL,
    eta timestamptz DEFAULT NULL,
    deadline interval DEFAULT NULL,
    expires interval DEFAULT NULL,
    priority integer DEFAULT NULL,
    idempotency_key text DEFAULT NULL,
    idempotency_ttl interval DEFAULT '7 days',
    idempotency_reuse text DEFAULT 'after_ttl',
    namespace text DEFAULT NULL
) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    id uuid := gen_random_uuid();
    input json;
    due timestamptz;
    taken record;
BEGIN
    namespace := durable.namespace_or_default(namespace);
    PERFORM durable.check_name('workflow', workflow);
    PERFORM durable.check_name('namespace', namespace);
    PERFORM durable.check_json('args', args, 'array');
    PERFORM durable.check_json('kwargs', kwargs, 'object');
    input := ('{"args":' || args::text || ',"kwargs":' || kwargs::text || '}')::json;
    PERFORM durable.check_json('args and kwargs', input, NULL);
    PERFORM durable.check_interval('countdown', countdown);
    PERFORM durable.check_interval('deadline', deadline);
    PERFORM durable.check_interval('expires', expires);
    IF queue IS NOT NULL THEN
        PERFORM durable.check_name('queue', queue);
    END IF;
    IF priority NOT BETWEEN 0 AND 255 THEN
        PERFORM durable.refuse('priority is ' || priority::text, 'Give 0 to 255.');
    END IF;
    IF countdown IS NOT NULL AND eta IS NOT NULL THEN
        PERFORM durable.refuse('both countdown and eta are given', 'Give one of them.');
    ELSIF eta > now() + interval '100 years' THEN
        PERFORM durable.refuse('eta is ' || eta::text, 'Give a time of the next hundred years.');
    END IF;
    IF idempotency_key IS NOT NULL THEN
        PERFORM durable.check_name('idempotency_key', idempotency_key);
        IF idempotency_ttl IS NULL THEN
            PERFORM durable.refuse('idempotency_ttl is NULL', 'Give an interval, or leave it out.');
        END IF;
        PERFORM durable.check_interval('idempotency_ttl', idempotency_ttl);
        IF idempotency_reuse IS NULL
           OR idempotency_reuse NOT IN ('after_ttl', 'after_failure', 'after_end') THEN
            PERFORM durable.refuse(
                'idempotency_reuse is ' || coalesce(quote_literal(idempotency_reuse), 'NULL'),
                'Give ''after_ttl'' (the default), ''after_failure'' or ''after_end''.');
        END IF;
        taken := durable.take_key(
            namespace, workflow, idempotency_key, input, id, idempotency_ttl, idempotency_reuse);
        IF NOT taken.same THEN
            PERFORM durable.refuse(
                'idempotency key ' || quote_literal(idempotency_key) || ' of '
                || quote_literal(workflow) || ' belongs to run ' || taken.run::text
                || ', which was started with other arguments',
                'Use another key, or the arguments in durable.workflow_runs.input of that run.',
                'DU003');
        ELSIF taken.run <> id THEN
            RETURN taken.run;
        END IF;
    END IF;
    due := coalesce(now() + countdown, eta, now());
    INSERT INTO durable.workflow_runs AS r
           (id, namespace_id, workflow_name, status, input, queue, config,
            available_at, deadline_at, expires_at)
    VALUES (id, namespace, workflow, CASE WHEN due > now() THEN 'sleeping' ELSE 'pending' END,
            input, queue, jsonb_strip_nulls(jsonb_build_object('priority', priority)),
            least(due, now() + deadline, now() + expires), now() + deadline, now() + expires);
    IF due < now() + interval '5 seconds' THEN
        PERFORM pg_notify('durable', namespace);
    END IF;
    RETURN id;
END $$
"""

# Nothing here locks the run: a worker that advances it does not wait for the
# end of the caller's transaction. A dispatcher delivers after the commit.
_SEND_EVENT = """
CREATE FUNCTION durable.send_event(
    run uuid,
    type text,
    payload json DEFAULT 'null',
    idempotency_key text DEFAULT NULL,
    namespace text DEFAULT NULL
) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    status text;
    sent uuid;
BEGIN
    namespace := durable.namespace_or_default(namespace);
    PERFORM durable.check_name('type', type);
    PERFORM durable.check_json('payload', payload, NULL);
    IF idempotency_key IS NOT NULL THEN
        PERFORM durable.check_name('idempotency_key', idempotency_key);
    END IF;
    status := durable.check_run(run, namespace);
    sent := (
        SELECT e.id FROM durable.workflow_events e
         WHERE e.workflow_run_id = run AND e.idempotency_key = send_event.idempotency_key
         UNION ALL
        SELECT o.id FROM durable.outbox o
         WHERE o.workflow_run_id = run AND o.idempotency_key = send_event.idempotency_key
         LIMIT 1);
    IF sent IS NOT NULL THEN
        RETURN sent;
    END IF;
    IF status IN ('succeeded', 'failed', 'canceled') THEN
        PERFORM durable.refuse(
            'run ' || run::text || ' has ended (' || status || '), it takes no event '
            || quote_literal(type) || ' any more',
            'Look at its status before you send, or start another run.', 'DU002');
    END IF;
    INSERT INTO durable.outbox AS o
           (namespace_id, workflow_run_id, kind, event_type, payload, idempotency_key)
    VALUES (namespace, run, 'event', type, payload, idempotency_key)
    RETURNING o.id INTO sent;
    PERFORM pg_notify('durable', namespace);
    RETURN sent;
END $$
"""

_CANCEL = """
CREATE FUNCTION durable.cancel(
    run uuid,
    reason text DEFAULT 'canceled',
    namespace text DEFAULT NULL
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    namespace := durable.namespace_or_default(namespace);
    PERFORM durable.check_name('reason', reason);
    IF durable.check_run(run, namespace) IN ('succeeded', 'failed', 'canceled') THEN
        RETURN false;
    END IF;
    INSERT INTO durable.outbox (namespace_id, workflow_run_id, kind, reason)
    VALUES (namespace, run, 'cancel', reason);
    PERFORM pg_notify('durable', namespace);
    RETURN true;
END $$
"""


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("namespace_id", sa.Text, primary_key=True),
        sa.Column("workflow_name", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("workflow_run_id", pg.UUID, nullable=False),
        sa.Column("input_hash", sa.Text, comment="NULL: erased, any input is the same"),
        sa.Column("ttl", pg.INTERVAL, nullable=False, comment="counted from the end of the run"),
        sa.Column("created_at", TIMESTAMP, nullable=False, server_default=NOW),
        schema="durable",
    )
    op.create_index(
        "idempotency_keys_run", "idempotency_keys", ["workflow_run_id"], schema="durable"
    )
    op.create_table(
        "outbox",
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
        sa.Column("created_at", TIMESTAMP, nullable=False, server_default=NOW),
        schema="durable",
    )
    op.create_index("outbox_seq", "outbox", ["namespace_id", "seq"], schema="durable")
    op.create_index("outbox_run", "outbox", ["workflow_run_id"], schema="durable")
    for statement in (
        _DELETE_KEYS,
        _DELETE_KEYS_TRIGGER,
        _REFUSE,
        _NAMESPACE,
        _CHECK_NAME,
        _CHECK_JSON,
        _CHECK_INTERVAL,
        _CHECK_RUN,
        _TAKE_KEY,
        _DELIVER_EVENT,
        _ENQUEUE,
        _SEND_EVENT,
        _CANCEL,
    ):
        op.execute(statement)
