"""Rules for the SDKs of OpenAI and Anthropic (sources: the SDKs, OpenAI's error documentation)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from durable.classify.http_status import FIRST_ERROR, FIRST_SERVER_ERROR, by_status, with_hint
from durable.classify.retry_after import Hint, from_headers
from durable.classify.verdict import (
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_UNKNOWN,
    Case,
    Rule,
    Table,
    Verdict,
)

#: Paid for, not waited for, although the status is 429.
QUOTA = "insufficient_quota"
SPEND_LIMIT = "SpendLimitReachedError"

#: Types and codes of an error that came inside a stream: after status 200, so
#: nothing else tells.
RECOVERABLE_TYPES = frozenset(
    {
        "api_error",
        "overloaded_error",
        "rate_limit_error",
        "rate_limit_exceeded",
        "server_error",
        "server_is_overloaded",
        "slow_down",
        "timeout_error",
    }
)


def _status(exc: Any, case: Case) -> Verdict | None:
    quota = _quota(exc)
    if quota is not None:
        return quota
    status = exc.status_code
    if status < FIRST_ERROR:
        return _by_type(exc)
    headers = exc.response.headers
    asked = from_headers(headers, now=case.now(), milliseconds=("retry-after-ms",))
    # 409 is a lock that timed out, for both.
    return _told(headers, status, asked) or by_status(status, asked, conflict=RECOVERABLE)


def _quota(exc: Any) -> Verdict | None:
    if QUOTA in (getattr(exc, "type", None), getattr(exc, "code", None)):
        return PERMANENT.because(QUOTA)
    if any(cls.__name__.endswith(SPEND_LIMIT) for cls in type(exc).__mro__):
        return PERMANENT.because(type(exc).__name__)
    return None


def _told(headers: Any, status: int, asked: Hint | None) -> Verdict | None:
    """The servers say themselves whether to repeat."""
    told = headers.get("x-should-retry")
    reason = f"HTTP {status}, x-should-retry: {told}"
    if told == "true":
        unknown = status >= FIRST_SERVER_ERROR
        return with_hint(replace(RECOVERABLE, outcome_unknown=unknown, reason=reason), asked)
    return PERMANENT.because(reason) if told == "false" else None


def _stream(exc: Any, _case: Case) -> Verdict | None:
    return _quota(exc) or _by_type(exc)


def _by_type(exc: Any) -> Verdict | None:
    names = [name for name in (getattr(exc, "type", None), getattr(exc, "code", None)) if name]
    if not names:
        return None
    recoverable = not RECOVERABLE_TYPES.isdisjoint(names)
    verdict = RECOVERABLE_UNKNOWN if recoverable else PERMANENT
    return verdict.because(f"error of type {names[0]} in a stream")


SDK: dict[str, Rule] = {
    "APIConnectionError": RECOVERABLE_UNKNOWN,
    "APIStatusError": _status,
    "APIError": _stream,
}
LLM: Table = {"openai": SDK, "anthropic": SDK}
