"""How long a step may take, wherever it runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from types import FrameType

import pytest
from celery import Celery

from durable import Durable, Workflow, step
from durable.classify import Classifier, RetryClass
from durable.errors import OptionError, StepTimeout
from durable.timeouts import limited

TOLD = r"step 'slow' took longer than its timeout of 0.05 s"


def test_the_main_thread_is_interrupted() -> None:
    started = time.monotonic()
    with pytest.raises(StepTimeout, match=TOLD), limited(0.05, "slow", time.monotonic):
        time.sleep(10)
    assert time.monotonic() - started < 5


def test_a_body_in_time_leaves_no_timer_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with limited(30, "quick", time.monotonic):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_timer_of_the_users_own_is_left_alone_and_the_body_judged_at_its_end() -> None:
    rung: list[int] = []

    def on_alarm(number: int, frame: FrameType | None) -> None:
        rung.append(number)

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    moments = iter([0.0, 1.0])

    def body() -> None:
        with limited(0.05, "slow", lambda: next(moments)):
            while not rung:
                time.sleep(0.001)

    with pytest.raises(StepTimeout):
        body()
    signal.signal(signal.SIGALRM, before)


def test_a_thread_is_judged_at_its_end() -> None:
    caught: list[BaseException] = []
    moments = iter([0.0, 1.0])

    def body() -> None:
        try:
            with limited(0.05, "slow", lambda: next(moments)):
                caught.append(RuntimeError("the body ran to its end"))
        except StepTimeout as exc:
            caught.append(exc)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert [type(each) for each in caught] == [RuntimeError, StepTimeout]


def test_a_greenlet_is_interrupted() -> None:
    pytest.importorskip("gevent")
    program = """
from gevent import monkey; monkey.patch_all()
import time
from durable.errors import StepTimeout
from durable.timeouts import limited
try:
    with limited(0.05, "slow", time.monotonic):
        time.sleep(10)
except StepTimeout as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=9
    )
    assert done.stdout.strip() == "step 'slow' took longer than its timeout of 0.05 s"


def test_a_step_that_takes_too_long_is_tried_again_and_its_outcome_is_unknown() -> None:
    verdict = Classifier().classify(StepTimeout("slow"))
    assert (verdict.retry_class, verdict.outcome_unknown) == (RetryClass.RECOVERABLE, True)
    attempts: list[int] = []

    @step(timeout="50ms", name="test_timeouts.fetch")
    def fetch() -> int:
        attempts.append(1)
        if len(attempts) == 1:
            time.sleep(10)
        return len(attempts)

    app = Celery("timeouts", set_as_current=False)
    Durable(app)

    @app.task(base=Workflow, shared=False)
    def flow() -> int:
        return fetch()

    assert flow() == 2


@pytest.mark.parametrize("timeout", [0, -1, "soon"])
def test_a_timeout_that_is_none_is_refused(timeout: object) -> None:
    with pytest.raises(OptionError, match="timeout"):
        step(timeout=timeout, name=f"test_timeouts.{timeout}")(lambda: None)
