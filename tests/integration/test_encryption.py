"""Re-encryption: every value by the newest key, and nothing newer overwritten."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery
from cryptography.fernet import Fernet

from durable import Durable, stored_message
from durable.codec import Codec
from durable.encryption import Keyring, name_of
from durable.errors import ConfigurationError
from durable.reencryption import Reencryption
from durable.store import events, reencryption, runs, steps
from durable.store.events import NewEvent
from durable.store.reencryption import TABLES
from tests.harness.store import Background, Store, step_of

OLD, NEW = (Fernet.generate_key().decode() for _ in range(2))
RUNS, STEPS, _ = TABLES

AppWith = Callable[..., Durable]


@pytest.fixture
def app_with(store_url: str) -> Iterator[AppWith]:
    """Make an app that has these keys."""
    made: list[Durable] = []

    def make(*keys: str, **settings: Any) -> Durable:
        app = Celery("keys", broker="memory://", set_as_current=False)
        app.conf.durable_database_url = store_url
        made.append(Durable(app, encryption_keys=keys, **settings))
        return made[-1]

    yield make
    for durable in made:
        durable.close()


def codec(*keys: str) -> Codec:
    return Codec(keyring=Keyring(keys) if keys else None)


def fill(store: Store, by: Codec, text: str = "x") -> str:
    """Store a run that has something in every column; its id."""
    message = {
        "queue": "q",
        "argsrepr": "('x',)",
        "chain": [{"task": "ship", "kwargs": {"to": text}}],
    }
    claim = store.running(
        input=by.encode({"args": [text], "kwargs": {}}, "x"),
        message=stored_message.dumped(message, by),
    )
    value, error = by.encode(text, "x"), by.encode({"type": "", "message": text}, "x")
    steps.record(store.conn, step_of(claim, output=value))
    steps.record(store.conn, step_of(claim, 1, status="failed", error=error))
    handle = step_of(claim, 2, "dispatch", output='{"ids":["a"]}')._replace(kind="dispatch")
    steps.record(store.conn, handle)
    runs.set_progress(store.conn, claim.id, claim.attempt, value)
    new = NewEvent(str(uuid.uuid4()), claim.id, store.namespace, "pin", value)
    events.send(store.conn, new)
    store.conn.execute(
        "UPDATE durable.workflow_events SET error = %s WHERE id = %s", (by.seal_text(text), new.id)
    )
    store.finish(claim, output=value)
    return claim.id


def everything(store: Store) -> str:
    names = [table.name for table in TABLES]
    rows = [store.conn.execute(f"SELECT t::text FROM durable.{name} t".encode()) for name in names]
    return "\n".join(row[0] for found in rows for row in found.fetchall())


STALE = 8  # input, output, progress, message, two steps' outcomes, payload, reason of a refusal


@pytest.mark.parametrize(
    ("before", "key"), [((OLD,), name_of(OLD)), ((), "plain")], ids=["rotated", "switched on"]
)
def test_all_is_rewritten_by_the_newest_key(
    app_with: AppWith, store: Store, before: tuple[str, ...], key: str
) -> None:
    run_id = fill(store, codec(*before))
    work = Reencryption(app_with(NEW, OLD), batch=2)
    assert work.stale() == {key: STALE}
    assert (report := work.run()).rewritten == STALE
    assert (report.missed, report.unreadable, work.stale()) == (0, {}, {})
    held = everything(store)
    assert name_of(OLD) not in held
    assert '"x"' not in held
    assert "'x'" not in held
    # Read with the new key alone; handles stay as they were, SQL looks into them.
    row, now = store.row(run_id), codec(NEW)
    assert now.decode(row["input"]) == {"args": ["x"], "kwargs": {}}
    assert (now.decode(row["output"]), now.decode(row["progress"])) == ("x", "x")
    assert stored_message.loaded(row["message"], now) == {
        "queue": "q",
        "argsrepr": "***",
        "chain": [{"task": "ship", "kwargs": {"to": "x"}}],
    }
    assert json.loads(row["message"])["queue"] == "q"
    [first, second, third] = steps.of_run(store.conn, run_id, "default")
    assert now.decode(first.output or "") == "x"
    assert now.decode(second.error or "") == {"type": "", "message": "x"}
    assert third.output == '{"ids":["a"]}'
    [event] = events.of_run(store.conn, run_id, "default")
    assert (now.decode(event.payload), now.open_text(event.error or "")) == ("x", "x")
    assert work.run().rewritten == 0


def test_switched_off_it_makes_all_plain_again(app_with: AppWith, store: Store) -> None:
    run_id = fill(store, codec(OLD))
    work = Reencryption(app_with(NEW, OLD, encrypt=False))
    assert work.stale() == {name_of(OLD): STALE}
    assert work.run().rewritten == STALE
    assert work.stale() == {}
    row = store.row(run_id)
    assert (row["input"], row["output"]) == ('{"args":["x"],"kwargs":{}}', '"x"')
    assert "durable:encrypted" not in everything(store)


def test_outputs_that_sql_has_gathered_become_one_value(app_with: AppWith, store: Store) -> None:
    old = codec(OLD)
    claim = store.running()
    gathered = f"[{old.encode(1.5, 'x')}, 2, {old.encode({'a': 'ü'}, 'x')}]"
    steps.record(store.conn, step_of(claim, output=gathered))
    Reencryption(app_with(NEW, OLD)).run()
    [step] = steps.of_run(store.conn, claim.id, "default")
    assert codec(NEW).decode(step.output or "") == [1.5, 2, {"a": "ü"}]


def test_another_namespace_is_left_alone(app_with: AppWith, database: Any, store: Store) -> None:
    mine = fill(store, codec())
    theirs = fill(Store(store.conn, "theirs"), codec())
    work = Reencryption(app_with(NEW))
    assert work.stale() == {"plain": STALE}
    work.run()
    assert store.row(theirs)["input"] == '{"args":["x"],"kwargs":{}}'
    assert "durable:encrypted" in store.row(mine)["input"]


def test_a_key_that_is_missing_is_reported_and_the_rest_is_done(
    app_with: AppWith, store: Store
) -> None:
    lost = Fernet.generate_key().decode()
    unreadable = store.start(input=codec(lost).encode({"args": [], "kwargs": {}}, "x"))
    store.start(input=codec(OLD).encode({"args": [], "kwargs": {}}, "x"))
    work = Reencryption(app_with(NEW, OLD))
    report = work.run()
    assert (report.rewritten, report.unreadable_count) == (1, 1)
    [(where, why)] = report.unreadable.items()
    assert where == f"run {unreadable}, input"
    assert f"encrypted with the key {name_of(lost)}" in why
    assert work.stale() == {name_of(lost): 1}


def test_without_keys_it_is_refused(app_with: AppWith) -> None:
    with pytest.raises(ConfigurationError, match="durable_encryption_keys"):
        Reencryption(app_with())


# --- races, forced


def test_a_value_that_was_written_after_it_was_read_stays(
    app_with: AppWith, store: Store, other: Store
) -> None:
    claim = store.running()
    runs.set_progress(store.conn, claim.id, claim.attempt, '"old"')
    change = ((claim.id,), '"old"', '"old, rewritten"')
    runs.set_progress(other.conn, claim.id, claim.attempt, '"new"')
    assert reencryption.put(store.conn, RUNS, "progress", [change]) == 0
    assert store.row(claim.id)["progress"] == '"new"'


def test_a_value_that_is_being_written_is_passed_over_and_done_in_a_later_round(
    app_with: AppWith, store: Store, other: Store
) -> None:
    claim = store.running(input=codec(OLD).encode({"args": [], "kwargs": {}}, "x"))
    runs.set_progress(store.conn, claim.id, claim.attempt, '"old"')
    durable = app_with(NEW, OLD)
    pauses: list[float] = []

    def commit_then(seconds: float) -> None:
        pauses.append(seconds)
        other.conn.execute("COMMIT")

    work = Reencryption(durable)
    other.conn.execute("BEGIN")
    runs.set_progress(other.conn, claim.id, claim.attempt, '"new"')
    durable.clock = replace(durable.clock, sleep=commit_then)
    report = work.run()  # in the first round the row is locked
    assert (len(pauses), report.missed, report.unreadable) == (1, 0, {})
    assert codec(NEW).decode(store.row(claim.id)["progress"]) == "new"


def test_a_locked_row_does_not_stop_it(store: Store, other: Store, background: Background) -> None:
    """It waits for nobody, so it can be in no deadlock."""
    first, second = store.start(), store.start()
    text = '{"args":[],"kwargs":{}}'
    other.conn.execute("BEGIN")
    other.conn.execute("SELECT FROM durable.workflow_runs WHERE id = %s FOR SHARE", (first,))
    done = reencryption.put(
        store.conn, RUNS, "input", [((first,), text, "1"), ((second,), text, "2")]
    )
    other.conn.execute("COMMIT")
    assert done == 1
    assert (store.row(first)["input"], store.row(second)["input"]) == (text, "2")


def test_a_step_that_is_recorded_meanwhile_waits_and_is_stored(
    store: Store, other: Store, background: Background
) -> None:
    claim = store.running()
    store.conn.execute("BEGIN")
    change = ((claim.id,), '{"args":[],"kwargs":{}}', "1")
    assert reencryption.put(store.conn, RUNS, "input", [change]) == 1
    recorded = background.blocked(other, steps.record, other.conn, step_of(claim))
    store.conn.execute("COMMIT")
    assert recorded.result(10) is steps.Written.RECORDED
