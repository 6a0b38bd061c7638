"""Clouds, gRPC, LLM SDKs, SSH: run where these libraries are installed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from durable.classify import Classifier, RetryClass, Verdict

T, R, P = RetryClass.TRANSIENT, RetryClass.RECOVERABLE, RetryClass.PERMANENT
Judged = tuple[RetryClass, bool, bool]


def verdict_of(exc: BaseException) -> Verdict:
    verdict = Classifier().classify(exc)
    assert verdict.matched, repr(exc)
    return verdict


def judged(exc: BaseException) -> Judged:
    verdict = verdict_of(exc)
    return verdict.retry_class, verdict.limited, verdict.outcome_unknown


# --- AWS


def aws(code: str, status: int | None = None, **headers: str) -> BaseException:
    exceptions = pytest.importorskip("botocore.exceptions")
    metadata: dict[str, Any] = {
        "HTTPHeaders": {key.replace("_", "-"): value for key, value in headers.items()}
    }
    if status is not None:
        metadata["HTTPStatusCode"] = status
    response = {"Error": {"Code": code, "Message": "x"}, "ResponseMetadata": metadata}
    exc: BaseException = exceptions.ClientError(response, "PutItem")
    return exc


def test_aws_goes_by_code_then_by_status() -> None:
    assert judged(aws("RequestTimeout", 400)) == (T, False, False)
    assert judged(aws("ThrottlingException", 400)) == (R, False, False)
    assert judged(aws("PriorRequestNotComplete", 400)) == (R, False, False)
    assert judged(aws("AccessDenied", 403)) == (P, False, False)
    assert judged(aws("InternalError", 500)) == (R, False, True)
    assert verdict_of(aws("SlowDown", 503, x_amz_retry_after="1500")).retry_after == 1.5
    assert verdict_of(aws("Whatever", 503, retry_after="4")).retry_after == 4.0
    assert Classifier().classify(aws("Whatever")).matched is False


def test_aws_connections() -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    for name, expected in (
        ("EndpointConnectionError", (R, False, False)),
        ("ConnectTimeoutError", (R, False, False)),
        ("ReadTimeoutError", (R, False, True)),
        ("ConnectionClosedError", (T, False, True)),
        ("SSLError", (R, True, False)),
        ("ProxyConnectionError", (R, False, True)),
        ("ResponseStreamingError", (R, False, True)),
    ):
        made = getattr(exceptions, name)(
            endpoint_url="https://x", error="e", proxy_url="http://p", request=None
        )
        assert judged(made) == expected, name
    lost = exceptions.CredentialRetrievalError(provider="sso", error_msg="x")
    assert judged(lost) == (R, False, False)
    assert judged(exceptions.NoCredentialsError()) == (P, False, False)


# --- gRPC and Google


def rpc_error(name: str | None, *metadata: tuple[str, str]) -> BaseException:
    grpc = pytest.importorskip("grpc")
    if name is None:
        bare: BaseException = grpc.RpcError()
        return bare
    members = {
        "code": lambda _self: grpc.StatusCode[name],
        "trailing_metadata": lambda _self: metadata,
    }
    exc: BaseException = type("InactiveRpcError", (grpc.RpcError,), members)()
    return exc


def test_grpc_goes_by_code() -> None:
    for names, expected in (
        ("ABORTED", (T, False, False)),
        ("UNAVAILABLE RESOURCE_EXHAUSTED DEADLINE_EXCEEDED", (R, False, True)),
        ("UNKNOWN INTERNAL CANCELLED", (R, True, False)),
        ("INVALID_ARGUMENT NOT_FOUND PERMISSION_DENIED DATA_LOSS", (P, False, False)),
    ):
        for name in names.split():
            assert judged(rpc_error(name)) == expected, name
    assert Classifier().classify(rpc_error(None)).matched is False


def test_grpc_pushback_is_obeyed() -> None:
    key = "grpc-retry-pushback-ms"
    assert verdict_of(rpc_error("UNAVAILABLE", (key, "2500"))).retry_after == 2.5
    assert judged(rpc_error("UNAVAILABLE", (key, "-1")))[0] is P
    assert judged(rpc_error("UNAVAILABLE", (key, "soon")))[0] is P


def test_a_real_grpc_call_and_its_asyncio_sister() -> None:
    grpc = pytest.importorskip("grpc")

    def call() -> None:
        with grpc.insecure_channel("127.0.0.1:1") as channel:
            channel.unary_unary("/x/y")(b"", timeout=2)

    async def call_later() -> None:
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            await channel.unary_unary("/x/y")(b"", timeout=2)

    for act in (call, lambda: asyncio.run(call_later())):
        with pytest.raises(grpc.RpcError) as caught:
            act()
        assert judged(caught.value) == (R, False, True)


def test_google_api_core() -> None:
    pytest.importorskip("grpc")
    exceptions = pytest.importorskip("google.api_core.exceptions")
    assert judged(exceptions.Aborted("x")) == (T, False, False)
    assert judged(exceptions.ServiceUnavailable("x")) == (R, False, True)
    assert judged(exceptions.NotFound("x")) == (P, False, False)
    assert judged(exceptions.TooManyRequests("x")) == (R, False, False)
    assert judged(exceptions.BadGateway("x")) == (R, False, True)
    assert judged(exceptions.RetryError("x", exceptions.Aborted("y"))) == (T, False, False)
    duration = SimpleNamespace(retry_delay=SimpleNamespace(seconds=3, nanos=500_000_000))
    assert verdict_of(exceptions.ResourceExhausted("x", details=[duration])).retry_after == 3.5
    proto_plus = SimpleNamespace(retry_delay=timedelta(seconds=2))
    assert verdict_of(exceptions.TooManyRequests("x", details=[proto_plus])).retry_after == 2.0
    response = SimpleNamespace(headers={"Retry-After": "8"})
    assert verdict_of(exceptions.TooManyRequests("x", response=response)).retry_after == 8.0


def test_google_auth() -> None:
    exceptions = pytest.importorskip("google.auth.exceptions")
    assert judged(exceptions.TransportError("x")) == (R, False, False)
    assert judged(exceptions.RefreshError("x", retryable=True)) == (R, False, False)
    assert judged(exceptions.RefreshError("x")) == (P, False, False)


# --- Azure


def test_azure() -> None:
    exceptions = pytest.importorskip("azure.core.exceptions")

    def answer(status: int, cls: str = "HttpResponseError", **headers: str) -> BaseException:
        response = SimpleNamespace(
            status_code=status,
            reason="x",
            headers={key.replace("_", "-"): value for key, value in headers.items()},
            text=lambda **_: "",
        )
        exc: BaseException = getattr(exceptions, cls)(message="x", response=response)
        return exc

    assert judged(exceptions.ServiceRequestError("x")) == (R, False, False)
    assert judged(exceptions.ServiceResponseError("x")) == (R, False, True)
    assert judged(exceptions.IncompleteReadError("x")) == (T, False, True)
    assert judged(answer(404, "ResourceNotFoundError")) == (P, False, False)
    assert judged(answer(401, "ClientAuthenticationError", retry_after="1")) == (P, False, False)
    assert judged(answer(503)) == (R, False, True)
    assert verdict_of(answer(429, x_ms_retry_after_ms="2500")).retry_after == 2.5
    assert verdict_of(answer(400, retry_after="2")).retry_after == 2.0


# --- OpenAI and Anthropic


@pytest.fixture(params=["openai", "anthropic"])
def sdk(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


@pytest.fixture
def respond(sdk: Any) -> Callable[..., BaseException]:
    """An error as the SDK's own client makes it from a response."""
    names = vars(sys.modules[f"{sdk.__name__}._exceptions"])
    transport = names.get("httpx2") or names["httpx"]  # older versions have httpx

    def make(status: int, body: Any = None, **headers: str) -> BaseException:
        request = transport.Request("POST", "https://api.invalid/v1")
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        response = transport.Response(status, json=body, headers=named, request=request)
        client = (sdk.OpenAI if sdk.__name__ == "openai" else sdk.Anthropic)(api_key="x")
        exc: BaseException = client._make_status_error_from_response(response)
        client.close()
        return exc

    return make


def test_llm_statuses(respond: Callable[..., BaseException]) -> None:
    assert judged(respond(400)) == (P, False, False)
    assert judged(respond(409)) == (R, False, False)
    assert judged(respond(429)) == (R, False, False)
    assert judged(respond(500)) == (R, False, True)
    assert judged(respond(529)) == (R, False, True)
    assert verdict_of(respond(429, retry_after_ms="250")).retry_after == 0.25
    assert verdict_of(respond(429, retry_after="3")).retry_after == 3.0


def test_llm_servers_say_whether_to_repeat(respond: Callable[..., BaseException]) -> None:
    assert judged(respond(400, x_should_retry="true")) == (R, False, False)
    assert judged(respond(503, x_should_retry="false")) == (P, False, False)


def test_llm_connections(sdk: Any) -> None:
    assert judged(sdk.APIConnectionError(request=None)) == (R, False, True)
    assert judged(sdk.APITimeoutError(request=None)) == (R, False, True)


def test_a_spent_quota_is_permanent_despite_429() -> None:
    openai = pytest.importorskip("openai")
    httpx2 = pytest.importorskip("httpx2")
    request = httpx2.Request("POST", "https://api.invalid")
    response = httpx2.Response(429, request=request, headers={"x-should-retry": "true"})
    body = {"type": "insufficient_quota", "code": "insufficient_quota"}
    assert judged(openai.RateLimitError("x", response=response, body=body))[0] is P
    anthropic = pytest.importorskip("anthropic")
    spent = anthropic.EnforcedSpendLimitReachedError("x", response=response, body=None)
    assert judged(spent)[0] is P


def test_an_error_inside_a_stream_goes_by_its_type() -> None:
    openai = pytest.importorskip("openai")
    anthropic = pytest.importorskip("anthropic")
    httpx2 = pytest.importorskip("httpx2")
    request = httpx2.Request("POST", "https://api.invalid")
    overloaded = {"error": {"type": "overloaded_error", "message": "x"}}
    broken = anthropic.APIStatusError(
        "x", response=httpx2.Response(200, request=request), body=overloaded
    )
    assert broken.status_code == 200
    assert judged(broken) == (R, False, True)
    assert judged(openai.APIError("x", request, body={"type": "server_error"})) == (R, False, True)
    refused = openai.APIError("x", request, body={"type": "invalid_request_error"})
    assert judged(refused)[0] is P
    assert Classifier().classify(openai.APIError("x", request, body=None)).matched is False


# --- SSH and retry libraries


def test_paramiko() -> None:
    ssh = pytest.importorskip("paramiko.ssh_exception")
    assert judged(ssh.AuthenticationException("timeout")) == (P, False, False)
    assert judged(ssh.ChannelException(2, "connect failed")) == (R, False, False)
    assert judged(ssh.ChannelException(1, "prohibited")) == (P, False, False)
    assert judged(ssh.NoValidConnectionsError({("h", 22): OSError()})) == (R, False, False)
    assert judged(ssh.SSHException("x")) == (R, True, False)


def test_tenacity_is_judged_by_the_last_attempt() -> None:
    tenacity = pytest.importorskip("tenacity")

    @tenacity.retry(stop=tenacity.stop_after_attempt(2))
    def fail() -> None:
        raise ConnectionResetError(104, "reset")

    with pytest.raises(tenacity.RetryError) as caught:
        fail()
    assert judged(caught.value) == (T, False, True)
