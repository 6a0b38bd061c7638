"""Every point at which a process can die is found, tried, and survived.

A recording run notes each SQL statement, publish, acknowledgement and
result-backend write of a workload. The sweep then runs the workload once for
each point and kills the process there, or loses the operation's answer.
``make sweep`` tries all of them, on every broker; the default is each
operation once.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery import Celery

from durable.testing.crashes import VARIABLE, CrashBoard, CrashPoint
from tests.harness import apps, services, wait_for
from tests.harness.brokers import BrokerNode, delete_redis_keys
from tests.harness.forked import ForkedWorker, forked
from tests.harness.names import unique_name

logger = logging.getLogger(__name__)

APP = "tests.apps.sweep"
FAST = {
    "durable_lease": 2,
    "durable_heartbeat_interval": 0.5,
    "durable_ring_interval": 1,
    "durable_poll_interval": 0.2,
    "durable_tail_timeout": 1,
    "durable_max_recoveries": 50,
    "task_track_started": True,
    # Each task has a process of its own, which opens its own connections and
    # thereby comes past the same points as any other.
    "worker_max_tasks_per_child": 1,
    "worker_prefetch_multiplier": 1,
}
#: How long a workload may take to recover, on a machine with other things to do.
PATIENCE = 40.0
#: Worlds that are swept at once: most of the time goes into waiting.
WORLDS = 3
#: Children that are killed in the life of one worker.
BATCH = 12


@dataclass(frozen=True)
class Kind:
    """A workload: how its durable members end, and what its plain ones are."""

    outputs: tuple[Any, ...]
    plain: str = ""


KINDS = {
    "chain": Kind((4, 14), "note"),
    "failure": Kind((None,), "blame"),
    "chord": Kind((11, 11), "note"),
    "message": Kind((4,)),
    "loses_child": Kind((1,)),
    "loses_worker": Kind((1,)),
}


@dataclass(frozen=True)
class Target:
    """A crash point of the member ``index`` of a workload; None: of no run in particular."""

    kind: str
    index: int | None
    point: CrashPoint

    def __str__(self) -> str:
        return f"{self.kind}[{'' if self.index is None else self.index}]: {self.point}"


@dataclass
class Workload:
    kind: str
    ids: list[str] = field(init=False)

    def __post_init__(self) -> None:
        kind = KINDS[self.kind]
        self.ids = [str(uuid.uuid4()) for _ in (*kind.outputs, *filter(None, [kind.plain]))]

    @property
    def runs(self) -> list[str]:
        return self.ids[: len(KINDS[self.kind].outputs)]


class World:
    """A queue, a namespace and a worker, beside other worlds in the same database."""

    def __init__(self, number: int, settings: dict[str, Any], directory: Path) -> None:
        directory.mkdir()
        self.effects = directory / "effects"
        self.effects.mkdir()
        self.board = CrashBoard(directory / "crashes")
        self.settings = {
            **settings,
            "durable_namespace": f"world{number}",
            "task_default_queue": f"{settings['task_default_queue']}.{number}",
            "effects": str(self.effects),
        }
        self.env = {**apps.environment(self.settings), VARIABLE: str(self.board.directory)}
        self.log = directory / "worker.log"
        arguments = ["--concurrency", "3", "--loglevel", "INFO", "--hostname", f"w{number}@sweep"]
        arguments += ["--without-mingle", "--without-gossip", "--pool", "prefork"]
        self.worker = ForkedWorker(APP, log_path=self.log, env=self.env, args=arguments)

    # --- what happens in it

    def start(self, workloads: Sequence[Workload]) -> None:
        """Start them in a client process; start again what it did not get accepted."""
        client = self._client(workloads)
        client.join()
        while client.exitcode:
            missing = [each for each in workloads if not self.accepted(each)]
            if not missing:
                return
            client = self._client(missing)
            client.join()

    def _client(self, workloads: Sequence[Workload]) -> Any:
        return forked(_start, self.env, [(each.kind, each.ids) for each in workloads])

    def accepted(self, workload: Workload) -> bool:
        return bool(self.ask("SELECT 1 FROM durable.workflow_runs WHERE id = %s", workload.ids[0]))

    def survive(self, workloads: Sequence[Workload]) -> None:
        """Wait until nothing is left to do, starting the worker again whenever it has died."""

        def quiet() -> bool:
            if not self.worker.is_running():
                self.worker.start()
            return not self._unfinished(workloads)

        try:
            wait_for(quiet, timeout=PATIENCE)
        except AssertionError:
            raise AssertionError(f"unfinished: {self._unfinished(workloads)}") from None

    def _unfinished(self, workloads: Sequence[Workload]) -> list[Any]:
        """Runs that are not over and told of, plain tasks that did not run."""
        runs = [run for each in workloads for run in each.runs]
        over = "status IN ('succeeded', 'failed') AND available_at = 'infinity'"
        done = self.ask(
            f"SELECT id::text FROM durable.workflow_runs WHERE id = ANY(%s::uuid[]) AND {over}",
            runs,
        )
        left: list[Any] = sorted(set(runs) - {row[0] for row in done})
        for each in workloads:
            plain = KINDS[each.kind].plain
            if plain and not self.executions(each.ids[-1], plain):
                left.append((plain, each.ids))
        return left

    # --- what came of it

    def check(self, workload: Workload) -> None:
        """Same results, no committed step run again, rows of a session there once."""
        for run, output in zip(workload.runs, KINDS[workload.kind].outputs, strict=True):
            row = self.ask("SELECT status, output FROM durable.workflow_runs WHERE id = %s", run)[0]
            assert row == (("succeeded", output) if output is not None else ("failed", None))
            self._check_steps(run)
            state = wait_for(lambda run=run: self._backend_state(run), what="a stored result")
            assert state == ("SUCCESS" if output is not None else "FAILURE")

    def _check_steps(self, run: str) -> None:
        steps = self.ask(
            "SELECT step_name, output FROM durable.step_attempts"
            " WHERE workflow_run_id = %s AND status = 'succeeded'",
            run,
        )
        names = [name.rpartition(".")[2] for name, _ in steps]
        assert len(names) == len(set(names))
        for name, (_, output) in zip(names, steps, strict=True):
            assert self.executions(run, name) == output["execution"], f"{name} ran after its commit"
        rows = self.ask("SELECT count(*) FROM sweep_rows WHERE run_id = %s", run)
        assert rows == [(int("store" in names),)]

    def _backend_state(self, run: str) -> str | None:
        meta = self._reader.backend.get_task_meta(run)
        return meta["status"] if meta["status"] in {"SUCCESS", "FAILURE"} else None

    def executions(self, task_id: str, what: str) -> int:
        try:
            return (self.effects / f"{task_id}.{what}").stat().st_size
        except FileNotFoundError:
            return 0

    def ask(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        return self._conn.execute(statement.encode(), params).fetchall()

    @cached_property
    def _conn(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.settings["durable_database_url"], autocommit=True)

    @cached_property
    def _reader(self) -> Celery:
        keys = ("result_backend", "result_backend_transport_options")
        changes = {key: self.settings[key] for key in keys if key in self.settings}
        return Celery("reader", changes=changes, set_as_current=False)

    def close(self) -> None:
        self.worker.kill()
        if "_conn" in self.__dict__:
            self._conn.close()
        if "_reader" in self.__dict__:
            self._reader.close()


def _start(env: dict[str, str], workloads: list[tuple[str, list[str]]]) -> None:
    os.environ.update(env)
    app = importlib.import_module(APP)
    for kind, ids in workloads:
        app.start(kind, ids)


# --- recording and sweeping


def record(world: World, kinds: Iterable[str]) -> list[Target]:
    """Run each workload once, unharmed but for what it does to itself; list what it came past."""
    targets: list[Target] = []
    for kind in kinds:
        logger.info("recording %s", kind)
        workload = Workload(kind)
        world.start([workload])
        world.survive([workload])
        world.check(workload)
        for index, run in enumerate(workload.runs):
            targets += [Target(kind, index, point) for point in world.board.reached(run)]
        world.worker.stop()
        for role in ("client", "worker"):
            points = {CrashPoint(p.role, p.operation, p.moment) for p in world.board.reached(role)}
            targets += [Target(kind, None, point) for point in sorted(points)]
            world.board.forget(role)
    return targets


def once_each(targets: Iterable[Target]) -> list[Target]:
    """Keep the first of each operation and moment in each kind of process."""
    first: dict[tuple[str, str, str], Target] = {}
    for target in targets:
        point = target.point
        first.setdefault((point.role, point.operation, point.moment), target)
    return list(first.values())


class Sweep:
    """Hands crash points to worlds, and gathers what did not hold."""

    def __init__(self, worlds: Sequence[World]) -> None:
        self._worlds = worlds
        self.problems: list[str] = []

    def run(self, targets: Sequence[Target]) -> None:
        """Try them all. Children die in one worker's life, a main process only once."""
        in_children = [each for each in targets if each.point.role == "child"]
        rest = [each for each in targets if each.point.role != "child"]
        jobs = [in_children[n : n + BATCH] for n in range(0, len(in_children), BATCH)]
        jobs += [[each] for each in rest]
        with ThreadPoolExecutor(len(self._worlds)) as threads:
            pending = iter(jobs)
            list(threads.map(lambda world: self._work(world, pending), self._worlds))

    def _work(self, world: World, jobs: Iterator[list[Target]]) -> None:
        for job in jobs:
            started = time.monotonic()
            self._try(world, job)
            seconds = time.monotonic() - started
            logger.info("%4.1f s, %d points: %s, ...", seconds, len(job), job[0])

    def _try(self, world: World, targets: Sequence[Target]) -> None:
        armed = [(each, Workload(each.kind)) for each in targets]
        if any(each.index is None for each in targets):
            world.worker.kill()  # so that its start is come past again
        for target, workload in armed:
            world.board.arm(scope(target, workload), target.point)
        try:
            world.start([workload for _, workload in armed])
            world.survive([workload for _, workload in armed])
        except AssertionError as exc:
            self._complain(f"one of {[str(each) for each in targets]}: {exc}")
        for target, workload in armed:
            self._look(world, target, workload)

    def _look(self, world: World, target: Target, workload: Workload) -> None:
        where = scope(target, workload)
        if target.point.role == "worker" and not world.board.fired(where):
            world.worker.stop()  # it may be of the end
        if not world.board.fired(where):
            self._complain(f"{target} was not reached again")
        world.board.disarm(where)
        try:
            world.check(workload)
        except AssertionError as exc:
            self._complain(f"{target}: {exc}")

    def _complain(self, problem: str) -> None:
        logger.warning("%s", problem)
        self.problems.append(problem)


def scope(target: Target, workload: Workload) -> str:
    return target.point.role if target.index is None else workload.ids[target.index]


# --- tests


@pytest.fixture
def worlds(celery_broker: BrokerNode, database_url: str, tmp_path: Path) -> Iterator[list[World]]:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("CREATE TABLE sweep_rows (run_id uuid, x int)")
    settings = {
        **celery_broker.settings,
        **FAST,
        **result_backend(tmp_path),
        "durable_database_url": database_url,
    }
    made = [World(n, settings, tmp_path / f"world{n}") for n in range(WORLDS)]
    yield made
    for world in made:
        world.close()
    prefix = settings.get("result_backend_transport_options", {}).get("global_keyprefix")
    if prefix:
        delete_redis_keys(prefix)


def result_backend(directory: Path) -> dict[str, Any]:
    if services.is_reachable(services.REDIS):
        options = {"global_keyprefix": unique_name()}
        return {
            "result_backend": f"redis://{services.REDIS.address}/0",
            "result_backend_transport_options": options,
        }
    results = directory / "results"
    results.mkdir()
    return {"result_backend": results.as_uri()}


def test_every_operation_of_a_run_may_be_its_process_s_last(worlds: list[World]) -> None:
    targets = once_each(record(worlds[0], KINDS))
    sweep = Sweep(worlds)
    sweep.run(targets)
    assert not sweep.problems, "\n".join(sweep.problems)
