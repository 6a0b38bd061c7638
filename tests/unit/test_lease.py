"""The lease word: seen by forked children, never longer than a peer believes."""

from __future__ import annotations

import os

import pytest

from durable.lease import Lease


class Monotonic:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_held_before_the_first_beat() -> None:
    assert not Lease(10.0, Monotonic()).held()


def test_it_lasts_from_the_asking_not_from_the_answer() -> None:
    clock = Monotonic()
    lease = Lease(10.0, clock)
    clock.now = 104.0  # the answer took four seconds
    lease.renew(100.0)
    assert lease.held()
    clock.now = 109.9
    assert lease.held()
    clock.now = 110.0
    assert not lease.held()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_children_see_what_the_main_process_renews_and_its_shutdown() -> None:
    clock = Monotonic()
    lease = Lease(10.0, clock)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0 if lease.held() and lease.shutting_down else 1)
    lease.renew(100.0)
    lease.begin_shutdown()
    os.write(write, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(read)
    os.close(write)


def test_a_worker_that_begins_in_the_process_of_another_begins_anew() -> None:
    lease = Lease(10.0, Monotonic())
    lease.renew(100.0)
    lease.begin_shutdown()
    lease.reset()
    assert (lease.held(), lease.shutting_down) == (False, False)
