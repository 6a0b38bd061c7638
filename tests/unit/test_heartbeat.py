"""Which runs a worker holds without knowing it."""

from __future__ import annotations

from typing import Any

import pytest

from durable.lease import Lease
from durable.store import workers
from durable.store.workers import Beat, Pulse, Recovery
from durable.worker.heartbeat import Heartbeat

BEAT = Beat("w1", "default", "w1", 1, "prefork", 1, [], [], 1, 1)


class Connected:
    def connect(self) -> Any:
        return self


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What is released, beat by beat."""
    calls: list[dict[str, int]] = []

    def release(conn: Any, worker: str, orphans: dict[str, int], recovery: Recovery) -> list[str]:
        calls.append(dict(orphans))
        return list(orphans)

    monkeypatch.setattr(workers, "release_orphans", release)
    return calls


def beats(monkeypatch: pytest.MonkeyPatch, *held: dict[str, int], active: set[str]) -> None:
    answers = iter([Pulse([], each) for each in held])
    monkeypatch.setattr(workers, "beat", lambda *_: next(answers))
    heartbeat = Heartbeat(
        Connected(),  # type: ignore[arg-type]
        Lease(10.0, lambda: 0.0),
        interval=1.0,
        lease_seconds=10.0,
        report=lambda: BEAT,
        active=lambda: active,
        recovery=Recovery(3, "{}"),
        monotonic=lambda: 0.0,
    )
    for _ in held:
        heartbeat.tick()


def test_a_run_without_a_request_is_released_at_the_second_sight(
    monkeypatch: pytest.MonkeyPatch, released: list[dict[str, int]]
) -> None:
    beats(monkeypatch, {"lost": 2, "busy": 1}, {"lost": 2, "busy": 1}, active={"busy"})
    assert released == [{"lost": 2}]


def test_a_run_that_was_claimed_anew_in_between_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, released: list[dict[str, int]]
) -> None:
    beats(monkeypatch, {"run": 2}, {"run": 3}, active=set())
    assert released == []
