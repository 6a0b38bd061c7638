"""The order in which rules are asked, whatever the library."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import sys
import threading
import timeit
import types
import urllib.error
import weakref

import pytest
from celery.exceptions import Ignore, Reject, Retry

from durable.classify import Classifier, RetryClass, Verdict
from durable.errors import (
    DatabaseUnavailable,
    DeadlineExceeded,
    MissingRights,
    NotInWorkflow,
    OptionError,
    Parked,
    PayloadError,
    PermanentError,
    RecoverableError,
    Suspend,
    TransientError,
)

TRANSIENT, RECOVERABLE = RetryClass.TRANSIENT, RetryClass.RECOVERABLE
PERMANENT, PASS = RetryClass.PERMANENT, RetryClass.PASS


class OddError(Exception):
    """No rule knows it."""


@pytest.fixture
def classifier():
    return Classifier()


def raised(exc, cause):
    """As "raise exc from cause" leaves it."""
    exc.__cause__ = cause
    return exc


# --- the user's own words


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (TransientError("again"), TRANSIENT),
        (RecoverableError("later"), RECOVERABLE),
        (PermanentError("never"), PERMANENT),
    ],
)
def test_the_three_retry_classes_say_it_themselves(classifier, exc, expected):
    verdict = classifier.classify(exc)
    assert verdict.retry_class is expected
    assert not verdict.limited
    assert classifier.own_class(exc) == verdict


def test_the_three_retry_classes_go_before_registered_rules(classifier):
    classifier.register(Exception, PERMANENT)
    assert classifier.classify(TransientError()).retry_class is TRANSIENT


@pytest.mark.parametrize(("given", "seconds"), [("90s", 90.0), (5, 5.0), ("3d", 259200.0), (0, 0)])
def test_retry_after_of_a_recoverable_error_is_a_duration_and_is_not_capped(
    classifier, given, seconds
):
    verdict = classifier.classify(RecoverableError("quota", retry_after=given))
    assert (verdict.retry_after, verdict.retry_after_capped) == (seconds, False)


def test_a_retry_after_that_is_no_duration_does_not_replace_the_error(classifier):
    verdict = classifier.classify(RecoverableError("quota", retry_after="5 parsecs"))
    assert verdict.retry_class is RECOVERABLE
    assert verdict.retry_after is None
    assert "5 parsecs" in verdict.reason


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (PayloadError("NaN"), PERMANENT),
        (NotInWorkflow("sleep"), PERMANENT),
        (DeadlineExceeded("late"), PERMANENT),  # although a TimeoutError
        (MissingRights("create"), PERMANENT),
        (DatabaseUnavailable("down"), RECOVERABLE),
    ],
)
def test_our_other_errors_have_a_class(classifier, exc, expected):
    verdict = classifier.classify(exc)
    assert (verdict.retry_class, verdict.limited) == (expected, False)


# --- control flow


@pytest.mark.parametrize(
    "exc",
    [
        KeyboardInterrupt(),
        SystemExit(1),
        GeneratorExit(),
        asyncio.CancelledError(),
        Suspend("sleep"),
        Parked("sleep"),
        Retry(),
        Ignore(),
        Reject(),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_control_flow_passes_even_with_a_rule_for_exceptions_at_large(classifier, exc):
    classifier.register(BaseException, RECOVERABLE)
    classifier.register(Exception, RECOVERABLE)
    assert classifier.classify(exc).retry_class is PASS
    assert classifier.own_class(exc).retry_class is PASS


def test_a_rule_that_names_control_flow_holds(classifier):
    classifier.register(asyncio.CancelledError, RECOVERABLE)
    classifier.register(Ignore, PERMANENT)
    assert classifier.classify(asyncio.CancelledError()).retry_class is RECOVERABLE
    assert classifier.classify(Ignore()).retry_class is PERMANENT


# --- registered rules


def test_a_registered_rule_goes_before_the_table(classifier):
    assert classifier.classify(ConnectionResetError(104, "")).retry_class is TRANSIENT
    classifier.register(OSError, PERMANENT)
    assert classifier.classify(ConnectionResetError(104, "")).retry_class is PERMANENT


def test_the_rule_of_the_nearest_class_holds_and_of_two_the_newer(classifier):
    classifier.register(ConnectionError, PERMANENT)
    classifier.register(OSError, TRANSIENT)
    classifier.register(OSError, RECOVERABLE)
    assert classifier.classify(ConnectionResetError()).retry_class is PERMANENT
    assert classifier.classify(PermissionError()).retry_class is RECOVERABLE


def test_a_rule_without_opinion_leaves_it_to_the_next(classifier):
    classifier.register(OSError, lambda exc: PERMANENT if exc.args == ("mine",) else None)
    assert classifier.classify(ConnectionResetError("mine")).retry_class is PERMANENT
    assert classifier.classify(ConnectionResetError("other")).retry_class is TRANSIENT


def test_a_rule_may_give_a_whole_verdict(classifier):
    mine = Verdict(RECOVERABLE, retry_after=7.0, reason="the gate is closed")
    classifier.register(OddError, lambda _exc: mine)
    assert classifier.classify(OddError()) == mine


@pytest.mark.parametrize("rule", [lambda _exc: 1 / 0, lambda _exc: "recoverable"])
def test_a_rule_that_fails_is_logged_and_skipped(classifier, rule, caplog):
    classifier.register(OSError, rule)
    with caplog.at_level(logging.ERROR):
        assert classifier.classify(ConnectionResetError()).retry_class is TRANSIENT
    assert "ignored" in caplog.text


def test_a_path_is_resolved_when_its_module_appears(classifier, monkeypatch):
    classifier.register("shop_of_tests.errors.CardError", PERMANENT)
    module = types.ModuleType("shop_of_tests.errors")
    module.CardError = type("CardError", (Exception,), {})
    assert classifier.classify(module.CardError()).matched is False
    monkeypatch.setitem(sys.modules, "shop_of_tests.errors", module)
    assert classifier.classify(module.CardError()).retry_class is PERMANENT


def test_a_path_imports_nothing(classifier, monkeypatch):
    module = types.ModuleType("shop_of_tests.lazy")
    module.__getattr__ = lambda name: pytest.fail(f"asked for {name}")
    monkeypatch.setitem(sys.modules, "shop_of_tests.lazy", module)
    classifier.register("shop_of_tests.lazy.CardError", PERMANENT)
    classifier.register("wave.Error", PERMANENT)
    assert classifier.classify(OddError()).matched is False
    assert "wave" not in sys.modules


def test_a_path_may_name_a_nested_class(classifier, monkeypatch):
    module = types.ModuleType("shop_of_tests.models")
    module.Order = type("Order", (), {"DoesNotExist": type("DoesNotExist", (Exception,), {})})
    monkeypatch.setitem(sys.modules, "shop_of_tests.models", module)
    classifier.register("shop_of_tests.models:Order.DoesNotExist", PERMANENT)
    assert classifier.classify(module.Order.DoesNotExist()).retry_class is PERMANENT


@pytest.mark.parametrize("target", ["CardError", "shop.", "shop errors.X", "", 7, int, OddError()])
def test_a_target_that_is_no_exception_class_is_refused(classifier, target):
    with pytest.raises(OptionError, match=r"exc_type="):
        classifier.register(target, PERMANENT)


@pytest.mark.parametrize("rule", [None, "permanent", 3])
def test_a_rule_that_is_none_is_refused(classifier, rule):
    with pytest.raises(OptionError, match=r"rule="):
        classifier.register(OddError, rule)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_verdict_has_a_pause_that_can_be_waited_for(seconds):
    with pytest.raises(OptionError, match="retry_after"):
        Verdict(RECOVERABLE, retry_after=seconds)


# --- causes


def test_a_wrapped_error_is_judged_by_its_cause(classifier):
    deep = raised(OddError(), raised(RuntimeError("x"), ConnectionResetError(104, "reset")))
    verdict = classifier.classify(deep)
    assert verdict.retry_class is TRANSIENT
    assert verdict.outcome_unknown
    assert "ECONNRESET" in verdict.reason
    assert "OddError" in verdict.reason


def test_an_explicit_cause_precedes_a_programming_error(classifier):
    assert classifier.classify(ValueError("bad")).retry_class is PERMANENT
    wrapped = raised(ValueError("no price"), ConnectionRefusedError(111, "refused"))
    assert classifier.classify(wrapped).retry_class is RECOVERABLE


def test_an_error_with_a_rule_of_its_own_is_not_judged_by_its_cause(classifier):
    assert (
        classifier.classify(raised(FileNotFoundError(2, ""), TimeoutError())).retry_class
        is PERMANENT
    )


@pytest.mark.parametrize("suppressed", [True, False])
def test_the_context_is_left_alone(classifier, suppressed):
    exc = OddError()
    exc.__context__ = ConnectionResetError(104, "handled already")
    exc.__suppress_context__ = suppressed  # as "from None" does
    assert classifier.classify(exc).matched is False


def test_a_cancellation_inside_a_chain_is_not_control_flow(classifier):
    timeout = raised(TimeoutError(), asyncio.CancelledError())
    assert classifier.classify(timeout).retry_class is RECOVERABLE
    assert classifier.classify(raised(OddError(), asyncio.CancelledError())).matched is False
    beyond = raised(OddError(), raised(asyncio.CancelledError(), ConnectionResetError(104, "")))
    assert classifier.classify(beyond).retry_class is TRANSIENT


def test_a_circle_of_causes_ends(classifier):
    one, two = OddError(), OddError()
    one.__cause__, two.__cause__ = two, one
    assert classifier.classify(one).matched is False


@pytest.mark.parametrize(("links", "found"), [(8, True), (9, False), (5000, False)])
def test_causes_are_followed_eight_deep(classifier, links, found):
    exc = ConnectionResetError(104, "")
    for _ in range(links):
        outer = OddError()
        outer.__cause__ = exc
        exc = outer
    assert classifier.classify(exc).matched is found


# --- groups


needs_groups = pytest.mark.skipif(sys.version_info < (3, 11), reason="groups came with 3.11")


@needs_groups
def test_the_worst_member_of_a_group_decides_and_the_longest_delay_holds(classifier):
    reset = ConnectionResetError(104, "")
    slow = RecoverableError(retry_after=30)
    slower = ExceptionGroup("inner", [RecoverableError(retry_after=60), reset])  # noqa: F821
    verdict = classifier.classify(ExceptionGroup("g", [reset, slow, slower]))  # noqa: F821
    assert (verdict.retry_class, verdict.retry_after) == (RECOVERABLE, 60.0)
    assert verdict.outcome_unknown
    worst = ExceptionGroup("g", [slow, KeyError("sku")])  # noqa: F821
    assert classifier.classify(worst).retry_class is PERMANENT


@needs_groups
def test_a_limited_member_limits_the_group(classifier):
    verdict = classifier.classify(ExceptionGroup("g", [RecoverableError(), OddError()]))  # noqa: F821
    assert (verdict.retry_class, verdict.limited) == (RECOVERABLE, True)


@needs_groups
def test_control_flow_in_a_group_passes(classifier):
    assert classifier.classify(ExceptionGroup("g", [KeyError(), Ignore()])).retry_class is PASS  # noqa: F821
    stop = BaseExceptionGroup("g", [OddError(), KeyboardInterrupt()])  # noqa: F821
    assert classifier.classify(stop).retry_class is PASS
    assert classifier.own_class(stop).retry_class is PASS


# --- the rest


def test_what_nothing_knows_is_recoverable_a_few_times_and_flagged(classifier):
    verdict = classifier.classify(OddError("please pick a unique name, deadlock, HTTP 404"))
    assert verdict.retry_class is RECOVERABLE
    assert verdict.limited
    assert not verdict.matched
    assert "OddError" in verdict.reason


def test_a_built_in_rule_that_meets_an_odd_object_does_not_replace_the_error(classifier, caplog):
    exc = urllib.error.HTTPError("http://x", 503, "busy", None, None)
    with contextlib.closing(exc):
        del exc.code
        verdict = classifier.classify(exc)
    assert verdict.retry_class is RECOVERABLE
    assert "ignored" in caplog.text


def test_an_unknown_class_is_forgotten_with_its_module(classifier):
    cls = type("Gone", (Exception,), {})
    classifier.classify(cls())
    reference = weakref.ref(cls)
    del cls
    gc.collect()
    assert reference() is None


def test_threads_agree_while_rules_arrive(classifier):
    classes = [type(f"E{n}", (ConnectionResetError,), {}) for n in range(200)]
    wrong = []

    def work():
        mixed = random.sample(classes, len(classes))
        wrong.extend(c for c in mixed if classifier.classify(c()).retry_class is not TRANSIENT)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in range(200):
        classifier.register(f"nowhere_{n}.Error", PERMANENT)
        classifier.register(OddError, PERMANENT)
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_class_seen_before_is_judged_in_microseconds(classifier):
    exc = TimeoutError()
    best = min(timeit.repeat(lambda: classifier.classify(exc), number=200, repeat=5)) / 200
    assert best < 100e-6  # about 1 in truth: this finds a lost cache, not a busy machine
