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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery import Celery

from durable.testing.crashes import VARIABLE, CrashBoard, CrashPoint
from tests.harness import apps, every_broker, services, wait_for
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
    "worker_prefetch_multiplier": 1,
}
#: What is different where processes are always new, and where chords are swept:
#: who dies between Celery's claim of a chord and its callback holds the claim,
#: for 5 s at least, and a repetition that comes sooner is taken for a double.
CLIMATES = {
    "warm": {},
    "cold": {"worker_max_tasks_per_child": 1},
    "chord": {
        "durable_tail_timeout": 8,
        "result_chord_join_timeout": 0.5,
        "broker_connection_timeout": 1,
        "task_publish_retry_policy": {"max_retries": 1},
    },
}
#: Workloads that are tried in one sort of world only. Those that are parked
#: several times take too long where each time costs a process.
ONLY_IN = {"chord": "chord", "parent": "warm", "waits": "warm", "spreads": "warm"}
#: How long a workload may take to recover, on a machine with other things to
#: do, and how much longer for each further one beside it.
PATIENCE = 40.0
MORE_PATIENCE = 5.0
#: How long to wait for what happens in a worker's own time.
LULL = 2.5
#: Worlds that are swept at once, as most of the time goes into waiting.
WORLDS = ("cold", "chord", "warm", "warm")
#: Share of the recorded points that has to be reached again, in three tries each.
REACHED = 0.95
#: Children that are killed in the life of one worker.
BATCH = 12


@dataclass(frozen=True)
class Kind:
    """A workload.

    Attributes:
        outputs: of its runs; None: it fails.
        note: whether a plain task is its last member.
        started: how many of the runs a client starts by itself.
        children: how many of the runs the first one starts.
        outcomes: how many tasks the first one waits for.
        events: sent to the first one, and whether each was refused.
    """

    outputs: tuple[Any, ...]
    note: bool = False
    started: int = 1
    children: int = 0
    outcomes: int = 0
    events: tuple[tuple[str, bool], ...] = ()


KINDS = {
    "chain": Kind((4, 14), note=True),
    "failure": Kind((None,)),
    "chord": Kind((11, 11), note=True, started=2),
    "parent": Kind((24, 11, 11), note=True, children=2, outcomes=4),
    "spreads": Kind((36,), children=3),
    "waits": Kind((11, 2), children=1, events=(('"no number"', True), ("4", False))),
    "message": Kind((4,)),
    "loses_child": Kind((1,)),
    "loses_worker": Kind((1,)),
}


@dataclass(frozen=True)
class Target:
    """A crash point of the member ``index`` of a workload; None: of no run in particular.

    Attributes:
        climate: the only sort of world in which it is come past; empty: any.
    """

    kind: str
    index: int | None
    point: CrashPoint
    climate: str = ""

    def scope(self, workload: Workload) -> str:
        """Whom the point is armed for: a run, or whichever process of the role comes first."""
        return self.point.role if self.index is None else workload.ids[self.index]

    def __str__(self) -> str:
        return f"{self.kind}[{'' if self.index is None else self.index}]: {self.point}"


@dataclass
class Workload:
    kind: str
    ids: list[str] = field(init=False)
    #: Runs of a start that came to nothing as a whole, but was accepted in part.
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.renew([])

    def renew(self, accepted: Sequence[str]) -> None:
        """Have other ids: a client that saw no start succeed makes its canvas anew."""
        kind = KINDS[self.kind]
        self.parts += accepted
        self.ids = [str(uuid.uuid4()) for _ in (*kind.outputs, *[None] * kind.note)]

    @property
    def runs(self) -> list[str]:
        return self.ids[: len(KINDS[self.kind].outputs)]


class World:
    """A queue, a namespace and a worker, beside other worlds in the same database.

    Args:
        climate: one of `CLIMATES`.
    """

    def __init__(
        self, name: str, settings: dict[str, Any], directory: Path, climate: str, children: int = 2
    ) -> None:
        directory.mkdir()
        self.climate = climate
        self.effects = directory / "effects"
        self.effects.mkdir()
        self.board = CrashBoard(directory / "crashes")
        self.settings = {
            **settings,
            "durable_namespace": name,
            "task_default_queue": f"{settings['task_default_queue']}.{name}",
            **CLIMATES[climate],
            "effects": str(self.effects),
        }
        self.env = {**apps.environment(self.settings), VARIABLE: str(self.board.directory)}
        self.log = directory / "worker.log"
        arguments = ["--concurrency", str(children), "--pool", "prefork", "--loglevel", "INFO"]
        arguments += ["--hostname", f"{name}@sweep", "--without-mingle", "--without-gossip"]
        self.worker = ForkedWorker(APP, log_path=self.log, env=self.env, args=arguments)

    # --- what happens in it

    def start(self, workloads: Sequence[Workload]) -> None:
        """Start them in a client process; again those that its death kept from being accepted."""
        while workloads:
            client = forked(_start, self.env, [(each.kind, each.ids) for each in workloads])
            client.join()
            if client.exitcode == 0:
                return
            workloads = [each for each in workloads if not self._accepted(each)]

    def _accepted(self, workload: Workload) -> bool:
        found = self.ask(
            "SELECT id::text FROM durable.workflow_runs WHERE id = ANY(%s::uuid[])", workload.runs
        )
        if len(found) >= KINDS[workload.kind].started:
            return True
        if workload.kind != "message":  # which may be on its way; the same one again does no harm
            workload.renew([row[0] for row in found])
        return False

    def survive(self, workloads: Sequence[Workload]) -> None:
        """Wait until nothing is left to do, starting the worker again whenever it has died."""

        def quiet() -> bool:
            if not self.worker.is_running():
                self.worker.start()
            return not self._unfinished(workloads)

        try:
            wait_for(quiet, timeout=PATIENCE + MORE_PATIENCE * len(workloads))
        except AssertionError:
            raise AssertionError(f"unfinished: {self._unfinished(workloads)}") from None

    def _unfinished(self, workloads: Sequence[Workload]) -> list[Any]:
        """Runs that are not over and told of, plain tasks that did not run."""
        runs = [run for each in workloads for run in (*each.runs, *each.parts)]
        over = "status IN ('succeeded', 'failed') AND available_at = 'infinity'"
        done = self.ask(
            f"SELECT id::text FROM durable.workflow_runs WHERE id = ANY(%s::uuid[]) AND {over}",
            runs,
        )
        left: list[Any] = sorted(set(runs) - {row[0] for row in done})
        for each in workloads:
            if KINDS[each.kind].note and not self.executions(each.ids[-1], "note"):
                left.append(("note", each.ids))
            if each.kind == "failure" and not self.executions(each.ids[0], "blame"):
                left.append(("blame", each.ids))
        return left

    # --- what came of it

    def check(self, workload: Workload) -> None:
        """Same results, no committed step run again, rows of a session there once."""
        for run, output in zip(workload.runs, KINDS[workload.kind].outputs, strict=True):
            row = self.ask("SELECT status, output FROM durable.workflow_runs WHERE id = %s", run)
            assert row == [("succeeded", output) if output is not None else ("failed", None)]
            self._check_steps(run)
            state = "SUCCESS" if output is not None else "FAILURE"
            assert self._backend_state(run) == state
            if state == "SUCCESS":
                assert not self.executions(run, "blame"), "an errback of what did not fail"
        self._check_children(workload)
        self._check_events(workload)

    def _check_children(self, workload: Workload) -> None:
        """Each task that a body starts is there once, and its outcome is in the history once."""
        kind, first = KINDS[workload.kind], workload.ids[0]
        children = "SELECT count(*) FROM durable.workflow_runs WHERE parent_run_id = %s"
        assert self.ask(children, first) == [(kind.children,)]
        outcomes = (
            "SELECT count(*), count(*) FILTER (WHERE status = 'succeeded')"
            " FROM durable.step_attempts WHERE workflow_run_id = %s AND kind = 'result'"
        )
        assert self.ask(outcomes, first) == [(kind.outcomes, kind.outcomes)]

    def _check_events(self, workload: Workload) -> None:
        """Each event is there once, in order, and was consumed once."""
        events = self.ask(
            "SELECT payload::text, error IS NOT NULL, consumed_ordinal IS NOT NULL"
            " FROM durable.workflow_events WHERE workflow_run_id = %s ORDER BY seq",
            workload.ids[0],
        )
        assert events == [(*event, True) for event in KINDS[workload.kind].events]

    def _check_steps(self, run: str) -> None:
        steps = self.ask(
            "SELECT step_name, output FROM durable.step_attempts"
            " WHERE workflow_run_id = %s AND status = 'succeeded' AND kind = 'run'",
            run,
        )
        names = [name.rpartition(".")[2] for name, _ in steps]
        assert len(names) == len(set(names))
        for name, (_, output) in zip(names, steps, strict=True):
            assert self.executions(run, name) == output["execution"], f"{name} ran after its commit"
        rows = self.ask("SELECT count(*) FROM sweep_rows WHERE run_id = %s", run)
        assert rows == [(int("store" in names),)]

    def _backend_state(self, run: str) -> str:
        return str(self._reader.backend.get_task_meta(run)["status"])

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


def record(world: World, kinds: Sequence[str]) -> list[Target]:
    """Run the workloads, unharmed but for what they do to themselves; list what they came past.

    Then once more by one child process which has done it all before. What it
    does not come past belongs to a new process, and is tried in a world where
    each task has one.
    """
    peaceful = [kind for kind in kinds if not kind.startswith("loses")]
    first = list(_record(world, kinds))
    for _ in range(2):
        again = list(_record(world, peaceful))
    world.worker.stop()
    first += _record_role(world, "worker", peaceful[0])
    warm = {each.point.operation for each in again if each.point.role == "child"}
    every = [
        replace(each, climate="cold")
        if each.point.role == "child" and each.point.operation not in warm
        else replace(each, climate=ONLY_IN.get(each.kind, ""))
        for each in [*again, *first]
    ]
    return list(dict.fromkeys(every))


def _record(world: World, kinds: Sequence[str]) -> Iterator[Target]:
    for kind in kinds:
        workload = Workload(kind)
        world.start([workload])
        world.survive([workload])
        world.check(workload)
        for index, run in enumerate(workload.runs):
            for point in world.board.reached(run):
                yield Target(kind, index, point)
        if KINDS[kind].outcomes:  # a run waits for the plain task, which Celery lets fail
            for point in world.board.reached(workload.ids[-1]):
                if point.operation.startswith("sql") or point.moment in {"before", "after"}:
                    yield Target(kind, len(workload.runs), point)
        yield from _record_role(world, "client", kind)
        yield from _record_role(world, "worker", kind)


def _record_role(world: World, role: str, kind: str) -> Iterator[Target]:
    points = {CrashPoint(p.role, p.operation, p.moment) for p in world.board.reached(role)}
    world.board.forget(role)
    for point in sorted(points):
        yield Target(kind, None, point)


def once_each(targets: Iterable[Target]) -> list[Target]:
    """Keep each operation once in each kind of process, and of it what takes no second look.

    It is died before and after; where that is cheap its answer is lost, and
    what is not SQL is refused.
    """
    first: dict[tuple[str, str, str], Target] = {}
    # A new process for each task is slow: there the workload is to be small.
    for target in sorted(targets, key=_cost):
        point = target.point
        dies = point.moment in {"before", "after"}
        breaks = point.moment == "lost" or not point.operation.startswith("sql")
        cold = target.climate == "cold"
        if cold and target.kind.startswith("loses"):
            continue  # only by chance
        if dies or (breaks and not cold and point.role != "worker"):
            first.setdefault((_part_of(target), _sort_of(point), point.moment), target)
    return list(first.values())


def _part_of(target: Target) -> str:
    """Name the process; what a parent and its child tell each other is tried for itself."""
    told = target.point.operation.startswith(("sql", "publish")) and target.point.role == "child"
    if not told or target.index is None or not _waits(target) or target.climate == "cold":
        return target.point.role
    return "parent" if target.index == 0 else "its child"


def _waits(target: Target) -> bool:
    return bool(KINDS[target.kind].outcomes)


def _cost(target: Target) -> int:
    return len(KINDS[target.kind].outputs) if target.climate == "cold" else 0


def _sort_of(point: CrashPoint) -> str:
    """Name what is the same for all tasks: a child's publish is of what follows a run."""
    kind, _, what = point.operation.partition(" ")
    return (
        kind if kind == "ack" or (kind == "publish" and point.role != "child") else f"{kind} {what}"
    )


class Sweep:
    """Hands crash points to worlds, and gathers what did not hold."""

    def __init__(self, worlds: Sequence[World]) -> None:
        self._worlds = worlds
        self.problems: list[str] = []
        self.fired = 0

    def run(self, targets: Sequence[Target]) -> None:
        """Try them all. Children die in one worker's life, a main process only once."""
        together, alone = [], []
        for target in targets:
            harmless = target.point.role == "child" and target.kind != "loses_worker"
            (together if harmless else alone).append(target)
        queues: dict[str, deque[list[Target]]] = {}
        for climate in ("", *CLIMATES):
            batches = _batches([each for each in together if each.climate == climate])
            singles = [[each] for each in alone if each.climate == climate]
            queues[climate] = deque([*batches, *singles])
        with ThreadPoolExecutor(len(self._worlds)) as threads:
            list(
                threads.map(lambda w: self._work(w, (queues[w.climate], queues[""])), self._worlds)
            )

    def _work(self, world: World, queues: Iterable[deque[list[Target]]]) -> None:
        for jobs in queues:
            while True:
                try:
                    job = jobs.popleft()
                except IndexError:
                    break
                started = time.monotonic()
                self._try(world, job)
                seconds = time.monotonic() - started
                logger.info("%4.1f s, %d points: %s, ...", seconds, len(job), job[0])

    def _try(self, world: World, targets: Sequence[Target], tries: int = 3) -> None:
        armed = [(each, Workload(each.kind)) for each in targets]
        scopes = [target.scope(workload) for target, workload in armed]
        for scope, target in zip(scopes, targets, strict=True):
            world.board.arm(scope, target.point)
        workloads = [workload for _, workload in armed]
        world.start(workloads)
        self._hold(world, armed)
        if targets[0].point.role == "worker" and not world.board.fired(scopes[0]):
            self._wait_for_worker(world, targets[0], scopes[0], workloads)
            self._hold(world, armed)
        for scope, target in zip(scopes, targets, strict=True):
            if world.board.fired(scope):
                self.fired += 1
            elif tries == 1:
                logger.warning("%s was not reached again", target)
            else:  # as things went, it was another process's turn
                world.board.disarm(scope)
                self._try(world, [target], tries - 1)

    def _hold(self, world: World, armed: Sequence[tuple[Target, Workload]]) -> None:
        """Have the worlds survive, and everything as it would have been."""
        try:
            world.survive([workload for _, workload in armed])
        except AssertionError as exc:
            self._complain(f"{' or '.join(str(target) for target, _ in armed)}: {exc}")
            return
        for target, workload in armed:
            try:
                world.check(workload)
            except AssertionError as exc:
                self._complain(f"{target}: {exc}")

    def _wait_for_worker(
        self, world: World, target: Target, scope: str, workloads: Sequence[Workload]
    ) -> None:
        """Let a worker come past what it does in its own time, at its start, or at its end."""

        def fired() -> bool:
            with suppress(AssertionError):
                wait_for(lambda: world.board.fired(scope), timeout=LULL)
            return world.board.fired(scope)

        if not fired() and target.index is None:
            world.worker.stop()
            world.survive(workloads)
            fired()

    def _complain(self, problem: str) -> None:
        logger.warning("%s", problem)
        self.problems.append(problem)


def _batches(targets: Sequence[Target]) -> Iterator[list[Target]]:
    for start in range(0, len(targets), BATCH):
        yield list(targets[start : start + BATCH])


# --- tests


@pytest.fixture
def make_world(
    celery_broker: BrokerNode, database_url: str, tmp_path: Path
) -> Iterator[Callable[..., World]]:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("CREATE TABLE sweep_rows (run_id uuid, x int)")
    settings = {
        **celery_broker.settings,
        **FAST,
        **result_backend(tmp_path),
        "durable_database_url": database_url,
    }
    # A dead worker's messages are hidden for an hour; the plain tasks have nothing else.
    if celery_broker.container.name == "redis":
        settings["broker_transport_options"]["visibility_timeout"] = 2
    worlds: list[World] = []

    def make(name: str, climate: str, **options: Any) -> World:
        worlds.append(World(name, settings, tmp_path / name, climate, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
    if "result_backend_transport_options" in settings:
        delete_redis_keys(settings["result_backend_transport_options"]["global_keyprefix"])


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


@pytest.fixture
def recorded(
    make_world: Callable[..., World], celery_broker: BrokerNode, request: pytest.FixtureRequest
) -> list[Target]:
    """All points, or those that the command line asks for."""
    recorder = make_world("recorder", "warm", children=1)
    found = record(recorder, list(KINDS))
    recorder.close()
    # What a worker dies with that had taken plain tasks is theirs to survive,
    # and Redis may take 100 s to give them to another, whatever its timeout.
    if celery_broker.container.name == "redis":
        found = [each for each in found if each.point.role != "worker" or not _waits(each)]
    return [each for each in found if request.config.getoption("sweep_point") in str(each)]


def sweep(make_world: Callable[..., World], targets: Sequence[Target]) -> None:
    sweep = Sweep([make_world(f"world{n}", climate) for n, climate in enumerate(WORLDS)])
    sweep.run(targets)
    logger.info("%d of %d points", sweep.fired, len(targets))
    assert not sweep.problems, "\n".join(sweep.problems)
    # Which process comes first is chance, but the points are there to be hit.
    assert sweep.fired >= REACHED * len(targets)


def test_every_operation_of_a_run_may_be_its_process_s_last(
    make_world: Callable[..., World], recorded: list[Target]
) -> None:
    operations = {each.point.operation.split()[0] for each in recorded}
    assert operations >= {"sql", "publish", "ack", "backend"}
    sweep(make_world, once_each(recorded))


@every_broker
def test_every_single_point_on_every_broker(
    request: pytest.FixtureRequest, celery_broker: BrokerNode
) -> None:
    if request.config.getoption("sweep") != "full":
        pytest.skip("takes many minutes: make sweep")
    targets = request.getfixturevalue("recorded")
    if celery_broker.container.name == "filesystem":
        # With a worker it loses the messages that the worker had taken: a run
        # is rung again, a plain task has nothing else.
        targets = [each for each in targets if is_durable_throughout(each)]
    sweep(request.getfixturevalue("make_world"), targets)


def is_durable_throughout(target: Target) -> bool:
    return target.point.role != "worker" or target.kind in {"loses_child", "loses_worker"}
