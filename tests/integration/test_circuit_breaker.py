"""A circuit breaker's row: counted, opened, probed and closed by many at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest
from celery import Celery

from durable import CircuitBreaker, CircuitOpen, Durable, PermanentError
from durable.store import circuit_breakers
from durable.store.circuit_breakers import Admission, Key
from tests.harness.store import Background, Store, traced

NUMBERS = itertools.count(1)
RESET = 60.0


@pytest.fixture
def key() -> Key:
    return Key("default", f"service-{next(NUMBERS)}")


def admit(store: Store, key: Key) -> Admission:
    return circuit_breakers.admit(store.conn, key, RESET)


def generation(store: Store, key: Key) -> int:
    """The generation of a call that is let through."""
    number = admit(store, key).generation
    assert number is not None
    return number


def fail(store: Store, key: Key, generation: int, *, threshold: int = 3) -> int | None:
    return circuit_breakers.failed(
        store.conn, key, generation, threshold=threshold, reset_timeout=RESET
    )


def failures(store: Store, key: Key) -> int:
    row = store.conn.execute(
        "SELECT failures FROM durable.circuit_breakers WHERE name = %s", (key.name,)
    ).fetchone()
    assert row is not None
    return int(row[0])


def open_it(store: Store, key: Key) -> None:
    assert fail(store, key, generation(store, key), threshold=1) == 1


def let_the_time_pass(store: Store, key: Key) -> None:
    """Bring the time of the next probe."""
    store.conn.execute(
        "UPDATE durable.circuit_breakers SET next_probe_at = now() WHERE name = %s", (key.name,)
    )


def probe(store: Store, key: Key) -> int:
    """Be the probe of an open breaker."""
    let_the_time_pass(store, key)
    admission = admit(store, key)
    assert admission.probe
    assert admission.generation is not None
    return admission.generation


# --- one call after the other


def test_it_opens_at_the_threshold_and_says_how_long_to_wait(store: Store, key: Key) -> None:
    numbers = [generation(store, key) for _ in range(3)]
    assert [fail(store, key, number) for number in numbers] == [None, None, 3]
    refused = admit(store, key)
    assert (refused.generation, refused.due_in) == (None, pytest.approx(RESET, abs=5))


def test_breakers_of_another_namespace_are_others(store: Store, key: Key) -> None:
    open_it(store, key)
    assert admit(store, Key("elsewhere", key.name)).generation == 0


def test_a_probe_that_succeeds_closes_it(store: Store, key: Key) -> None:
    open_it(store, key)
    number = probe(store, key)
    assert circuit_breakers.state(store.conn, key) == "half_open"
    assert circuit_breakers.succeeded(store.conn, key, number)
    assert admit(store, key) == Admission(number + 1)
    assert failures(store, key) == 0


def test_a_probe_that_fails_opens_it_again_whatever_the_threshold(store: Store, key: Key) -> None:
    open_it(store, key)
    assert fail(store, key, probe(store, key), threshold=100) is not None
    assert circuit_breakers.state(store.conn, key) == "open"
    assert admit(store, key).due_in == pytest.approx(RESET, abs=5)


def test_a_probe_that_learnt_nothing_leaves_its_place_to_the_next_call(
    store: Store, key: Key
) -> None:
    open_it(store, key)
    circuit_breakers.give_back(store.conn, key, probe(store, key))
    assert admit(store, key).probe
    assert not admit(store, key).probe


def test_a_call_from_before_it_opened_counts_no_more(store: Store, key: Key) -> None:
    late, later = generation(store, key), generation(store, key)
    open_it(store, key)
    assert fail(store, key, late, threshold=1) is None
    assert not circuit_breakers.succeeded(store.conn, key, later)
    assert circuit_breakers.state(store.conn, key) == "open"
    assert failures(store, key) == 1


def test_a_probe_that_is_silent_is_replaced_and_comes_too_late(store: Store, key: Key) -> None:
    open_it(store, key)
    silent = probe(store, key)
    assert admit(store, key).due_in == pytest.approx(RESET, abs=5)

    second = probe(store, key)
    assert not circuit_breakers.succeeded(store.conn, key, silent)
    assert fail(store, key, silent, threshold=1) is None
    assert circuit_breakers.state(store.conn, key) == "half_open"
    assert circuit_breakers.succeeded(store.conn, key, second)


def test_a_call_costs_one_round_trip_while_it_is_closed(store: Store, key: Key) -> None:
    admit(store, key)
    with traced(store.conn) as counted:
        admit(store, key)
    assert (counted.statements, counted.round_trips) == (1, 1)


# --- two at once


def test_the_first_two_calls_make_one_breaker(
    store: Store, other: Store, background: Background, key: Key
) -> None:
    with store.conn.transaction():
        first = admit(store, key)
        second = background.blocked(other, admit, other, key)
    assert (first, second.result()) == (Admission(0), Admission(0))


def test_two_failures_at_once_are_two(
    store: Store, other: Store, background: Background, key: Key
) -> None:
    number = generation(store, key)
    fail(store, key, number)
    with store.conn.transaction():
        assert fail(store, key, number) is None
        third = background.blocked(other, fail, other, key, number)
    assert third.result() == 3
    assert circuit_breakers.state(store.conn, key) == "open"


def test_of_two_failures_at_the_threshold_one_opens_it(
    store: Store, other: Store, background: Background, key: Key
) -> None:
    number = generation(store, key)
    with store.conn.transaction():
        assert fail(store, key, number, threshold=1) == 1
        second = background.blocked(other, lambda: fail(other, key, number, threshold=1))
    assert second.result() is None
    assert failures(store, key) == 1


def test_of_two_calls_that_find_a_probe_due_one_is_let_through(
    store: Store, other: Store, background: Background, key: Key
) -> None:
    open_it(store, key)
    let_the_time_pass(store, key)
    with store.conn.transaction():
        assert admit(store, key).probe
        second = background.blocked(other, admit, other, key)
    assert second.result() == Admission(None, due_in=RESET)


def test_a_probe_and_its_replacement_do_not_both_close_it(
    store: Store, other: Store, background: Background, key: Key
) -> None:
    open_it(store, key)
    silent = probe(store, key)
    let_the_time_pass(store, key)
    with store.conn.transaction():
        assert admit(store, key).probe
        late = background.blocked(other, circuit_breakers.succeeded, other.conn, key, silent)
    assert not late.result()
    assert circuit_breakers.state(store.conn, key) == "half_open"


# --- the object


@pytest.fixture
def app(store_url: str) -> Iterator[Celery]:
    app = Celery("breakers", broker="memory://")
    Durable(app, database_url=store_url)
    app.set_current()
    yield app
    app.durable.close()
    app.close()


@pytest.fixture
def breaker(app: Celery, key: Key) -> CircuitBreaker:
    return CircuitBreaker(key.name, failure_threshold=2, reset_timeout=RESET)


def call(breaker: CircuitBreaker, error: BaseException | None = None) -> None:
    with breaker:
        if error is not None:
            raise error


def attempt(breaker: CircuitBreaker, *errors: BaseException) -> None:
    for error in errors:
        with pytest.raises(type(error)):
            call(breaker, error)


DOWN = ConnectionRefusedError(111, "refused")


def test_an_outage_opens_it_and_calls_are_refused(breaker: CircuitBreaker) -> None:
    attempt(breaker, DOWN, TimeoutError())
    with pytest.raises(CircuitOpen, match="may be tried again in") as refused:
        call(breaker)
    assert refused.value.breaker == breaker.name
    assert refused.value.retry_after == pytest.approx(RESET, abs=5)


def test_an_answer_that_is_a_refusal_shows_that_the_service_is_there(
    breaker: CircuitBreaker,
) -> None:
    attempt(breaker, DOWN, PermanentError("declined"), DOWN)
    assert breaker.state == "closed"


def test_a_success_between_failures_begins_the_count_anew(breaker: CircuitBreaker) -> None:
    attempt(breaker, DOWN)
    call(breaker)
    attempt(breaker, DOWN)
    assert breaker.state == "closed"


def test_what_is_expected_counts_and_nothing_else(app: Celery, key: Key) -> None:
    breaker = CircuitBreaker(key.name, failure_threshold=1, expected=LookupError)
    attempt(breaker, DOWN)
    assert breaker.state == "closed"
    attempt(breaker, KeyError())
    assert breaker.state == "open"


def test_what_is_ignored_counts_neither_way(app: Celery, key: Key, store: Store) -> None:
    breaker = CircuitBreaker(key.name, failure_threshold=2, ignore=[KeyError])
    attempt(breaker, DOWN, KeyError())
    assert breaker.state == "closed"
    attempt(breaker, DOWN)
    assert breaker.state == "open"
    let_the_time_pass(store, key)
    attempt(breaker, KeyError())  # the probe
    assert breaker.state == "open"
    call(breaker)
    assert breaker.state == "closed"


def test_another_breakers_refusal_and_a_stop_count_neither_way(breaker: CircuitBreaker) -> None:
    attempt(breaker, DOWN, CircuitOpen(), KeyboardInterrupt(), DOWN)
    assert breaker.state == "open"


def test_it_is_closed_by_hand(breaker: CircuitBreaker) -> None:
    attempt(breaker, DOWN, DOWN)
    breaker.reset()
    call(breaker)
    assert breaker.state == "closed"


def test_breakers_around_breakers_keep_their_outcomes_apart(app: Celery, key: Key) -> None:
    outer = CircuitBreaker(key.name, failure_threshold=1)
    inner = CircuitBreaker(f"{key.name}-inner", failure_threshold=1)
    with outer:
        attempt(inner, DOWN)
    assert (outer.state, inner.state) == ("closed", "open")


def test_a_coroutine_is_watched_until_it_ends(breaker: CircuitBreaker) -> None:
    @breaker
    async def ask(error: Exception | None) -> str:
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return "here"

    async def ask_all(*errors: Exception | None) -> list[object]:
        return await asyncio.gather(*map(ask, errors), return_exceptions=True)

    assert asyncio.run(ask_all(DOWN, DOWN)) == [DOWN, DOWN]
    assert breaker.state == "open"
    (refused,) = asyncio.run(ask_all(None))
    assert isinstance(refused, CircuitOpen)
    breaker.reset()
    assert asyncio.run(ask_all(None)) == ["here"]


def test_without_its_database_it_lets_calls_through_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "durable.circuit_breaker")
    app = Celery("nowhere", broker="memory://")
    Durable(app, database_url="postgresql://127.0.0.1:1/nowhere")
    app.set_current()
    breaker = CircuitBreaker("unseen", failure_threshold=1)
    attempt(breaker, DOWN)
    call(breaker)
    assert "'unseen' lets a call through unseen" in caplog.text
    app.close()


def test_an_outcome_that_cannot_be_written_does_not_replace_the_calls_own(
    app: Celery, breaker: CircuitBreaker, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "durable.circuit_breaker")
    url = app.durable.database.url
    attempt(breaker, DOWN)
    with breaker:
        answer = "here"
        app.durable.database.close()
        app.durable.database._url = lambda: "postgresql://127.0.0.1:1/nowhere"
    assert answer == "here"
    assert f"{breaker.name!r} misses an outcome" in caplog.text
    app.durable.database._url = lambda: url
    attempt(breaker, DOWN)
    assert breaker.state == "open"  # the success was not noted
