"""However long the history is, it comes in one query."""

from __future__ import annotations

from durable.history import History
from tests.harness.store import Store, traced

FILL = """
INSERT INTO durable.step_attempts
       (workflow_run_id, branch, ordinal, step_name, attempt, kind, status, output)
SELECT %s, '', n, 'step', 1, 'run', 'succeeded', n::text::json FROM generate_series(0, %s - 1) n
"""


def taken_over(store: Store, length: int) -> str:
    claim = store.running()
    store.conn.execute(FILL, (claim.id, length))
    store.release_child()
    return claim.id


def test_a_history_of_ten_thousand_steps_takes_as_many_statements_as_one_of_one(
    store: Store,
) -> None:
    store.claim(taken_over(store, 1))  # prepares what is to be prepared
    short, long = taken_over(store, 1), taken_over(store, 10_000)
    with traced(store.conn) as few:
        store.claim(short)
    with traced(store.conn) as many:
        found = store.claim(long)

    assert many.statements == few.statements == 2  # the claim, and all of the history
    assert many.round_trips == few.round_trips
    assert found is not None
    history = History(found[1])
    assert [history.attempts("", n, "step")[-1].output for n in (0, 5_000, 9_999)] == [
        "0",
        "5000",
        "9999",
    ]
    assert history.covers("", 9_999)
    assert not history.covers("", 10_000)


def test_the_first_claim_asks_for_no_history(store: Store) -> None:
    store.hold(store.start())
    run_id = store.start()
    with traced(store.conn) as counted:
        store.hold(run_id)
    assert (counted.statements, counted.round_trips) == (1, 1)
