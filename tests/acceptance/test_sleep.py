"""Runs that sleep, in real workers: nobody's memory, nobody's clock, nobody's loss."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import psycopg
import pytest

from durable.errors import DeadlineExceeded, OptionError
from tests.acceptance.conftest import Query, Trace
from tests.acceptance.rough import pass_time
from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS, StartWorker
from tests.harness import wait_for
from tests.harness.brokers import BrokerNode
from tests.harness.postgres import PostgresServer

APP = "tests.apps.waits"
DUE = """
SELECT due_at, now() FROM durable.step_attempts
 WHERE workflow_run_id = %s AND kind = 'sleep'
"""


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("sleep")
    # The worker's clock, and that of the caller, is wrong by three days.
    skew = {"clock_skew": 3 * 86_400, "durable_ring_interval": 2}
    with running(APP, postgres_server, directory, **skew) as shared:
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


def pauses(shared: Shared, run_id: str) -> list[float]:
    """Seconds from the beginning of each sleep to its due time."""
    rows = shared.conn.execute(
        "SELECT extract(epoch FROM due_at - created_at)::float8 FROM durable.step_attempts"
        " WHERE workflow_run_id = %s AND kind = 'sleep' ORDER BY ordinal",
        (run_id,),
    ).fetchall()
    return [row[0] for row in rows]


def test_a_sleep_takes_its_time_by_the_databases_clock(shared: Shared) -> None:
    run = shared.module.naps.delay(0.5)
    assert run.get(timeout=10) == "awake"
    assert pauses(shared, run.id) == [pytest.approx(0.5, abs=0.05)]
    assert shared.notes(run.id) == [
        ("body", None),
        ("before", None),
        ("body", None),
        ("after", None),
    ]
    before, slept, after = run.steps()
    assert slept.kind == "sleep"
    assert after.started_at - before.completed_at >= timedelta(seconds=0.5)
    assert after.started_at - slept.completed_at < timedelta(seconds=2)


def test_a_date_is_met_by_the_databases_clock(shared: Shared) -> None:
    when = datetime.now(timezone.utc) + timedelta(seconds=0.7)
    run = shared.module.naps_until.delay(when.isoformat())
    assert run.get(timeout=10) == "awake"
    [slept] = run.steps()
    assert slept.completed_at >= when


def test_zero_and_a_past_date_are_no_pause(shared: Shared) -> None:
    run = shared.module.naps_often.delay([0, 0.0])
    past = shared.module.naps_until.delay("2020-01-01T00:00:00+00:00")
    assert (run.get(timeout=10), past.get(timeout=10)) == (2, "awake")
    assert run.run().attempt == past.run().attempt == 1  # it never parked


@pytest.mark.parametrize(
    ("pause", "complaint"),
    [
        (-1, "is negative"),
        (1e18, "longer than a hundred years"),
        ("soon", "is not a duration"),
        (None, "is not a duration"),
        (True, "is not a duration"),
    ],
)
def test_what_is_no_pause_fails_the_run_and_says_so(
    shared: Shared, pause: Any, complaint: str
) -> None:
    run = shared.module.naps_often.delay([pause])
    with pytest.raises(OptionError, match=complaint):
        run.get(timeout=10)


@pytest.mark.parametrize(
    ("when", "complaint"),
    [("2030-01-01T00:00:00", "aware datetime"), ("9999-12-31T00:00:00+00:00", "hundred years")],
)
def test_what_is_no_date_to_wait_for_fails_the_run_and_says_so(
    shared: Shared, when: str, complaint: str
) -> None:
    with pytest.raises(OptionError, match=complaint):
        shared.module.naps_until.delay(when).get(timeout=10)


def test_a_run_that_sleeps_past_its_deadline_fails_at_the_deadline(shared: Shared) -> None:
    run = shared.module.oversleeps.delay()
    with pytest.raises(DeadlineExceeded):
        run.get(timeout=10)
    row = run.run()
    assert row.reason == "deadline"
    late = row.completed_at - row.created_at
    assert timedelta(seconds=1) <= late < timedelta(seconds=3)


def test_neither_time_limits_nor_expires_count_a_sleep(shared: Shared) -> None:
    limited = shared.module.naps_past_its_time_limit.delay()
    expiring = shared.module.naps.apply_async((2.5,), expires=2)
    for run in (limited, expiring):
        assert run.get(timeout=15) == "awake"


class TestKilled:
    """A worker of the test's own, to be killed."""

    @pytest.fixture
    def app_name(self) -> str:
        return APP

    @pytest.fixture
    def app_settings(self, database_url: str, trace: Trace) -> dict[str, Any]:
        return {
            "durable_database_url": database_url,
            "durable_lease": 2.5,
            "durable_ring_interval": 1,
            "durable_poll_interval": 0.5,
            "trace": str(trace.path),
        }

    def test_a_due_time_does_not_move_when_every_worker_is_killed(
        self,
        app_module: ModuleType,
        start_worker: StartWorker,
        celery_broker: BrokerNode,
        database_url: str,
    ) -> None:
        worker = start_worker(concurrency=1)
        run = app_module.naps.delay(1.5)
        with psycopg.connect(database_url, autocommit=True) as conn:
            wait_for(lambda: run.run().status == "sleeping", what="the run to sleep")
            [(due, now)] = conn.execute(DUE, (run.id,)).fetchall()
            assert due > now
            worker.kill()
            assert celery_broker.depth() == 0  # nothing waits in the broker
            wait_for(
                lambda: conn.execute(DUE, (run.id,)).fetchall()[0][1] > due,
                what="the due time to pass without a worker",
            )
            start_worker(concurrency=1)
            assert run.get(timeout=20) == "awake"
            assert conn.execute(DUE, (run.id,)).fetchall()[0][0] == due
        assert run.steps()[1].completed_at >= due

    @pytest.mark.storm
    def test_a_hundred_thousand_sleepers_cost_an_idle_worker_nothing(
        self,
        app_module: ModuleType,
        start_worker: StartWorker,
        celery_broker: BrokerNode,
        query: Query,
        database_url: str,
    ) -> None:
        worker = start_worker(concurrency=2)
        app_module.naps.delay(0).get(timeout=20)
        settle = Meter(worker.pid, celery_broker, query, database_url)
        before = settle.read()
        query(
            "WITH new AS (INSERT INTO durable.workflow_runs (namespace_id, workflow_name, status,"
            " input, message, available_at, queue, started_at, attempt)"
            " SELECT 'default', %s, 'sleeping', '{\"args\": [0], \"kwargs\": {}}', '{}',"
            " now() + interval '1 hour', %s, now(), 1 FROM generate_series(1, 100000)"
            " RETURNING 1) SELECT count(*) FROM new",
            app_module.naps.name,
            celery_broker.queue,
        )
        after = settle.read()
        assert after.queued == 0
        assert after.connections == before.connections
        assert after.memory < before.memory + 4 * 2**20
        assert after.statements <= before.statements * 1.2 + 2
        assert after.rows_read < 1000  # neither does each statement cost more

        runs = [app_module.naps.delay(0.3) for _ in range(5)]  # and a due handful among them
        for run in runs:
            assert run.get(timeout=10) == "awake"
            before_step, slept, _ = run.steps()
            assert slept.completed_at - before_step.completed_at < timedelta(seconds=2)


class Meter:
    """What an idle worker takes, over some seconds."""

    SECONDS = 6.0
    TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"
    READ = "SELECT tup_returned FROM pg_stat_database WHERE datname = %s"
    CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"

    def __init__(self, pid: int, broker: BrokerNode, query: Query, url: str) -> None:
        self.process = psutil.Process(pid)
        self.broker = broker
        self.database = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
        # From another database, so that these questions do not count.
        self.url = psycopg.conninfo.make_conninfo(url, dbname="postgres")

    def read(self) -> Any:
        with psycopg.connect(self.url, autocommit=True) as conn:

            def ask(statement: str) -> int:
                row = conn.execute(statement, (self.database,)).fetchone()
                assert row is not None
                return int(row[0])

            pass_time(2)  # statistics come in late
            began = ask(self.TRANSACTIONS), ask(self.READ)
            pass_time(self.SECONDS)
            return SimpleNamespace(
                statements=ask(self.TRANSACTIONS) - began[0],
                rows_read=ask(self.READ) - began[1],
                connections=ask(self.CONNECTIONS),
                memory=self.process.memory_info().rss,
                queued=self.broker.depth(),
            )
