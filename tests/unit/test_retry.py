from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import Ignore
from hypothesis import given
from hypothesis import strategies as st

from durable.classify import Classifier, RetryClass, Verdict
from durable.errors import OptionError, PermanentError, RecoverableError, TransientError
from durable.retry import Decision, RetryCounts, RetryPolicy

T, R, P = RetryClass.TRANSIENT, RetryClass.RECOVERABLE, RetryClass.PERMANENT

RESET = ConnectionResetError(104, "reset")  # transient, outcome unknown
REFUSED = ConnectionRefusedError(111, "refused")  # recoverable
BUG = KeyError("sku")  # permanent


class OddError(Exception):
    """No rule knows it: recoverable, three times."""


def life(policy: RetryPolicy, exc: BaseException, *, most: int = 50) -> tuple[str, list[Decision]]:
    """Fail with the same error until the policy gives up: T, R and P, one letter an attempt."""
    past: list[dict[str, object]] = []
    decisions: list[Decision] = []
    while len(decisions) < most:
        decision = policy.decide(exc, Classifier(), past, random=lambda: 0.5)
        decisions.append(decision)
        if decision.final:
            break
        past.append({"class": decision.retry_class.value, "limited": decision.limited})
    return "".join(d.retry_class.name[0] for d in decisions), decisions


# --- budgets


def test_a_permanent_error_fails_at_once() -> None:
    letters, (decision,) = life(RetryPolicy(), PermanentError("card refused"))
    assert letters == "P"
    assert (decision.final, decision.parks, decision.passes) == (True, False, False)


def test_a_recoverable_error_parks_max_retries_times() -> None:
    letters, decisions = life(RetryPolicy(), REFUSED)
    assert letters == "RRRP"
    assert all(decision.parks for decision in decisions[:3])
    assert "ECONNREFUSED" in decisions[-1].reason
    assert "max_retries=3" in decisions[-1].reason
    assert "4 attempts" in decisions[-1].reason


def test_quick_tries_use_no_retries_and_start_anew_after_a_park() -> None:
    letters, _ = life(RetryPolicy(), TransientError())
    assert letters == "TTTR" * 3 + "TTTP"
    assert life(RetryPolicy(transient_tries=0), TransientError())[0] == "RRRP"
    assert life(RetryPolicy(transient_tries=1, max_retries=1), TransientError())[0] == "TRTP"


def test_no_retries_means_no_second_attempt_of_any_kind() -> None:
    for exc in (TransientError(), REFUSED, OddError()):
        letters, (decision,) = life(RetryPolicy(max_retries=0), exc)
        assert letters == "P"
        assert "after 1 attempt" in decision.reason


def test_none_means_without_end() -> None:
    assert life(RetryPolicy(max_retries=None), REFUSED)[0] == "R" * 50


def test_what_little_is_known_of_is_parked_three_times_whatever_max_retries() -> None:
    letters, decisions = life(RetryPolicy(max_retries=None), OddError())
    assert letters == "RRRP"
    assert decisions[0].limited
    assert "at most 3" in decisions[-1].reason
    assert life(RetryPolicy(max_retries=1), OddError())[0] == "RP"


def test_other_errors_in_between_do_not_refill_a_budget() -> None:
    past = [{"class": name} for name in ("recoverable", "transient", "recoverable", "transient")]
    past.append({"class": "recoverable", "limited": True})
    counts = RetryCounts.of(past)
    assert counts == RetryCounts(attempts=5, transient=0, parks=3, limited=1)
    assert RetryPolicy().decide(REFUSED, Classifier(), past, random=lambda: 0.5).final


def test_an_unknown_record_counts_as_an_attempt_and_as_nothing_else() -> None:
    assert RetryCounts.of([{}, {"class": "other"}]) == RetryCounts(attempts=2)


# --- pauses

rolls = st.floats(0, 1, exclude_max=True)


@given(
    roll=rolls,
    parks=st.integers(0, 5000),
    backoff=st.floats(0.001, 1e9),
    most=st.floats(0.001, 1e9),
)
def test_a_park_is_longer_than_nothing_and_within_the_cap(
    roll: float, parks: int, backoff: float, most: float
) -> None:
    policy = RetryPolicy(retry_backoff=backoff, retry_backoff_max=most)
    assert 0 < policy.delay(parks, random=lambda: roll) <= most


@given(roll=st.floats(0, 1), tries=st.integers(0, 100))
def test_a_quick_try_comes_within_a_second(roll: float, tries: int) -> None:
    policy = RetryPolicy(transient_tries=1000)
    verdict = Verdict(RetryClass.TRANSIENT)
    decision = policy.follow(verdict, RetryCounts(transient=tries), random=lambda: roll)
    assert decision.retry_class is T
    assert 0 < decision.delay <= min(0.05 * 2**tries, 1.0)


@given(roll=rolls, asked=st.floats(0, 86400), parks=st.integers(0, 20))
def test_retry_after_is_never_undercut_nor_exceeded_by_much(
    roll: float, asked: float, parks: int
) -> None:
    policy = RetryPolicy()
    delay = policy.delay(parks, asked, random=lambda: roll)
    assert delay >= asked
    assert delay <= max(min(2.0**parks, 600), asked * 1.1)
    if asked >= min(2.0**parks, 600):
        assert delay > asked  # jitter on top: everybody was asked for the same


def test_backoff_doubles_up_to_its_maximum() -> None:
    policy = RetryPolicy(retry_backoff=2, retry_backoff_max=10, retry_jitter=False)
    assert [policy.delay(n, random=lambda: 0.0) for n in range(5)] == [2, 4, 8, 10, 10]
    assert [d.delay for d in life(policy, REFUSED)[1]] == [2, 4, 8, 0]


def test_true_is_one_second_and_false_is_no_backoff() -> None:
    for value, first in ((True, 1.0), (False, 0.1), (0, 0.1)):
        policy = RetryPolicy(retry_backoff=value, retry_jitter=False)
        assert policy.delay(0, random=lambda: 0.0) == first
    assert RetryPolicy(retry_backoff=False).delay(9, random=lambda: 0.0) > 0


def test_jitter_spreads_over_the_whole_backoff() -> None:
    policy = RetryPolicy(retry_backoff=100)
    assert policy.delay(0, random=lambda: 0.0) == pytest.approx(10)
    assert policy.delay(0, random=lambda: 0.999) == pytest.approx(100, rel=0.01)


def test_without_jitter_retry_after_is_kept_to_the_second() -> None:
    assert RetryPolicy(retry_jitter=False).delay(0, 30.0, random=lambda: 0.5) == 30.0


def test_retry_after_of_the_user_s_own_error_is_waited_for() -> None:
    decision = RetryPolicy().decide(
        RecoverableError("quota", retry_after="2h"), Classifier(), random=lambda: 0.5
    )
    assert decision.parks
    assert 7200 < decision.delay <= 7200 * 1.1


def test_a_transient_error_that_asks_for_a_pause_gets_it() -> None:
    verdict = Verdict(T, retry_after=5.0)
    decision = RetryPolicy().follow(verdict, RetryCounts(), random=lambda: 0.5)
    assert decision.parks
    assert decision.delay >= 5


# --- whose word counts


def judged(policy: RetryPolicy, exc: BaseException, classifier: Any = None) -> RetryClass:
    return policy.judge(exc, classifier or Classifier()).retry_class


def test_the_exception_s_own_class_goes_first() -> None:
    policy = RetryPolicy(
        autoretry_for=(Exception,), dont_autoretry_for=(TransientError,), classify=lambda _exc: R
    )
    assert judged(policy, TransientError()) is T
    assert judged(policy, PermanentError()) is P


def test_classify_goes_before_the_lists_and_none_leaves_it_to_them() -> None:
    policy = RetryPolicy(
        autoretry_for=(LookupError,), classify=lambda exc: P if exc.args == ("no",) else None
    )
    assert judged(policy, KeyError("no")) is P
    assert judged(policy, KeyError("yes")) is R


def test_dont_autoretry_for_goes_before_autoretry_for() -> None:
    policy = RetryPolicy(autoretry_for=(LookupError,), dont_autoretry_for=(KeyError,))
    assert judged(policy, KeyError()) is P
    assert judged(policy, IndexError()) is R
    assert judged(policy, ValueError()) is P


def test_the_step_s_options_go_before_registered_rules() -> None:
    classifier = Classifier()
    classifier.register(KeyError, P)
    assert judged(RetryPolicy(), KeyError(), classifier) is P
    assert judged(RetryPolicy(autoretry_for=(KeyError,)), KeyError(), classifier) is R


def test_autoretry_for_lifts_the_limit_and_keeps_what_is_known_better() -> None:
    policy = RetryPolicy(autoretry_for=(Exception,), max_retries=5)
    assert life(policy, OddError())[0] == "RRRRRP"
    assert life(policy, BUG)[0] == "RRRRRP"
    assert judged(policy, RESET) is T  # soonest of all, and a park when that fails


def test_a_bare_class_keeps_the_pause_that_the_response_asks_for() -> None:
    requests = pytest.importorskip("requests")
    response = requests.Response()
    response.status_code = 404
    response.headers["Retry-After"] = "40"
    exc = requests.HTTPError(response=response)
    classifier = Classifier()
    classifier.register(requests.HTTPError, R)
    for policy in (
        RetryPolicy(classify=lambda _exc: R),
        RetryPolicy(autoretry_for=(OSError,)),
        RetryPolicy(),
    ):
        assert policy.judge(exc, classifier).retry_after == 40.0
    assert RetryPolicy(classify=lambda _exc: P).judge(exc, classifier).retry_after is None


@pytest.mark.parametrize(
    "answer", [lambda _exc: 1 / 0, lambda _exc: True, lambda _exc: "permanent"]
)
def test_a_classify_that_fails_is_logged_and_ignored(
    answer: Callable[[BaseException], Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert judged(RetryPolicy(classify=answer), REFUSED) is R
    assert "ignored" in caplog.text


@pytest.mark.parametrize("exc", [asyncio.CancelledError(), SystemExit(), Ignore()], ids=repr)
def test_control_flow_passes_whatever_the_options(exc: BaseException) -> None:
    policy = RetryPolicy(autoretry_for=(BaseException,), classify=lambda _exc: R)
    decision = policy.decide(exc, Classifier(), random=lambda: 0.5)
    assert (decision.passes, decision.parks) == (True, False)


def test_a_step_may_refuse_to_repeat_what_may_have_happened() -> None:
    policy = RetryPolicy(retry_unknown_outcome=False, autoretry_for=(TimeoutError,))
    for exc in (RESET, TimeoutError()):
        assert judged(RetryPolicy(), exc) is not P
        assert judged(policy, exc) is P
        assert "retry_unknown_outcome" in policy.judge(exc, Classifier()).reason
    assert judged(policy, REFUSED) is R


def test_giving_up_has_a_reason() -> None:
    decision = RetryPolicy().give_up("its result cannot be stored")
    assert decision.final
    assert decision.reason == "its result cannot be stored"


# --- options


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        ("max_retries", -1),
        ("max_retries", 2.5),
        ("max_retries", True),
        ("max_retries", "3"),
        ("transient_tries", None),
        ("retry_backoff", -1),
        ("retry_backoff", "2"),
        ("retry_backoff", float("nan")),
        ("retry_backoff", float("inf")),
        ("retry_backoff", 1e-9),
        ("retry_backoff", None),
        ("retry_backoff_max", 0),
        ("retry_backoff_max", -5),
        ("retry_backoff_max", "soon"),
        ("retry_backoff_max", True),
        ("retry_backoff_max", float("inf")),
        ("retry_jitter", 1),
        ("retry_jitter", None),
        ("retry_unknown_outcome", "no"),
        ("autoretry_for", "KeyError"),
        ("autoretry_for", (int,)),
        ("autoretry_for", (KeyError(),)),
        ("dont_autoretry_for", 7),
        ("classify", "fn"),
    ],
)
def test_a_bad_value_is_refused_by_name(option: str, bad: object) -> None:
    with pytest.raises(OptionError) as caught:
        RetryPolicy.from_options(**{option: bad})
    assert str(caught.value).startswith(f"{option}=")
    assert repr(bad) in str(caught.value)


def test_good_values_are_read() -> None:
    policy = RetryPolicy.from_options(
        max_retries=None,
        retry_backoff=0.5,
        retry_backoff_max="10m",
        autoretry_for=[KeyError],
        dont_autoretry_for=ValueError,
    )
    assert policy.retry_backoff_max == 600.0
    assert policy.autoretry_for == (KeyError,)
    assert policy.dont_autoretry_for == (ValueError,)
    assert RetryPolicy.from_options() == RetryPolicy()
    hash(policy)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("max_retry", "'max_retries'"),
        ("retry_back_off", "'retry_backoff'"),
        ("autoretry_on", "'autoretry_for'"),
        ("retry_kwargs", "max_retries=5"),
        ("default_retry_delay", "retry_backoff"),
        ("zzz", "max_retries, retry_backoff"),
    ],
)
def test_an_unknown_option_is_refused_with_advice(name: str, advice: str) -> None:
    with pytest.raises(OptionError) as caught:
        RetryPolicy.from_options(**{name: 1})
    assert name in str(caught.value)
    assert advice in str(caught.value)
