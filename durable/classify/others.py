"""Rules for mail, SSH and retry libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durable.classify.verdict import (
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_LIMITED,
    RECOVERABLE_UNKNOWN,
    Case,
    Rule,
    Table,
    Verdict,
    rules,
)

if TYPE_CHECKING:
    import smtplib


def _temporary(code: int) -> bool:
    """RFC 5321, section 4.2.1: 4yz is a transient refusal."""
    return 400 <= code < 500  # noqa: PLR2004


def _smtp_reply(exc: smtplib.SMTPResponseException, _case: Case) -> Verdict | None:
    code = exc.smtp_code
    if _temporary(code) or code == -1:  # smtplib's own for a reply that is none
        return RECOVERABLE.because(f"SMTP {code}")
    return PERMANENT.because(f"SMTP {code}") if code >= 500 else None  # noqa: PLR2004


def _smtp_recipients(exc: smtplib.SMTPRecipientsRefused, _case: Case) -> Verdict:
    """All were refused; a partial refusal is a return value of sendmail, no error."""
    codes = sorted({reply[0] for reply in exc.recipients.values()})
    later = any(_temporary(code) for code in codes)
    text = ", ".join(map(str, codes))
    return (RECOVERABLE if later else PERMANENT).because(f"SMTP {text} for all recipients")


SMTP: dict[str, Rule] = {
    "SMTPResponseException": _smtp_reply,
    "SMTPRecipientsRefused": _smtp_recipients,
    "SMTPServerDisconnected": RECOVERABLE_UNKNOWN,
}

#: RFC 4254, section 5.1: 2 connect failed, 4 resource shortage; 1 prohibited, 3 unknown type.
CHANNEL_RECOVERABLE = frozenset({2, 4})


def _ssh_channel(exc: Any, _case: Case) -> Verdict:
    verdict = RECOVERABLE if exc.code in CHANNEL_RECOVERABLE else PERMANENT
    return verdict.because(f"SSH channel refused: code {exc.code}")


PARAMIKO: dict[str, Rule] = {
    # Timeouts of authentication too: more attempts may lock the account.
    **rules("AuthenticationException BadHostKeyException IncompatiblePeer", PERMANENT),
    "ChannelException": _ssh_channel,
    "NoValidConnectionsError": RECOVERABLE,
    "SSHException": RECOVERABLE_LIMITED,
}


def _last_attempt(exc: Any, case: Case) -> Verdict | None:
    return case.classify(exc.last_attempt.exception())


OTHERS: Table = {
    "smtplib": SMTP,
    "paramiko.ssh_exception": PARAMIKO,
    "tenacity": {"RetryError": _last_attempt},
}
