"""Builtins and the standard library; real errors where they are cheap to have."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import http.client
import io
import json
import os
import smtplib
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest

from durable.classify import Classifier, RetryClass

T, R, P = RetryClass.TRANSIENT, RetryClass.RECOVERABLE, RetryClass.PERMANENT
LIMITED = "limited"


def caught(action: Callable[[], object]) -> BaseException:
    try:
        action()
    except BaseException as exc:  # noqa: BLE001
        return exc
    pytest.fail("nothing was raised")


def judged(exc: BaseException) -> tuple[RetryClass, bool, bool]:
    verdict = Classifier().classify(exc)
    assert verdict.matched, exc
    return verdict.retry_class, verdict.limited, verdict.outcome_unknown


def refuse() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()
    socket.create_connection(free)


def test_a_refused_connection_is_recoverable_and_nothing_was_sent() -> None:
    assert judged(caught(refuse)) == (R, False, False)


def test_a_broken_pipe_is_transient_with_unknown_outcome() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        exc = caught(lambda: [ours.sendall(b"x" * 65536) for _ in range(100)])
    assert isinstance(exc, OSError)
    assert judged(exc) == (T, False, True)


def test_a_socket_timeout_is_recoverable_with_unknown_outcome() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.001)
        assert judged(caught(lambda: ours.recv(1))) == (R, False, True)


def test_a_missing_file_is_permanent(tmp_path: Path) -> None:
    assert judged(caught((tmp_path / "absent").read_text)) == (P, False, False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(n, (T, False, True)) for n in ("EINTR", "EAGAIN", "ECONNRESET", "ESTALE", "EDEADLK")],
        *[(n, (R, False, False)) for n in ("ENOSPC", "EMFILE", "ENETUNREACH", "EIO", "EBUSY")],
        *[(n, (P, False, False)) for n in ("ENOENT", "EACCES", "EROFS", "EINVAL")],
    ],
)
def test_an_os_error_goes_by_errno(name: str, expected: tuple[RetryClass, bool, bool]) -> None:
    exc = OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
    assert judged(exc) == expected
    assert name in Classifier().classify(exc).reason


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (OSError("disk?"), (R, True, False)),
        (ConnectionError("hm"), (R, True, False)),
        (ConnectionResetError("Connection lost"), (T, False, True)),
        (BrokenPipeError(), (T, False, True)),
        (PermissionError("not your order"), (P, False, False)),
    ],
)
def test_without_errno_the_class_says_it(
    exc: OSError, expected: tuple[RetryClass, bool, bool]
) -> None:
    assert judged(exc) == expected


def test_the_errno_of_a_foreign_class_is_not_read() -> None:
    class VendorError(OSError):
        """With a number of the vendor's own."""

    class DroppedError(ConnectionResetError):
        """Of which the base class does say something."""

    assert Classifier().classify(VendorError(errno.ENOENT, "code 2")).matched is False
    assert judged(DroppedError(errno.ENOENT, "code 2")) == (T, False, True)
    assert judged(caught(io.StringIO().fileno)) == (P, False, False)


@pytest.mark.parametrize("number", [1, 8])
def test_an_ssl_error_is_not_taken_for_eperm_or_enoexec(number: int) -> None:
    assert judged(ssl.SSLError(number, "[SSL: WRONG_VERSION_NUMBER]")) == (R, True, False)


def test_a_tls_handshake_with_something_else_names_its_reason() -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    incoming.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    exc = caught(tls.do_handshake)
    assert judged(exc) == (R, True, False)
    assert str(getattr(exc, "reason", "")) in Classifier().classify(exc).reason


def test_a_bad_certificate_is_permanent_and_an_end_of_stream_is_not() -> None:
    assert judged(ssl.SSLCertVerificationError(1, "expired")) == (P, False, False)
    assert judged(ssl.SSLEOFError(8, "EOF")) == (T, False, True)
    assert judged(ssl.SSLZeroReturnError(6, "closed")) == (T, False, True)


def test_name_resolution_goes_by_its_own_codes() -> None:
    assert judged(socket.gaierror(socket.EAI_AGAIN, "try again")) == (R, False, False)
    assert judged(socket.gaierror(socket.EAI_NONAME, "unknown")) == (R, False, False)
    assert judged(socket.gaierror(socket.EAI_FAMILY, "no such family")) == (P, False, False)
    numeric = caught(lambda: socket.getaddrinfo("no name", 0, flags=socket.AI_NUMERICHOST))
    assert judged(numeric) == (R, False, False)


@pytest.mark.parametrize(
    "exc",
    [
        TimeoutError(),
        TimeoutError(errno.ETIMEDOUT, "connect or established, who knows"),
        asyncio.TimeoutError(),
        concurrent.futures.TimeoutError(),
        subprocess.TimeoutExpired("pg_dump", 5),
    ],
    ids=repr,
)
def test_every_timeout_has_an_unknown_outcome(exc: BaseException) -> None:
    assert judged(exc) == (R, False, True)


@pytest.mark.parametrize(
    "exc",
    [
        http.client.RemoteDisconnected("closed"),
        http.client.IncompleteRead(b"part"),
        asyncio.IncompleteReadError(b"part", 9),
    ],
    ids=repr,
)
def test_a_broken_reply_is_transient_with_unknown_outcome(exc: BaseException) -> None:
    assert judged(exc) == (T, False, True)


@pytest.mark.parametrize(
    "exc",
    [concurrent.futures.BrokenExecutor(), concurrent.futures.CancelledError(), MemoryError()],
    ids=repr,
)
def test_a_broken_machine_gets_three_more_chances(exc: BaseException) -> None:
    assert judged(exc) == (R, True, False)


def test_a_full_local_queue_is_recoverable() -> None:
    assert judged(BufferError("Local: Queue full")) == (R, False, False)


class Order(pydantic.BaseModel):
    cents: int


@pytest.mark.parametrize(
    "action",
    [
        lambda: len(5),  # type: ignore[arg-type]
        lambda: {}["sku"],
        lambda: list(range(1))[2],
        lambda: 1 / 0,
        lambda: int("x"),
        b"\xff".decode,
        lambda: json.loads("{"),
        lambda: Order(cents="many"),  # type: ignore[arg-type]
        lambda: object().price,  # type: ignore[attr-defined]
        lambda: __import__("no_such_module"),
        lambda: compile("(", "x", "exec"),
        lambda: undefined,  # type: ignore[name-defined]  # noqa: F821
    ],
)
def test_a_programming_error_is_permanent(action: Callable[[], object]) -> None:
    assert judged(caught(action)) == (P, False, False)


def test_endless_recursion_is_permanent() -> None:
    assert judged(RecursionError("maximum recursion depth")) == (P, False, False)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (75, (R, False, False)),
        (124, (R, False, False)),
        (1, (P, False, False)),
        (64, (P, False, False)),
        (-9, (R, True, False)),
        (137, (R, True, False)),
    ],
)
def test_a_child_process_goes_by_its_exit_status(
    status: int, expected: tuple[RetryClass, bool, bool]
) -> None:
    assert judged(subprocess.CalledProcessError(status, "x")) == expected


def test_a_real_child_that_is_killed_gets_another_chance() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    exc = caught(lambda: subprocess.run([sys.executable, "-S", "-c", code], check=True))
    assert judged(exc) == (R, True, False)


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (smtplib.SMTPResponseException(421, b"busy"), R),
        (smtplib.SMTPDataError(451, b"greylisted"), R),
        (smtplib.SMTPConnectError(-1, b""), R),
        (smtplib.SMTPSenderRefused(550, b"no", "a@b"), P),
        (smtplib.SMTPAuthenticationError(535, b"no"), P),
        (smtplib.SMTPRecipientsRefused({"a@b": (550, b""), "c@d": (450, b"")}), R),
        (smtplib.SMTPRecipientsRefused({"a@b": (550, b"")}), P),
    ],
    ids=repr,
)
def test_mail_goes_by_reply_code(exc: smtplib.SMTPException, expected: RetryClass) -> None:
    assert judged(exc) == (expected, False, False)


def test_a_mail_server_that_hung_up_leaves_the_outcome_unknown() -> None:
    assert judged(smtplib.SMTPServerDisconnected("gone")) == (R, False, True)
