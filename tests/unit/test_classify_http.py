"""HTTP: statuses, and what the clients raise against a server that misbehaves."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
import urllib3

from durable.classify import Classifier, RetryClass, Verdict
from durable.classify.http_status import by_status
from durable.classify.retry_after import Hint

T, R, P = RetryClass.TRANSIENT, RetryClass.RECOVERABLE, RetryClass.PERMANENT
Judged = tuple[RetryClass, bool, bool]


class Handler(BaseHTTPRequestHandler):
    """GET /<status> answers so; /hang, /drop, /short and /garbage misbehave."""

    def do_GET(self) -> None:
        name = self.path.split("?")[0].strip("/")
        if name == "hang":
            self.server.released.wait(5)  # type: ignore[attr-defined]
        elif name == "garbage":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        elif name == "short":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"part")
        elif name != "drop":
            self.send_response(int(name))
            if "?" in self.path:
                self.send_header("Retry-After", self.path.split("?")[1])
            self.send_header("Content-Length", "0")
            self.end_headers()
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.released = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.released.set()  # type: ignore[attr-defined]
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def refusing() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def verdict_of(action: Callable[[], object]) -> Verdict:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is the library's affair
        action()
    verdict = Classifier().classify(caught.value)
    assert verdict.matched, repr(caught.value)
    return verdict


def judged(action: Callable[[], object]) -> Judged:
    verdict = verdict_of(action)
    return verdict.retry_class, verdict.limited, verdict.outcome_unknown


# --- statuses


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((408, 421, 425), (T, False)),
        ((423, 429), (R, False)),
        ((500, 502, 503, 504, 509, 520, 529, 599), (R, True)),
        ((501, 505, 506, 507, 508, 510, 511), (P, False)),
        ((400, 401, 403, 404, 409, 410, 413, 418, 422, 304), (P, False)),
    ],
)
def test_each_status_has_its_class(
    statuses: tuple[int, ...], expected: tuple[RetryClass, bool]
) -> None:
    for status in statuses:
        verdict = by_status(status)
        assert verdict is not None
        assert (verdict.retry_class, verdict.outcome_unknown) == expected, status
        assert str(status) in verdict.reason


@pytest.mark.parametrize("status", [400, 403, 408, 409, 413, 425, 429, 501, 503, 507])
def test_a_valid_retry_after_makes_any_error_recoverable(status: int) -> None:
    verdict = by_status(status, Hint(9.0))
    assert verdict is not None
    assert (verdict.retry_class, verdict.retry_after) == (R, 9.0)
    assert verdict.outcome_unknown is (status == 503)


def test_a_redirect_with_retry_after_stays_permanent() -> None:
    verdict = by_status(301, Hint(9.0))
    assert verdict is not None
    assert verdict.retry_class is P


@pytest.mark.parametrize("status", [None, "503", object()])
def test_no_status_is_no_verdict(status: object) -> None:
    assert by_status(status) is None


# --- requests and urllib3, for real


def get_requests(url: str) -> Callable[[], object]:
    return lambda: requests.get(url, timeout=(1, 0.1)).raise_for_status()


def test_requests_statuses_and_retry_after(server: str) -> None:
    assert judged(get_requests(f"{server}/404")) == (P, False, False)
    assert judged(get_requests(f"{server}/503")) == (R, False, True)
    limited = verdict_of(get_requests(f"{server}/429?17"))
    assert (limited.retry_class, limited.retry_after) == (R, 17.0)
    huge = verdict_of(get_requests(f"{server}/503?99999999"))
    assert (huge.retry_after, huge.retry_after_capped) == (86400.0, True)
    assert "capped" in huge.reason


def test_requests_not_sent_is_told_from_sent(server: str, refusing: str) -> None:
    assert judged(get_requests(refusing)) == (R, False, False)
    assert judged(get_requests(f"{server}/drop")) == (T, False, True)
    assert judged(get_requests(f"{server}/hang")) == (R, False, True)
    assert judged(get_requests(f"{server}/short")) == (T, False, True)
    assert judged(get_requests(f"{server}/garbage")) == (T, False, True)


def test_requests_that_cannot_be_made_are_permanent(server: str) -> None:
    assert judged(get_requests("nonsense")) == (P, False, False)
    assert judged(get_requests("ftp2://x")) == (P, False, False)
    # A JSONDecodeError that is an OSError too: the library's own rule goes first.
    assert judged(lambda: requests.get(f"{server}/200", timeout=1).json()) == (P, False, False)


def test_requests_unwraps_tls_errors(server: str) -> None:
    """TLS spoken to a plain server: the ssl module's error, two wrappers down."""
    assert judged(get_requests(server.replace("http:", "https:") + "/200")) == (R, True, False)
    refused = ssl.SSLCertVerificationError(1, "self-signed certificate")
    pool: Any = None
    inner = urllib3.exceptions.MaxRetryError(pool, "/", urllib3.exceptions.SSLError(refused))
    exc = requests.exceptions.SSLError(inner)
    assert Classifier().classify(exc).retry_class is P


def test_a_refused_name_is_recoverable() -> None:
    url = "http://does-not-exist.invalid/"
    assert judged(lambda: requests.get(url, timeout=1)) == (R, False, False)


def test_a_response_that_is_false_is_still_read() -> None:
    response = requests.Response()
    response.status_code = 503
    assert not response
    exc = requests.HTTPError(response=response)
    assert Classifier().classify(exc).reason == "HTTP 503"
    assert Classifier().classify(requests.HTTPError("bare")).retry_class is P


def test_urllib3_alone(server: str, refusing: str) -> None:
    def get(url: str, **options: Any) -> Callable[[], object]:
        retries = options.pop("retries", False)

        def act() -> object:
            with urllib3.PoolManager(timeout=0.1) as pool:
                return pool.request("GET", url, retries=retries, **options)

        return act

    assert judged(get(refusing)) == (R, False, False)
    assert judged(get(refusing, retries=1)) == (R, False, False)
    assert judged(get(f"{server}/drop")) == (T, False, True)
    assert judged(get(f"{server}/drop", retries=1)) == (T, False, True)
    assert judged(get(f"{server}/hang")) == (R, False, True)
    assert judged(get(f"{server}/short")) == (T, False, True)
    forced = urllib3.Retry(1, status_forcelist=[503], backoff_factor=0)
    assert judged(get(f"{server}/503", retries=forced)) == (R, False, True)


def test_urllib_of_the_standard_library(server: str, refusing: str) -> None:
    def get(url: str) -> Callable[[], object]:
        def act() -> None:
            try:
                with urllib.request.urlopen(url, timeout=0.1) as response:
                    response.read()
            except urllib.error.HTTPError as exc:
                exc.close()  # it is the response, too
                raise

        return act

    found = verdict_of(get(f"{server}/503?3"))
    assert (found.retry_class, found.retry_after) == (R, 3.0)
    assert judged(get(f"{server}/404")) == (P, False, False)
    assert judged(get(refusing)) == (R, False, False)
    assert judged(get(f"{server}/drop")) == (T, False, True)
    assert judged(get(f"{server}/short")) == (T, False, True)
    assert judged(get(f"{server}/hang")) == (R, False, True)
    assert Classifier().classify(urllib.error.URLError("no host given")).limited


# --- clients that are not in the dev environment


@pytest.mark.parametrize("name", ["httpx", "httpx2"])
def test_httpx(name: str, server: str, refusing: str) -> None:
    httpx = pytest.importorskip(name)

    def get(url: str) -> Callable[[], object]:
        return lambda: httpx.get(url, timeout=0.1, trust_env=False).raise_for_status()

    assert judged(get(f"{server}/404")) == (P, False, False)
    assert verdict_of(get(f"{server}/429?17")).retry_after == 17.0
    assert judged(get(refusing)) == (R, False, False)
    assert judged(get(f"{server}/drop")) == (T, False, True)
    assert judged(get(f"{server}/hang")) == (R, False, True)
    assert judged(get(f"{server}/short")) == (T, False, True)
    assert judged(get("nonsense")) == (P, False, False)
    assert judged(lambda: httpx.get(f"http://{chr(0)}/")) == (P, False, False)


def test_httpx_hides_a_refused_certificate_in_the_suppressed_context() -> None:
    httpx = pytest.importorskip("httpx")
    exc = None
    try:
        try:
            try:
                raise ssl.SSLCertVerificationError(1, "self-signed")
            except ssl.SSLError:
                raise OSError("httpcore's") from None
        except OSError as inner:
            raise httpx.ConnectError("x") from inner
    except httpx.ConnectError as caught:
        exc = caught
    assert Classifier().classify(exc).retry_class is P


def test_aiohttp(server: str, refusing: str) -> None:
    aiohttp = pytest.importorskip("aiohttp")

    async def fetch(url: str, **timeout: float) -> None:
        limits = aiohttp.ClientTimeout(**timeout)
        async with (
            aiohttp.ClientSession(timeout=limits, raise_for_status=True) as session,
            session.get(url) as response,
        ):
            await response.read()

    def get(url: str, **timeout: float) -> Callable[[], object]:
        return lambda: asyncio.run(fetch(url, **timeout))

    assert judged(get(f"{server}/404")) == (P, False, False)
    assert verdict_of(get(f"{server}/429?17")).retry_after == 17.0
    assert judged(get(refusing)) == (R, False, False)
    assert judged(get(f"{server}/drop")) == (T, False, True)
    assert judged(get(f"{server}/short")) == (T, False, True)
    assert judged(get(f"{server}/garbage")) == (T, False, True)
    # The total timeout is a TimeoutError caused by a CancelledError.
    assert judged(get(f"{server}/hang", total=0.1)) == (R, False, True)
    assert judged(get(f"{server}/hang", sock_read=0.1)) == (R, False, True)
    assert judged(get("nonsense")) == (P, False, False)
