"""Rules for AWS (botocore), Google Cloud, Azure and gRPC."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from durable.classify.http_status import by_status, with_hint
from durable.classify.retry_after import Hint, from_headers, hint, parse_milliseconds
from durable.classify.verdict import (
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_LIMITED,
    RECOVERABLE_UNKNOWN,
    TRANSIENT,
    TRANSIENT_UNKNOWN,
    Case,
    Rule,
    Table,
    Verdict,
    rules,
)

#: botocore's own lists (retries/standard.py).
AWS_TRANSIENT = frozenset({"RequestTimeout", "RequestTimeoutException"})
#: PriorRequestNotComplete is in both of its lists. LimitExceededException can be a
#: hard quota too; the code does not tell, and ``max_retries`` ends it.
AWS_THROTTLING = frozenset(
    {
        "BandwidthLimitExceeded",
        "EC2ThrottledException",
        "LimitExceededException",
        "PriorRequestNotComplete",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "TransactionInProgressException",
    }
)


def _aws(exc: Any, case: Case) -> Verdict | None:
    code = exc.response.get("Error", {}).get("Code")
    metadata = exc.response.get("ResponseMetadata", {})
    headers = metadata.get("HTTPHeaders")
    asked = from_headers(headers, now=case.now(), milliseconds=("x-amz-retry-after",))
    if code in AWS_TRANSIENT:
        verdict = RECOVERABLE if asked else TRANSIENT
        return with_hint(verdict.because(f"AWS error {code}"), asked)
    if code in AWS_THROTTLING:
        return with_hint(RECOVERABLE.because(f"AWS error {code}"), asked)
    found = by_status(metadata.get("HTTPStatusCode"), asked)
    return None if found is None else found.because(f"AWS error {code}, {found.reason}")


BOTOCORE: dict[str, Rule] = {
    "ClientError": _aws,
    **rules("EndpointConnectionError ConnectTimeoutError", RECOVERABLE),
    "ReadTimeoutError": RECOVERABLE_UNKNOWN,
    "ConnectionClosedError": TRANSIENT_UNKNOWN,
    "SSLError": RECOVERABLE_LIMITED,
    **rules("ConnectionError HTTPClientError", RECOVERABLE_UNKNOWN),
    "CredentialRetrievalError": RECOVERABLE,
    "BotoCoreError": PERMANENT,
}

#: gRPC status codes. AIP-194 repeats UNAVAILABLE only, and ABORTED at the level of the
#: transaction; a wait of minutes justifies the wider set.
GRPC = {
    "ABORTED": TRANSIENT,
    "UNAVAILABLE": RECOVERABLE_UNKNOWN,
    "RESOURCE_EXHAUSTED": RECOVERABLE_UNKNOWN,
    "DEADLINE_EXCEEDED": RECOVERABLE_UNKNOWN,
    "UNKNOWN": RECOVERABLE_LIMITED,
    "INTERNAL": RECOVERABLE_LIMITED,
    "CANCELLED": RECOVERABLE_LIMITED,
}
PUSHBACK = "grpc-retry-pushback-ms"


def _by_grpc(code: Any, call: Any) -> Verdict:
    """By status code and the server's pushback (gRFC A6: negative or unreadable means no)."""
    verdict = GRPC.get(code.name, PERMANENT).because(f"gRPC {code.name}")
    pushback = _pushback(call)
    if pushback is None:
        return verdict
    asked = parse_milliseconds(pushback)
    if asked is None:
        return PERMANENT.because(f"{verdict.reason}, {PUSHBACK} {pushback!r}")
    return with_hint(verdict, asked)


def _pushback(call: Any) -> object:
    trailing = getattr(call, "trailing_metadata", None)
    metadata = trailing() if callable(trailing) else None
    return next((value for key, value in metadata or () if key == PUSHBACK), None)


def _grpc(exc: Any, _case: Case) -> Verdict | None:
    code = getattr(exc, "code", None)  # a bare RpcError has none
    status = code() if callable(code) else None
    return None if status is None else _by_grpc(status, exc)


def _google(exc: Any, case: Case) -> Verdict | None:
    asked = _retry_info(exc.details)
    response = exc.response
    if exc.grpc_status_code is not None:
        return with_hint(_by_grpc(exc.grpc_status_code, response), asked)
    headers = getattr(response, "headers", None)
    return by_status(exc.code, asked or from_headers(headers, now=case.now()))


def _retry_info(details: Any) -> Hint | None:
    """``google.rpc.RetryInfo.retry_delay`` among the error details."""
    for detail in details:
        delay = getattr(detail, "retry_delay", None)
        if isinstance(delay, timedelta):  # proto-plus
            return hint(delay.total_seconds())
        if delay is not None:
            return hint(float(delay.seconds) + delay.nanos / 1e9)
    return None


def _google_retry(exc: Any, case: Case) -> Verdict | None:
    return case.classify(exc.cause)


def _google_auth(exc: Any, _case: Case) -> Verdict:
    return RECOVERABLE if getattr(exc, "retryable", False) else PERMANENT


#: Azure's relatives of Retry-After.
AZURE_MILLISECONDS = ("retry-after-ms", "x-ms-retry-after-ms")


def _azure(exc: Any, case: Case) -> Verdict | None:
    headers = getattr(exc.response, "headers", None)
    asked = from_headers(headers, now=case.now(), milliseconds=AZURE_MILLISECONDS)
    return by_status(exc.status_code, asked)


CLOUD: Table = {
    "botocore.exceptions": BOTOCORE,
    "google.api_core.exceptions": {"RetryError": _google_retry, "GoogleAPICallError": _google},
    "google.auth.exceptions": {"TransportError": RECOVERABLE, "GoogleAuthError": _google_auth},
    "azure.core.exceptions": {
        "ServiceRequestError": RECOVERABLE,
        "ServiceResponseError": RECOVERABLE_UNKNOWN,
        "IncompleteReadError": TRANSIENT_UNKNOWN,
        "ClientAuthenticationError": PERMANENT,
        "HttpResponseError": _azure,
    },
    "grpc": {"RpcError": _grpc},
}
