"""Rules for requests, urllib3, httpx, aiohttp and urllib.

The line between "not sent" and "outcome unknown" was drawn by trying each
client against local servers; azure-core's own code draws it alike.
"""

from __future__ import annotations

import ssl
from typing import Any

from durable.classify.http_status import by_status
from durable.classify.retry_after import from_headers
from durable.classify.verdict import (
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_LIMITED,
    RECOVERABLE_UNKNOWN,
    TRANSIENT_UNKNOWN,
    Case,
    RetryClass,
    Rule,
    Table,
    Verdict,
    rules,
)

CONTEXT_DEPTH = 8


def _by_response(exc: Any, case: Case) -> Verdict | None:
    response = exc.response
    if response is None:  # bool() of a requests.Response is False for the very ones wanted
        return None
    return by_status(response.status_code, from_headers(response.headers, now=case.now()))


def _first_argument(exc: BaseException, case: Case) -> Verdict | None:
    return case.classify(exc.args[0]) if exc.args else None


def _tls(exc: BaseException, case: Case) -> Verdict:
    """The ssl module's own error, inside one or two wrappers."""
    return _first_argument(exc, case) or RECOVERABLE_LIMITED.because("TLS error")


def _requests_connection(exc: BaseException, case: Case) -> Verdict:
    """Its first argument is urllib3's error; requests chains by context only."""
    inner = _first_argument(exc, case)
    if inner is None or inner.retry_class is RetryClass.PERMANENT:
        return RECOVERABLE_UNKNOWN
    return inner


REQUESTS: dict[str, Rule] = {
    "ConnectTimeout": RECOVERABLE,
    "ReadTimeout": RECOVERABLE_UNKNOWN,
    "SSLError": _tls,
    "ProxyError": RECOVERABLE_UNKNOWN,
    "ConnectionError": _requests_connection,
    "ChunkedEncodingError": TRANSIENT_UNKNOWN,
    "RetryError": RECOVERABLE_UNKNOWN,
    "ContentDecodingError": RECOVERABLE_LIMITED,
    "HTTPError": _by_response,
    "RequestException": PERMANENT,
}


def _reason_of(exc: Any, case: Case) -> Verdict:
    return case.classify(exc.reason) or RECOVERABLE_LIMITED


def _urllib3_proxy(exc: Any, case: Case) -> Verdict:
    return case.classify(getattr(exc, "original_error", None)) or RECOVERABLE_UNKNOWN


URLLIB3: dict[str, Rule] = {
    "MaxRetryError": _reason_of,
    **rules("NewConnectionError ConnectTimeoutError EmptyPoolError", RECOVERABLE),
    "ReadTimeoutError": RECOVERABLE_UNKNOWN,
    **rules("ProtocolError IncompleteRead", TRANSIENT_UNKNOWN),
    "SSLError": _tls,
    # What requests calls ProxyError and RetryError.
    "ProxyError": _urllib3_proxy,
    "ResponseError": RECOVERABLE_UNKNOWN,
    "HTTPError": PERMANENT,
}


def _httpx_connect(exc: BaseException, _case: Case) -> Verdict:
    """A bad certificate hides in the suppressed context (httpcore raises ``from None``)."""
    inner: BaseException | None = exc
    for _ in range(CONTEXT_DEPTH):
        if isinstance(inner, ssl.SSLCertVerificationError):
            return PERMANENT.because("TLS: certificate refused")
        if inner is None:
            break
        inner = inner.__context__ if inner.__cause__ is None else inner.__cause__
    return RECOVERABLE


HTTPX: dict[str, Rule] = {
    "ConnectError": _httpx_connect,
    **rules("ConnectTimeout PoolTimeout", RECOVERABLE),
    **rules("ReadTimeout WriteTimeout WriteError", RECOVERABLE_UNKNOWN),
    **rules("ReadError RemoteProtocolError CloseError", TRANSIENT_UNKNOWN),
    "ProxyError": RECOVERABLE,
    "HTTPStatusError": _by_response,
    **rules("HTTPError InvalidURL CookieConflict StreamError", PERMANENT),
}


def _aiohttp_response(exc: Any, case: Case) -> Verdict | None:
    if exc.headers is None:  # a reply that is no HTTP is reported as status 400
        return TRANSIENT_UNKNOWN.because("no valid HTTP response")
    return by_status(exc.status, from_headers(exc.headers, now=case.now()))


AIOHTTP: dict[str, Rule] = {
    **rules("ClientConnectorCertificateError ServerFingerprintMismatch", PERMANENT),
    **rules("ContentTypeError TooManyRedirects InvalidURL", PERMANENT),
    **rules("ClientConnectorError ConnectionTimeoutError", RECOVERABLE),
    "ServerTimeoutError": RECOVERABLE_UNKNOWN,
    **rules("ServerDisconnectedError ClientOSError ClientPayloadError", TRANSIENT_UNKNOWN),
    "ClientResponseError": _aiohttp_response,
}


def _urllib_status(exc: Any, case: Case) -> Verdict | None:
    return by_status(exc.code, from_headers(exc.headers, now=case.now()))


HTTP_CLIENTS: Table = {
    "requests.exceptions": REQUESTS,
    "urllib3.exceptions": URLLIB3,
    "httpx": HTTPX,
    "httpx2": HTTPX,
    "aiohttp.client_exceptions": AIOHTTP,
    "urllib.error": {
        "HTTPError": _urllib_status,
        "ContentTooShortError": TRANSIENT_UNKNOWN,
        "URLError": _reason_of,
    },
}
