"""Rules by HTTP status (RFC 9110, 4918, 6585, 8470), shared by all clients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from durable.classify.verdict import (
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_UNKNOWN,
    TRANSIENT,
    RetryClass,
    Verdict,
)

if TYPE_CHECKING:
    from durable.classify.retry_after import Hint

#: Request timeout, misdirected request, too early: not executed, and repeatable on
#: another connection, without early data.
REPEATABLE = frozenset({408, 421, 425})
#: Locked (RFC 4918), too many requests (RFC 6585): refused for now.
LATER = frozenset({423, 429})
#: Server errors that stay: not implemented, version, negotiates itself, storage,
#: loop, not extended, network authentication. RFC 4918 forbids repeating 507 unasked.
LASTING = frozenset({501, 505, 506, 507, 508, 510, 511})
FIRST_ERROR = 400
FIRST_SERVER_ERROR = 500


def by_status(
    status: object, hint: Hint | None = None, *, conflict: Verdict = PERMANENT
) -> Verdict | None:
    """The verdict on a response.

    Args:
        status: the status code; None for anything but a number.
        hint: the valid ``Retry-After``, which makes any error recoverable
            (RFC 9110 has it for 413, azure-core does it for all).
        conflict: the verdict on 409.

    >>> by_status(503).outcome_unknown, by_status(404).retry_class
    (True, <RetryClass.PERMANENT: 'permanent'>)
    """
    if not isinstance(status, int):
        return None
    known = conflict if status == 409 else _class_of(status)  # noqa: PLR2004
    verdict = known.because(f"HTTP {int(status)}")
    if hint is None or status < FIRST_ERROR:
        return verdict
    # Refused with "come back later", the outcome stays as open as the status leaves it.
    return with_hint(replace(verdict, retry_class=RetryClass.RECOVERABLE, limited=False), hint)


def with_hint(verdict: Verdict, hint: Hint | None) -> Verdict:
    """The same verdict with the pause that was asked for."""
    if hint is None or verdict.retry_class is not RetryClass.RECOVERABLE:
        return verdict
    capped = ", capped" if hint.capped else ""
    return replace(
        verdict,
        retry_after=hint.seconds,
        retry_after_capped=hint.capped,
        reason=f"{verdict.reason}, Retry-After {hint.seconds:g} s{capped}",
    )


def _class_of(status: int) -> Verdict:
    if status in REPEATABLE:
        return TRANSIENT
    if status in LATER:
        return RECOVERABLE
    if status >= FIRST_SERVER_ERROR and status not in LASTING:
        return RECOVERABLE_UNKNOWN
    return PERMANENT
