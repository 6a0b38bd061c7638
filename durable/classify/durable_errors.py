"""Rules for the errors of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from durable.classify.verdict import (
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_UNKNOWN,
    TRANSIENT,
    Case,
    RetryClass,
    Table,
    Verdict,
)
from durable.durations import parse_seconds
from durable.errors import OptionError

if TYPE_CHECKING:
    from durable.errors import RecoverableError


def _recoverable(exc: RecoverableError, _case: Case) -> Verdict:
    """The user's own ``retry_after`` is taken as it is: no cap, nobody else asked for it."""
    asked = getattr(exc, "retry_after", None)
    if asked is None:
        return RECOVERABLE
    try:
        seconds = parse_seconds(asked, name="retry_after")
    except OptionError as refusal:
        # The step has failed already: waiting as usual beats losing its error to this one.
        return RECOVERABLE.because(f"RecoverableError; ignored: {refusal}")
    return Verdict(RetryClass.RECOVERABLE, retry_after=seconds)


#: What the user raises to say it in so many words.
OWN: Table = {
    "durable.errors": {
        "TransientError": TRANSIENT,
        "RecoverableError": _recoverable,
        "PermanentError": PERMANENT,
    }
}

#: The rest. ``DeadlineExceeded`` is a ``TimeoutError``, yet another attempt cannot help it.
DURABLE: Table = {
    "durable.errors": {
        "DatabaseUnavailable": RECOVERABLE,
        "DatabaseReadOnly": RECOVERABLE,
        "StepTimeout": RECOVERABLE_UNKNOWN,
        "DurableError": PERMANENT,
    }
}
