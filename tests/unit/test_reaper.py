"""Who is dead: judged by the judge's own clock, over unbroken looks."""

from __future__ import annotations

from durable.store.workers import Peer
from durable.worker.reaper import Reaper


def peer(beat: int, worker: str = "other") -> Peer:
    return Peer(worker, beat, [], [], 0)


def looks(reaper: Reaper, beats: list[tuple[float, int]]) -> list[bool]:
    return [bool(reaper.dead([peer(beat)], at)) for at, beat in beats]


def test_a_counter_that_stands_still_for_a_lease_is_a_death() -> None:
    assert looks(Reaper(10.0, "me"), [(0, 7), (4, 7), (8, 7), (10, 7)]) == [
        False,
        False,
        False,
        True,
    ]


def test_a_beat_in_between_starts_the_wait_anew() -> None:
    assert not any(looks(Reaper(10.0, "me"), [(0, 7), (4, 7), (8, 8), (12, 8), (16, 8)]))


def test_a_counter_that_goes_back_is_a_beat_too() -> None:
    # A worker that was buried by mistake registers again, from one.
    assert not any(looks(Reaper(10.0, "me"), [(0, 70), (5, 70), (9, 1), (12, 1)]))


def test_after_a_gap_in_its_own_looks_nobody_is_dead() -> None:
    # The database was away, or this process stopped: the others could not beat either.
    reaper = Reaper(10.0, "me")
    assert looks(reaper, [(0, 7), (5, 7), (60, 7), (65, 7), (69, 7)]) == [False] * 5
    assert looks(reaper, [(70, 7)]) == [True]


def test_it_never_buries_itself() -> None:
    reaper = Reaper(10.0, "me")
    assert not any(reaper.dead([peer(7, "me")], at) for at in (0.0, 4.0, 8.0, 12.0))


def test_a_worker_that_left_is_forgotten() -> None:
    reaper = Reaper(10.0, "me")
    reaper.dead([peer(7)], 0.0)
    reaper.dead([], 4.0)
    reaper.dead([peer(7)], 8.0)
    assert reaper.dead([peer(7)], 11.0) == []
