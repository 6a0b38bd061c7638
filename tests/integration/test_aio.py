"""What branches of an ``async def`` body wait for, on a real Postgres: who goes on, when it parks."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import durable
from durable import RecoverableError, aio, loop
from durable.classify import Classifier
from durable.clock import SYSTEM
from durable.codec import Codec
from durable.errors import EventTimeout, Suspend
from durable.execution import Execution, Services
from durable.history import History
from durable.journal import PostgresJournal
from durable.lease import Lease
from durable.retry import RetryPolicy
from durable.steps import Step
from durable.store import events
from durable.store.events import NewEvent
from durable.store.pool import Database
from durable.store.sessions import Sessions
from tests.harness import wait_for
from tests.harness.store import Store

SOON = "0.3s"
LATE = "1h"


@dataclass
class Run:
    """One run, executed claim by claim as a worker does, without a worker."""

    store: Store
    database: Database
    id: str
    ran: Counter[str] = field(default_factory=Counter)
    execution: Execution | None = None
    lease: Lease = field(default_factory=lambda: Lease(3600.0, SYSTEM.monotonic))

    def __call__(self, body: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Claim it and execute the body; None if it stopped."""
        found = self.store.claim(self.id, pid=os.getpid())
        assert found is not None
        claim, history = found
        self.lease.renew(SYSTEM.monotonic())
        sessions = Sessions(self.database, 1)
        self.execution = Execution(
            id=claim.id,
            name=claim.name,
            attempt=claim.attempt,
            history=History(history),
            journal=PostgresJournal(self.database, sessions, self.lease, claim),
            services=Services(Codec(), Classifier(), SYSTEM, ("tests",)),
            generation=claim.generation,
        )
        with self.execution.active():
            try:
                return loop.run(self.execution, body())
            except Suspend:
                return None
            finally:
                sessions.close()

    @property
    def stopped(self) -> str | None:
        assert self.execution is not None
        suspension = self.execution.suspension
        return None if suspension is None else suspension.reason

    def row(self) -> dict[str, Any]:
        return self.store.row(self.id)

    def wake(self) -> None:
        """Do what the dispatcher does when the run is due."""
        self.store.set(self.id, status="'pending'", available_at="now()")

    def due(self) -> None:
        """Wait until it is due, and wake it."""
        wait_for(lambda: (self.row()["due_in"] or 0) <= 0, what="the run to be due")
        self.wake()

    def send(self, event_type: str, payload: object) -> None:
        event = NewEvent(
            id=str(uuid.uuid4()),
            run_id=self.id,
            namespace="default",
            type=event_type,
            payload=Codec().encode(payload, "x"),
            idempotency_key=None,
        )
        self.database.call(events.send, event)

    def places(self) -> list[tuple[str, int, str, str]]:
        return self.store.conn.execute(
            "SELECT branch, ordinal, step_name, status FROM durable.step_attempts"
            " WHERE workflow_run_id = %s ORDER BY 1, 2, attempt",
            (self.id,),
        ).fetchall()

    def step(self, label: str, seconds: float = 0.0, failures: int = 0, **options: Any) -> Any:
        """A step that takes its time, and fails so many times first."""

        async def body() -> str:
            self.ran[label] += 1
            await asyncio.sleep(seconds)
            if (durable.current().step_attempt or 0) <= failures:
                raise RecoverableError("not yet")
            return label

        return Step(body, label, RetryPolicy.from_options(**options))


@pytest.fixture
def run(store: Store, database: Database, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    with caplog.at_level(logging.WARNING, logger="asyncio"):
        yield Run(store, database, store.start())
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


# --- who goes on, and when it parks


def test_a_branch_does_all_it_can_before_the_run_parks(run: Run) -> None:
    steps = [run.step(f"s{number}", 0.01) for number in range(5)]

    async def sleeps() -> str:
        await aio.sleep(LATE)
        return "slept"

    async def works() -> list[str]:
        done = [await each() for each in steps]
        await aio.sleep("2h")
        return done

    async def body() -> Any:
        return await asyncio.gather(sleeps(), works())

    assert run(body) is None
    row = run.row()
    assert (row["status"], row["reason"]) == ("sleeping", "sleep")
    assert 3590 < row["due_in"] <= 3600
    assert run.ran == {f"s{number}": 1 for number in range(5)}
    assert run.stopped == "sleep"


def test_it_is_woken_for_the_first_due_branch_and_then_for_the_next(run: Run) -> None:
    async def branch(label: str, seconds: float) -> str:
        await aio.sleep(seconds)
        return str(await run.step(label)())

    async def body() -> Any:
        return await asyncio.gather(branch("long", 0.6), branch("short", 0.2))

    assert run(body) is None
    assert run.row()["due_in"] < 0.25
    run.due()
    assert run(body) is None
    assert run.ran == {"short": 1}
    run.due()
    assert run(body) == ["long", "short"]
    assert run.ran == {"long": 1, "short": 1}


def test_a_running_step_ends_and_is_recorded_before_the_park(run: Run) -> None:
    async def body() -> Any:
        return await asyncio.gather(aio.sleep(LATE), run.step("slow", 0.3)())

    run(body)
    assert ("1", 0, "slow", "succeeded") in run.places()
    assert run.row()["status"] == "sleeping"


def test_a_sleep_that_is_over_while_another_branch_works_is_not_parked_for(run: Run) -> None:
    async def sleeps() -> str:
        await aio.sleep(0.05)
        return str(await run.step("after the sleep")())

    async def body() -> Any:
        return await asyncio.gather(sleeps(), run.step("slow", 0.4)())

    assert run(body) == ["after the sleep", "slow"]
    assert run.row()["attempt"] == 1


def test_an_event_comes_to_a_branch_while_another_works(run: Run) -> None:
    order: list[str] = []

    async def waits() -> Any:
        payload = await aio.wait_for_event("go")
        order.append("event")
        return payload

    async def until_it_came() -> None:
        run.send("go", {"n": 1})
        while not order:  # noqa: ASYNC110 - it comes from Postgres
            await asyncio.sleep(0.01)

    async def works() -> None:
        await aio.run_step("long", until_it_came)
        order.append("long")

    async def body() -> Any:
        return (await asyncio.gather(waits(), works()))[0]

    assert run(body) == {"n": 1}
    assert order == ["event", "long"]


def test_an_event_wakes_one_branch_and_the_run_parks_for_the_other(run: Run) -> None:
    async def branch(event_type: str) -> Any:
        return await aio.wait_for_event(event_type)

    async def body() -> Any:
        return await asyncio.gather(branch("a"), branch("b"), aio.sleep(LATE))

    assert run(body) is None
    row = run.row()
    assert (row["status"], row["reason"]) == ("waiting", "event a, event b, sleep")
    assert 3590 < row["due_in"] <= 3600
    run.send("b", 2)
    assert run.row()["status"] == "pending"
    assert run(body) is None
    assert ("1", 0, "b", "succeeded") in run.places()
    assert run.row()["status"] == "waiting"


def test_a_wait_that_times_out_raises_in_its_branch_alone(run: Run) -> None:
    async def waits() -> str:
        try:
            await aio.wait_for_event("never", timeout=0.1)
        except EventTimeout:
            return "late"
        raise AssertionError

    async def body() -> Any:
        return await asyncio.gather(waits(), run.step("slow", 0.4)())

    assert run(body) == ["late", "slow"]
    run.wake()
    assert run(body) == ["late", "slow"]


def test_a_cancel_is_seen_while_branches_wait_and_one_works(run: Run) -> None:
    async def until_it_is_seen() -> None:
        run.store.cancel(run.id)
        while not run.stopped:  # noqa: ASYNC110 - it comes from Postgres
            await asyncio.sleep(0.01)

    async def works() -> None:
        await aio.run_step("long", until_it_is_seen)
        await run.step("next")()

    async def body() -> Any:
        return await asyncio.gather(aio.wait_for_event("never"), works())

    assert run(body) is None
    assert run.stopped == "cancel"
    assert run.ran == {}
    assert ("1", 0, "long", "succeeded") in run.places()


def test_a_warm_shutdown_lets_steps_end_and_hands_the_run_back(run: Run) -> None:
    slow, quick = run.step("slow", 0.4), run.step("quick", 0.1)

    async def two() -> None:
        await quick()
        run.lease.begin_shutdown()
        await run.step("never")()

    async def body() -> Any:
        return await asyncio.gather(slow(), two(), aio.sleep(LATE))

    assert run(body) is None
    assert run.stopped == "hand-back"
    assert run.ran == {"slow": 1, "quick": 1}
    assert ("0", 0, "slow", "succeeded") in run.places()
    assert run.row()["status"] == "pending"


def test_a_worker_that_lost_the_run_stops_all_branches(run: Run) -> None:
    async def two() -> None:
        await run.step("first")()
        run.store.release_child(pid=os.getpid())
        await run.step("second")()

    async def body() -> Any:
        return await asyncio.gather(aio.wait_for_event("x"), two())

    assert run(body) is None
    assert run.stopped == "fenced"
    assert [name for _, _, name, _ in run.places() if name != "x"] == ["first"]


@pytest.mark.parametrize("both", [False, True])
def test_a_race_has_the_same_winner_on_every_replay(run: Run, both: bool) -> None:
    async def body() -> Any:
        event = asyncio.create_task(aio.wait_for_event("go"))
        timer = asyncio.create_task(aio.sleep(0.3))
        done, pending = await asyncio.wait({event, timer}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        won = "event" if event in done else "timer"
        await run.step(f"{won} {len(done)}")()
        await aio.sleep(0.4)
        return won, len(done)

    assert run(body) is None
    if both:  # by then the timer has run out too
        wait_for(lambda: (run.row()["due_in"] or 0) <= 0, what="the timer to run out")
    run.send("go", 1)
    assert run(body) is None
    run.due()
    assert run(body) == ("event", 1)
    assert run.ran == {"event 1": 1}


# --- back-off


def test_a_back_off_in_one_branch_holds_up_and_cancels_no_other(run: Run) -> None:
    flaky = run.step("flaky", failures=1, retry_backoff=500, retry_jitter=False)
    steps = [run.step(f"s{number}", 0.01) for number in range(3)]

    async def works() -> list[str]:
        return [await each() for each in steps]

    async def body() -> Any:
        return await asyncio.gather(flaky(), works())

    assert run(body) is None
    row = run.row()
    assert (row["status"], row["reason"]) == ("sleeping", "retry")
    assert 490 < row["due_in"] <= 500
    assert run.ran == {"flaky": 1, "s0": 1, "s1": 1, "s2": 1}
    suspension = run.execution.suspension if run.execution else None
    assert suspension is not None
    assert isinstance(suspension.cause, RecoverableError)


def test_a_branch_that_is_woken_by_another_keeps_to_its_back_off(run: Run) -> None:
    flaky = run.step("flaky", failures=1, retry_backoff=500, retry_jitter=False)

    async def body() -> Any:
        return await asyncio.gather(flaky(), aio.wait_for_event("go"))

    assert run(body) is None
    run.send("go", 1)
    assert run.row()["status"] == "pending"
    assert run(body) is None
    assert run.ran == {"flaky": 1}
    assert run.row()["status"] == "sleeping"
    assert 480 < run.row()["due_in"] <= 500
    run.store.conn.execute(
        "UPDATE durable.step_attempts SET completed_at = now() - interval '500 s'"
        " WHERE step_name = 'flaky'"
    )
    run.wake()
    assert run(body) == ["flaky", 1]
    assert run.ran == {"flaky": 2}


def test_a_back_off_that_ends_while_another_branch_works_is_not_parked_for(run: Run) -> None:
    flaky = run.step("flaky", failures=1, retry_backoff=0.1, retry_jitter=False)

    async def body() -> Any:
        return await asyncio.gather(flaky(), run.step("slow", 0.5)())

    assert run(body) == ["flaky", "slow"]
    assert run.row()["attempt"] == 1


def test_the_back_off_of_a_plain_step_stops_its_branch_alone(run: Run) -> None:
    def fail_once() -> str:
        run.ran["plain"] += 1
        if run.ran["plain"] == 1:
            raise RecoverableError("not yet")
        return "plain"

    plain = Step(fail_once, "plain", RetryPolicy.from_options(retry_backoff=0.1))
    others = [run.step(f"s{number}", 0.01) for number in range(3)]
    seen: list[str] = []

    async def first() -> Any:
        try:
            return plain()
        except BaseException:
            seen.append("unwound")
            raise

    async def second() -> list[str]:
        return [await each() for each in others]

    async def body() -> Any:
        return await asyncio.gather(first(), second())

    assert run(body) is None
    assert seen == ["unwound"]
    assert run.ran == {"plain": 1, "s0": 1, "s1": 1, "s2": 1}
    assert (run.row()["status"], run.row()["reason"]) == ("sleeping", "retry")
    run.due()
    assert run(body) == ["plain", ["s0", "s1", "s2"]]


def test_a_stopped_branch_that_swallows_it_takes_nobody_along(run: Run) -> None:
    def fail() -> None:
        raise RecoverableError("not yet")

    plain = Step(fail, "plain", RetryPolicy.from_options(retry_backoff=500))

    async def swallows() -> str:
        try:
            plain()
        except BaseException:  # noqa: BLE001 - what users write
            return "as if nothing had happened"
        raise AssertionError

    async def body() -> Any:
        await asyncio.gather(swallows(), run.step("other", 0.1)())
        await run.step("after")()

    assert run(body) is None
    assert run.ran == {"other": 1}


# --- ends


def test_the_end_of_an_attempt_runs_finally_blocks_in_which_nothing_begins(run: Run) -> None:
    seen: list[str] = []

    async def branch(label: str) -> None:
        try:
            await aio.sleep(LATE)
        finally:
            seen.append(label)
            await run.step(f"never {label}")()

    async def body() -> None:
        await asyncio.gather(branch("a"), branch("b"))

    assert run(body) is None
    assert sorted(seen) == ["a", "b"]
    assert run.ran == {}
    assert run.row()["status"] == "sleeping"


def test_a_branch_that_nobody_awaits_cannot_keep_the_run_from_its_end(run: Run) -> None:
    seen: list[str] = []

    async def left() -> None:
        try:
            await aio.sleep(LATE)
        finally:
            seen.append("canceled")
            await aio.wait_for_event("never")

    async def body() -> str:
        task = asyncio.create_task(left())
        await run.step("one", 0.05)()
        return f"{task.done()}"

    assert run(body) == "False"
    assert seen == ["canceled"]


def test_events_of_one_type_go_to_branches_in_the_order_of_their_waits(run: Run) -> None:

    async def branch(number: int) -> Any:
        return await aio.wait_for_event("go")

    async def until_all_came() -> None:
        for number in range(8):
            run.send("go", number)
        while any(status == "running" for *_, status in run.places()):  # noqa: ASYNC110 - Postgres
            await asyncio.sleep(0.05)

    async def body() -> Any:
        got = await asyncio.gather(
            *(branch(number) for number in range(8)), aio.run_step("send", until_all_came)
        )
        return got[:-1]

    assert run(body) == list(range(8))


def test_errors_that_nobody_came_to_await_make_no_noise_when_the_run_parks(run: Run) -> None:
    async def fails() -> None:
        await run.step("fails", failures=9, max_retries=0)()

    async def body() -> None:
        task = asyncio.create_task(fails())
        await aio.sleep(LATE)
        await task

    assert run(body) is None
    assert run.ran == {"fails": 1}
    assert run.row()["status"] == "sleeping"


def test_a_body_with_idle_sockets_parks_after_a_second(run: Run) -> None:
    here, there = socket.socketpair()
    here.setblocking(False)
    timers: list[asyncio.TimerHandle] = []

    async def body() -> None:
        running = asyncio.get_running_loop()
        running.add_reader(here, lambda: None)  # as a connection that is kept
        timers.append(running.call_later(3600, lambda: None))
        await aio.sleep(LATE)

    started = SYSTEM.monotonic()
    assert run(body) is None
    assert run.row()["status"] == "sleeping"
    assert 0.9 < SYSTEM.monotonic() - started < 5
    here.close()
    there.close()


def test_what_a_body_does_by_itself_is_waited_for(run: Run) -> None:
    """A timer or a thread of the body's own goes on: the run does not park over it."""
    seen: list[str] = []

    async def naps() -> None:
        await asyncio.sleep(1.3)
        seen.append("nap")

    async def in_thread() -> None:
        await asyncio.to_thread(threading.Event().wait, 1.3)
        seen.append("thread")

    async def body() -> None:
        await asyncio.gather(naps(), in_thread(), aio.sleep(LATE))

    assert run(body) is None
    assert sorted(seen) == ["nap", "thread"]
    assert run.row()["status"] == "sleeping"


def test_a_branch_that_never_rests_does_not_keep_another_from_its_event(run: Run) -> None:
    done: list[Any] = []

    async def waits() -> None:
        done.append(await aio.wait_for_event("go"))

    async def spins() -> None:
        run.send("go", 1)
        while not done:  # noqa: ASYNC110 - that is the point
            await asyncio.sleep(0)

    async def body() -> list[Any]:
        await asyncio.gather(waits(), spins())
        return done

    assert run(body) == [1]


def test_a_session_of_an_async_step_is_one_commit_with_its_result(run: Run) -> None:
    from sqlalchemy import text

    async def writes() -> int:
        session = durable.session()
        await asyncio.sleep(0.01)
        session.execute(text("SELECT 1"))
        return 1

    step = Step(writes, "writes", RetryPolicy())

    async def body() -> Any:
        return await asyncio.gather(step(), step())

    assert run(body) == [1, 1]
    assert [status for *_, status in run.places()] == ["succeeded"] * 2
