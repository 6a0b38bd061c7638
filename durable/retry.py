"""When a failed step is tried again, and when it is given up.

What counts: every failed attempt after which the run was *parked* uses one of
``max_retries``. The quick tries of a transient error use none, since they cost
milliseconds; once ``transient_tries`` of them failed in a row the error is
treated as recoverable, and that park counts. So a step with the defaults whose
error stays transient makes 4 attempts, parks, makes 4 more, and so on: 16
attempts and three pauses in all. ``max_retries=0`` means no second attempt of any
kind. Redelivery, sleep, deploys and lost leases fail no attempt and use up nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from durable._backoff import after_hint, exponential, quick_pause, spread
from durable._retry_options import (
    advice,
    as_tuple,
    check_backoff,
    check_classes,
    check_count,
    check_flag,
    check_seconds,
    refusal,
)
from durable.classify import Classifier, RetryClass, Verdict
from durable.durations import parse_seconds
from durable.errors import OptionError

logger = logging.getLogger(__name__)

#: Parks for an error of which too little is known.
LIMITED_PARKS = 3


@dataclass(frozen=True)
class RetryCounts:
    """What the failed attempts of one step have used up.

    Attributes:
        attempts: how many failed.
        transient: quick tries, in a row, up to now.
        parks: pauses that count against ``max_retries``.
        limited: those of them for an error of which too little is known.

    >>> RetryCounts.of([{"class": "recoverable"}, {"class": "transient"}])
    RetryCounts(attempts=2, transient=1, parks=1, limited=0)
    """

    attempts: int = 0
    transient: int = 0
    parks: int = 0
    limited: int = 0

    @classmethod
    def of(cls, past: Iterable[Mapping[str, object]]) -> RetryCounts:
        """Count the recorded decisions (``class``, ``limited``), oldest first."""
        counts = cls()
        for decision in past:
            parked = decision.get("class") == RetryClass.RECOVERABLE.value
            tried = decision.get("class") == RetryClass.TRANSIENT.value
            counts = cls(
                attempts=counts.attempts + 1,
                transient=counts.transient + 1 if tried else 0,
                parks=counts.parks + parked,
                limited=counts.limited + (parked and bool(decision.get("limited"))),
            )
        return counts


@dataclass(frozen=True)
class Decision:
    """What to do about a failed attempt.

    Attributes:
        retry_class: TRANSIENT: try again in this worker after ``delay``;
            RECOVERABLE: park for ``delay``; PERMANENT: fail now; PASS: raise
            the exception again, the step has not failed. It may differ from
            the verdict's, when a budget is used up.
        reason: for people: the rule that decided, and which budget ended.
        delay: seconds until the next attempt.
        limited: the park counts against the three for little-known errors.
        verdict: what the classification said.
    """

    retry_class: RetryClass
    reason: str
    delay: float = 0.0
    limited: bool = False
    verdict: Verdict | None = None

    @property
    def parks(self) -> bool:
        """Whether the run waits in Postgres for the next attempt."""
        return self.retry_class is RetryClass.RECOVERABLE

    @property
    def passes(self) -> bool:
        """Whether this is control flow: raise it again and record no failure."""
        return self.retry_class is RetryClass.PASS

    @property
    def final(self) -> bool:
        """Whether there is no further attempt."""
        return self.retry_class in {RetryClass.PERMANENT, RetryClass.PASS}


@dataclass(frozen=True)
class RetryPolicy:
    """The retry options of one step, under Celery's names and with Celery's meanings.

    Attributes:
        max_retries: parks before the step fails; None: without end, 0: no second attempt.
        retry_backoff: seconds before the first repetition, doubled for each
            further one; True is 1, False or 0 is no back-off.
        retry_backoff_max: longest back-off in seconds. ``Retry-After`` may ask for more.
        retry_jitter: spread each pause over (0, back-off].
        transient_tries: quick tries in a row before a transient error parks the run.
        autoretry_for: exceptions to repeat whatever the classification says.
        dont_autoretry_for: exceptions never to repeat; goes before ``autoretry_for``.
        classify: function of the exception that gives a ``RetryClass``, a
            ``Verdict``, or None for no opinion; goes before both.
        retry_unknown_outcome: whether to repeat what may have been executed
            already (a timeout after the request was sent). False for a step
            that must not be done twice and has no idempotency key.

    Raises:
        OptionError: a value is not what is accepted.

    >>> RetryPolicy(max_retries=5).retry_backoff_max
    600.0
    """

    max_retries: int | None = 3
    retry_backoff: float | bool = 1
    retry_backoff_max: float = 600.0
    retry_jitter: bool = True
    transient_tries: int = 3
    autoretry_for: tuple[type[BaseException], ...] = ()
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    classify: Callable[[BaseException], RetryClass | Verdict | None] | None = None
    retry_unknown_outcome: bool = True

    def __post_init__(self) -> None:
        if self.max_retries is not None:
            check_count("max_retries", self.max_retries, "a whole number from 0, or None")
        check_count("transient_tries", self.transient_tries)
        check_backoff("retry_backoff", self.retry_backoff)
        check_seconds("retry_backoff_max", self.retry_backoff_max)
        check_flag("retry_jitter", self.retry_jitter)
        check_flag("retry_unknown_outcome", self.retry_unknown_outcome)
        check_classes("autoretry_for", self.autoretry_for)
        check_classes("dont_autoretry_for", self.dont_autoretry_for)
        if self.classify is not None and not callable(self.classify):
            raise refusal("classify", self.classify, "a function of the exception, or None")

    @classmethod
    def from_options(cls, **options: Any) -> RetryPolicy:
        """Make a policy from what a user wrote.

        Beyond the constructor, ``retry_backoff_max`` takes any duration
        (``"10m"``), and the exceptions may be a list or a single class.

        Raises:
            OptionError: an option is unknown or a value is not accepted.

        >>> RetryPolicy.from_options(retry_backoff_max="10m", autoretry_for=KeyError).autoretry_for
        (<class 'KeyError'>,)
        >>> RetryPolicy.from_options(max_retrys=5)
        Traceback (most recent call last):
            ...
        durable.errors.OptionError: 'max_retrys' is no retry option. Did you mean 'max_retries'?
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise OptionError(f"{name!r} is no retry option. {advice(name, known)}")
        if "retry_backoff_max" in options:
            longest = parse_seconds(options["retry_backoff_max"], name="retry_backoff_max")
            options["retry_backoff_max"] = longest
        for name in {"autoretry_for", "dont_autoretry_for"} & options.keys():
            options[name] = as_tuple(options[name])
        return cls(**options)

    def decide(
        self,
        exc: BaseException,
        classifier: Classifier,
        past: Iterable[Mapping[str, object]] = (),
        *,
        random: Callable[[], float],
    ) -> Decision:
        """Decide what follows a failed attempt. Pure: nothing is stored or slept.

        Args:
            exc: what the attempt raised.
            classifier: judges what the options of the step leave open.
            past: the earlier failed attempts' decisions, oldest first, with
                the keys ``class`` (a ``RetryClass`` value) and ``limited``.
            random: a float in [0, 1).

        >>> decision = RetryPolicy(retry_backoff=2).decide(
        ...     ConnectionRefusedError(), Classifier(), random=lambda: 0.5)
        >>> decision.parks, round(decision.delay, 3), decision.reason
        (True, 1.1, 'errno ECONNREFUSED')
        """
        verdict = self.judge(exc, classifier)
        return self.follow(verdict, RetryCounts.of(past), random=random)

    def follow(
        self, verdict: Verdict, counts: RetryCounts, *, random: Callable[[], float]
    ) -> Decision:
        """Decide by a verdict and what the earlier attempts have used up."""
        if verdict.retry_class in {RetryClass.PERMANENT, RetryClass.PASS}:
            return Decision(verdict.retry_class, verdict.reason, verdict=verdict)
        quick = verdict.retry_class is RetryClass.TRANSIENT and not verdict.retry_after
        if quick and counts.transient < self.transient_tries and self.max_retries != 0:
            delay = quick_pause(counts.transient, random)
            return Decision(RetryClass.TRANSIENT, verdict.reason, delay, verdict=verdict)
        ended = self._used_up(verdict, counts)
        if ended:
            made = counts.attempts + 1
            reason = f"{verdict.reason}; {ended} after {made} attempt{'s' if made > 1 else ''}"
            return Decision(RetryClass.PERMANENT, reason, verdict=verdict)
        delay = self.delay(counts.parks, verdict.retry_after, random=random)
        return Decision(RetryClass.RECOVERABLE, verdict.reason, delay, verdict.limited, verdict)

    def give_up(self, reason: str) -> Decision:
        """The decision to fail now, whatever the options say."""
        return Decision(RetryClass.PERMANENT, reason)

    def judge(self, exc: BaseException, classifier: Classifier) -> Verdict:
        """The verdict on an exception, with the options of this step taken into account."""
        verdict = (
            classifier.own_class(exc)
            or self._by_classify(exc, classifier)
            or self._by_lists(exc, classifier)
            or classifier.classify(exc)
        )
        if verdict.outcome_unknown and not self.retry_unknown_outcome:
            reason = f"{verdict.reason}; outcome unknown, and retry_unknown_outcome=False"
            return replace(verdict, retry_class=RetryClass.PERMANENT, reason=reason)
        return verdict

    def delay(
        self, parks: int, retry_after: float | None = None, *, random: Callable[[], float]
    ) -> float:
        """Seconds to park: exponential, jittered, never zero.

        At most the back-off, unless ``retry_after`` asks for more: then that
        and up to a tenth on top, since it is the same for every caller.

        >>> RetryPolicy(retry_jitter=False).delay(4, random=lambda: 0.0)
        16.0
        """
        most = exponential(float(self.retry_backoff), parks, self.retry_backoff_max)
        roll = random if self.retry_jitter else None
        return after_hint(spread(most, roll), retry_after, roll)

    def _used_up(self, verdict: Verdict, counts: RetryCounts) -> str:
        if self.max_retries is not None and counts.parks >= self.max_retries:
            return f"max_retries={self.max_retries} used up"
        if verdict.limited and counts.limited >= LIMITED_PARKS:
            return f"at most {LIMITED_PARKS} retries of such an error"
        return ""

    def _by_classify(self, exc: BaseException, classifier: Classifier) -> Verdict | None:
        if self.classify is None:
            return None
        try:
            answer = self.classify(exc)
        except Exception:
            # The step's own error must not be lost to a mistake in judging it.
            logger.exception("classify= failed on %r and is ignored", exc)
            return None
        return classifier.completed(answer, exc, "the step's classify")

    def _by_lists(self, exc: BaseException, classifier: Classifier) -> Verdict | None:
        if isinstance(exc, self.dont_autoretry_for):
            name = type(exc).__name__
            return Verdict(RetryClass.PERMANENT, reason=f"dont_autoretry_for has {name}")
        if not isinstance(exc, self.autoretry_for):
            return None
        known = classifier.classify(exc)
        if known.retry_class is RetryClass.TRANSIENT:
            return known
        reason = f"autoretry_for ({known.reason})"
        return replace(known, retry_class=RetryClass.RECOVERABLE, limited=False, reason=reason)
