"""What a classifier answers."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Union

from durable.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class RetryClass(enum.Enum):
    """What may be done about a failed attempt.

    ``PASS`` is for control flow (a cancellation, Celery's ``Ignore``): it is
    raised again and is no failure of the step.
    """

    TRANSIENT = "transient"
    RECOVERABLE = "recoverable"
    PERMANENT = "permanent"
    PASS = "pass"  # noqa: S105 - not a password


@dataclass(frozen=True)
class Verdict:
    """The judgement on one exception.

    Attributes:
        retry_class: try again at once, later, or not at all.
        limited: too little is known: park at most three times, then fail.
        outcome_unknown: the request may have been executed; only an
            idempotent step is safe to run again.
        retry_after: least pause asked for by the other side, in seconds.
        reason: which rule decided, for people.
        matched: False when no rule knew the exception (a gap worth a rule).
        retry_after_capped: the other side asked for more than a day.

    Raises:
        OptionError: ``retry_after`` is negative, infinite or not a number.

    >>> Verdict(RetryClass.RECOVERABLE, retry_after=30.0, reason="HTTP 429").retry_after
    30.0
    """

    retry_class: RetryClass
    limited: bool = False
    outcome_unknown: bool = False
    retry_after: float | None = None
    reason: str = ""
    matched: bool = True
    retry_after_capped: bool = False

    def __post_init__(self) -> None:
        if self.retry_after is not None and not 0 <= self.retry_after < math.inf:
            raise OptionError(f"retry_after={self.retry_after!r}: give seconds from 0, or None.")

    def because(self, reason: str) -> Verdict:
        """The same verdict with another reason."""
        return replace(self, reason=reason)


#: The words that the tables are written in.
TRANSIENT = Verdict(RetryClass.TRANSIENT)
TRANSIENT_UNKNOWN = Verdict(RetryClass.TRANSIENT, outcome_unknown=True)
RECOVERABLE = Verdict(RetryClass.RECOVERABLE)
RECOVERABLE_UNKNOWN = Verdict(RetryClass.RECOVERABLE, outcome_unknown=True)
RECOVERABLE_LIMITED = Verdict(RetryClass.RECOVERABLE, limited=True)
RECOVERABLE_LIMITED_UNKNOWN = Verdict(RetryClass.RECOVERABLE, limited=True, outcome_unknown=True)
PERMANENT = Verdict(RetryClass.PERMANENT)
PASS = Verdict(RetryClass.PASS)


class Case(Protocol):
    """What a rule may ask while it judges one exception."""

    def now(self) -> float:
        """Seconds since the epoch."""

    def judge(self, inner: BaseException) -> Verdict:
        """The verdict on another exception, whatever it is."""

    def classify(self, inner: object) -> Verdict | None:
        """The verdict on an exception that the judged one carries.

        None when there is none, when no rule knows it, when it is control
        flow, or when following it would go in circles or too deep.
        """


#: A rule's own code: None leaves the decision to the next rule.
RuleFunction: TypeAlias = "Callable[[Any, Case], Verdict | None]"
Rule: TypeAlias = Union[Verdict, "RuleFunction"]
#: Module path to class name to rule.
Table: TypeAlias = "Mapping[str, Mapping[str, Rule]]"


def type_name(cls: type) -> str:
    """A class's name as a person would write it.

    >>> type_name(OSError), type_name(Verdict)
    ('OSError', 'durable.classify.verdict.Verdict')
    """
    module = cls.__module__
    return cls.__qualname__ if module == "builtins" else f"{module}.{cls.__qualname__}"


def rules(names: str, rule: Rule) -> dict[str, Rule]:
    """One rule for several class names.

    >>> sorted(rules("ConnectError ConnectTimeout", RECOVERABLE))
    ['ConnectError', 'ConnectTimeout']
    """
    return dict.fromkeys(names.split(), rule)
