"""Rules for builtins and the standard library.

Sources: the Python documentation, POSIX, sysexits(3). Programming errors come
last of all: the same call gives the same answer.
"""

from __future__ import annotations

import builtins
import errno
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from durable.classify.verdict import (
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_LIMITED,
    RECOVERABLE_UNKNOWN,
    TRANSIENT_UNKNOWN,
    Case,
    RetryClass,
    Table,
    Verdict,
    rules,
    type_name,
)

if TYPE_CHECKING:
    import ssl
    import subprocess

#: A connection broke, or the call was interrupted: the work may have been done.
TRANSIENT_ERRNO = "EINTR EAGAIN ECONNRESET ECONNABORTED EPIPE ESTALE EDEADLK"
#: Not reachable, or a resource is used up.
RECOVERABLE_ERRNO = (
    "ECONNREFUSED ETIMEDOUT EHOSTUNREACH ENETUNREACH ENETDOWN EADDRNOTAVAIL EADDRINUSE EMFILE "
    "ENFILE ENOBUFS ENOMEM ENOSPC EDQUOT EIO EBUSY ENOLCK"
)
BY_ERRNO = {
    getattr(errno, name): verdict.because(f"errno {name}")
    for names, verdict in ((TRANSIENT_ERRNO, TRANSIENT_UNKNOWN), (RECOVERABLE_ERRNO, RECOVERABLE))
    for name in names.split()
    if hasattr(errno, name)  # not every platform has each of them
}

#: The errno that each class stands for (PEP 3151), for those raised without a number.
ERRNO_OF_CLASS: dict[type, int] = {
    BlockingIOError: errno.EAGAIN,
    ChildProcessError: errno.ECHILD,
    BrokenPipeError: errno.EPIPE,
    ConnectionAbortedError: errno.ECONNABORTED,
    ConnectionRefusedError: errno.ECONNREFUSED,
    ConnectionResetError: errno.ECONNRESET,
    FileExistsError: errno.EEXIST,
    FileNotFoundError: errno.ENOENT,
    InterruptedError: errno.EINTR,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    PermissionError: errno.EACCES,
    ProcessLookupError: errno.ESRCH,
}
BUILTIN_OS_ERRORS = frozenset(
    cls for cls in vars(builtins).values() if isinstance(cls, type) and issubclass(cls, OSError)
)


def os_error(exc: OSError, _case: Case) -> Verdict | None:
    """By errno, for the builtins' own classes only.

    Others put their own numbers there: ``SSLError.errno`` 1 and 8 equal EPERM
    and ENOEXEC, ``gaierror`` has EAI codes. Of them only the base class counts.
    """
    own = type(exc) in BUILTIN_OS_ERRORS
    number = exc.errno if own else None
    if number is None:
        number = next((ERRNO_OF_CLASS[c] for c in type(exc).__mro__ if c in ERRNO_OF_CLASS), None)
    if number is None:
        return RECOVERABLE_LIMITED.because("OSError without errno") if own else None
    known = BY_ERRNO.get(number)
    return known or PERMANENT.because(f"errno {errno.errorcode.get(number, number)}")


#: Name resolution that may work later. Names without an address are among them:
#: a resolver answers so during an outage, and DNS records appear with delay.
RECOVERABLE_EAI = {
    getattr(socket, name): name
    for name in ("EAI_AGAIN", "EAI_FAIL", "EAI_NONAME", "EAI_NODATA", "EAI_MEMORY", "EAI_SYSTEM")
    if hasattr(socket, name)
}


def name_resolution(exc: socket.gaierror, _case: Case) -> Verdict:
    """By EAI code; nothing was sent."""
    name = RECOVERABLE_EAI.get(exc.errno)
    if name is None:
        return PERMANENT.because(f"name resolution: code {exc.errno}")
    return RECOVERABLE.because(f"name resolution: {name}")


def tls(exc: ssl.SSLError, _case: Case) -> Verdict:
    """A handshake that failed: a setting, as a rule, or a broken middlebox."""
    reason = getattr(exc, "reason", None)  # only those made by OpenSSL have one
    return RECOVERABLE_LIMITED.because(f"TLS: {reason or type_name(type(exc))}")


#: sysexits(3): EX_UNAVAILABLE, EX_OSERR, EX_IOERR, EX_TEMPFAIL; 124 is timeout(1)'s.
RECOVERABLE_EXIT = {
    69: "EX_UNAVAILABLE",
    71: "EX_OSERR",
    74: "EX_IOERR",
    75: "EX_TEMPFAIL",
    124: "timeout",
}
SHELL_SIGNAL = 128  # a shell reports death by signal n as 128 + n


def exit_status(exc: subprocess.CalledProcessError, _case: Case) -> Verdict:
    """By exit status; a signal may have been the OOM killer's or a deploy's."""
    status = exc.returncode
    if status in RECOVERABLE_EXIT:
        return RECOVERABLE.because(f"exit status {status} ({RECOVERABLE_EXIT[status]})")
    if status < 0 or status > SHELL_SIGNAL:
        return RECOVERABLE_LIMITED.because(f"exit status {status} (signal)")
    return PERMANENT.because(f"exit status {status}")


SEVERITY = {RetryClass.TRANSIENT: 0, RetryClass.RECOVERABLE: 1, RetryClass.PERMANENT: 2}


def group(exc: BaseException, case: Case) -> Verdict:
    """The worst member decides: a permanent one would fail the next attempt as well."""
    verdicts = [case.judge(member) for member in _leaves(exc)]
    for verdict in verdicts:
        if verdict.retry_class is RetryClass.PASS:
            return verdict
    worst = max(verdicts, key=lambda v: (SEVERITY[v.retry_class], v.limited))
    hints = [v for v in verdicts if v.retry_after is not None]
    longest = max(hints, key=lambda v: v.retry_after or 0.0) if hints else None
    waits = worst.retry_class is RetryClass.RECOVERABLE
    return replace(
        worst,
        outcome_unknown=any(v.outcome_unknown for v in verdicts),
        retry_after=longest.retry_after if longest and waits else None,
        retry_after_capped=any(v.retry_after_capped for v in hints) and waits,
        matched=any(v.matched for v in verdicts),
        reason=f"worst of {len(verdicts)} in {type_name(type(exc))}: {worst.reason}",
    )


def _leaves(exc: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    waiting = [exc]
    while waiting:
        one = waiting.pop()
        members = getattr(one, "exceptions", None)
        if isinstance(members, tuple) and hasattr(one, "derive"):
            waiting.extend(reversed(members))
        else:
            found.append(one)
    return found


BUILTIN: Table = {
    "builtins": {
        "BaseExceptionGroup": group,
        "TimeoutError": RECOVERABLE_UNKNOWN,
        "OSError": os_error,
        # confluent-kafka raises it for a full local queue.
        "BufferError": RECOVERABLE,
        # Celery's tracer re-raises it, so it seldom comes as far as here.
        "MemoryError": RECOVERABLE_LIMITED,
    },
    # The backport that anyio uses on Python 3.10.
    "exceptiongroup": {"BaseExceptionGroup": group},
    # Classes of their own before Python 3.11.
    "asyncio": {"TimeoutError": RECOVERABLE_UNKNOWN, "IncompleteReadError": TRANSIENT_UNKNOWN},
    "concurrent.futures": {
        "TimeoutError": RECOVERABLE_UNKNOWN,
        "BrokenExecutor": RECOVERABLE_LIMITED,
        "CancelledError": RECOVERABLE_LIMITED,
    },
    "socket": {"gaierror": name_resolution},
    "ssl": {
        "SSLCertVerificationError": PERMANENT,
        **rules("SSLEOFError SSLZeroReturnError SSLSyscallError", TRANSIENT_UNKNOWN),
        "SSLError": tls,
    },
    "http.client": rules("RemoteDisconnected IncompleteRead", TRANSIENT_UNKNOWN),
    "subprocess": {"CalledProcessError": exit_status, "TimeoutExpired": RECOVERABLE_UNKNOWN},
}

#: ValueError covers Unicode errors, json.JSONDecodeError and pydantic's ValidationError.
PROGRAMMING: Table = {
    "builtins": rules(
        "TypeError AttributeError NameError ImportError SyntaxError AssertionError "
        "NotImplementedError RecursionError LookupError ArithmeticError ValueError",
        PERMANENT,
    )
}
