"""In which order the rules are asked."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

from durable.classify.plan import Plan, make_plan, reason
from durable.classify.registry import Entry, Registry, Tier
from durable.classify.tables import BUILTIN, LIBRARY, OWN, PROGRAMMING
from durable.classify.verdict import (
    PASS,
    RECOVERABLE_LIMITED,
    Case,
    RetryClass,
    Verdict,
    type_name,
)
from durable.clock import SYSTEM
from durable.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from durable.clock import Clock

logger = logging.getLogger(__name__)

#: How many exceptions are followed from the first one.
MAX_DEPTH = 8

#: What user code may answer; None means no opinion.
Answer: TypeAlias = "RetryClass | Verdict | None"
UserRule: TypeAlias = "RetryClass | Callable[[BaseException], Answer]"


class Classifier:
    """Judges exceptions: worth another attempt at once, later, or never.

    Asked in this order: the exception's own class (``TransientError``,
    ``RecoverableError``, ``PermanentError``); registered rules; control flow,
    which passes; the built-in table, libraries before builtins; the explicit
    causes (``raise ... from``); programming errors, which are permanent; and
    at last "recoverable, three times", since nothing is known.

    Args:
        clock: tells the time, for ``Retry-After`` dates.

    >>> classifier = Classifier()
    >>> classifier.classify(ConnectionResetError(104, "reset by peer")).reason
    'errno ECONNRESET'
    >>> classifier.register("stripe.error.CardError", RetryClass.PERMANENT)
    """

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self.clock = clock
        self._plans: WeakKeyDictionary[type, Plan] = WeakKeyDictionary()
        self._registry = Registry()
        self._registry.add_table(OWN, Tier.OWN)
        self._registry.add_table(LIBRARY, Tier.LIBRARY)
        self._registry.add_table(BUILTIN, Tier.BUILTIN)
        self._registry.add_table(PROGRAMMING, Tier.PROGRAMMING)

    def register(self, exc_type: type[BaseException] | str, rule: UserRule) -> None:
        """Add a rule that goes before the built-in table.

        It holds for the class and its subclasses, the nearest class first and
        of two rules for one class the newer. A rule for ``Exception`` does not
        catch control flow (Celery's ``Ignore``, a cancellation): name that class.

        Args:
            exc_type: the class, or its path (``"stripe.error.CardError"``,
                nested ``"shop.models:Order.DoesNotExist"``); a path imports nothing.
            rule: a ``RetryClass``, or a function of the exception that gives a
                ``RetryClass``, a ``Verdict``, or None for no opinion.

        Raises:
            OptionError: the class or the rule is something else.
        """
        if not (isinstance(rule, RetryClass) or callable(rule)):
            raise OptionError(
                f"rule={rule!r}: give a RetryClass, or a function of the exception "
                "that gives a RetryClass, a Verdict or None."
            )

        def ask(exc: BaseException, case: Case) -> Verdict | None:
            answer = rule if isinstance(rule, RetryClass) else rule(exc)
            return self._completed(answer, exc, "a registered rule", case)

        self._registry.add(exc_type, ask, Tier.USER)

    def classify(self, exc: BaseException) -> Verdict:
        """Judge one exception. Never raises.

        >>> verdict = Classifier().classify(KeyError("sku"))
        >>> verdict.retry_class, verdict.reason
        (<RetryClass.PERMANENT: 'permanent'>, 'KeyError: the rule for LookupError')
        """
        plan = self._plan(type(exc))
        return plan.fixed or self._judge(exc, ())

    def own_class(self, exc: BaseException) -> Verdict | None:
        """What nothing else may overrule: one of our retry classes, or control flow."""
        plan = self._plan(type(exc))
        verdict = _Case(self, (exc,)).first(plan.own)
        if verdict is None:
            verdict = self.classify(exc)
            if verdict.retry_class is not RetryClass.PASS:
                return None
        return verdict

    def completed(self, answer: Answer, exc: BaseException, source: str) -> Verdict | None:
        """A verdict from what user code answered.

        A bare ``RetryClass`` says nothing of the pause: what the built-in
        table reads from the exception (``Retry-After``) is kept.

        Args:
            answer: a ``RetryClass``, a ``Verdict``, or None for no opinion.
            exc: the exception that it is about.
            source: who answered, for the reason text.
        """
        return self._completed(answer, exc, source, _Case(self, (exc,)))

    def _completed(
        self, answer: object, exc: BaseException, source: str, case: Case
    ) -> Verdict | None:
        if answer is None:
            return None
        name = type_name(type(exc))
        if isinstance(answer, Verdict):
            return answer if answer.reason else answer.because(f"{source} for {name}")
        if not isinstance(answer, RetryClass):
            logger.error("%s for %s answered %r: ignored. Give a RetryClass.", source, name, answer)
            return None
        known = _first(self._plan(type(exc)).table, exc, case) or case.classify(exc.__cause__)
        verdict = Verdict(answer, reason=f"{source} for {name}")
        if known is None:
            return verdict
        waits = answer is RetryClass.RECOVERABLE
        return replace(
            verdict,
            outcome_unknown=known.outcome_unknown,
            retry_after=known.retry_after if waits else None,
            retry_after_capped=known.retry_after_capped and waits,
        )

    def _judge(self, exc: BaseException, chain: tuple[BaseException, ...]) -> Verdict:
        plan = self._plan(type(exc))
        case = _Case(self, (*chain, exc))
        verdict = case.first(plan.own) or case.first(plan.user)
        if verdict is not None:
            return verdict
        if plan.passes:
            return PASS.because(f"{type_name(type(exc))} is control flow")
        return (
            case.first(plan.table)
            or case.by_cause()
            or case.first(plan.weak)
            or replace(
                RECOVERABLE_LIMITED, matched=False, reason=f"no rule for {type_name(type(exc))}"
            )
        )

    def _plan(self, cls: type[BaseException]) -> Plan:
        registry = self._registry
        if len(sys.modules) != registry.modules_seen:
            registry.refresh()
        plan = self._plans.get(cls)
        if plan is None or plan.generation != registry.generation:
            plan = self._plans[cls] = make_plan(cls, registry)
        return plan


class _Case(Case):
    """One exception being judged, and the way that led to it."""

    __slots__ = ("_chain", "_classifier")

    def __init__(self, classifier: Classifier, chain: tuple[BaseException, ...]) -> None:
        self._classifier = classifier
        self._chain = chain

    def now(self) -> float:
        return self._classifier.clock.now().timestamp()

    def judge(self, inner: BaseException) -> Verdict:
        return self._classifier._judge(inner, self._chain)  # noqa: SLF001 - its other half

    def classify(self, inner: object) -> Verdict | None:
        seen = self._chain
        while isinstance(inner, BaseException) and len(seen) <= MAX_DEPTH:
            if any(inner is earlier for earlier in seen):
                return None
            verdict = self._classifier._judge(inner, seen)  # noqa: SLF001
            if verdict.retry_class is not RetryClass.PASS:
                return verdict if verdict.matched else None
            # aiohttp's total timeout is a TimeoutError caused by a CancelledError:
            # inside a chain, control flow says nothing about the outermost exception.
            seen = (*seen, inner)
            inner = inner.__cause__
        return None

    def first(self, entries: tuple[Entry, ...]) -> Verdict | None:
        return _first(entries, self._chain[-1], self)

    def by_cause(self) -> Verdict | None:
        """The verdict on the explicit cause.

        ``__context__`` is left alone: it may be an unrelated error that was
        handled already, and ``from None`` says so.
        """
        exc = self._chain[-1]
        verdict = self.classify(exc.__cause__)
        if verdict is None:
            return None
        return verdict.because(f"{verdict.reason}, cause of {type_name(type(exc))}")


def _first(entries: tuple[Entry, ...], exc: BaseException, case: Case) -> Verdict | None:
    for entry in entries:
        if isinstance(entry.rule, Verdict):
            return entry.rule.because(reason(type(exc), entry))
        try:
            verdict = entry.rule(exc, case)
        except Exception:
            # A rule reads attributes of foreign objects; it must not replace
            # the error that it was asked about.
            logger.exception("The retry rule for %s failed and is ignored", entry.source)
            continue
        if verdict is not None:
            return verdict if verdict.reason else verdict.because(reason(type(exc), entry))
    return None
