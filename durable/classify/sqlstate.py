"""Rules by SQLSTATE (PostgreSQL documentation, appendix A; section 13.5 on repeating)."""

from __future__ import annotations

from typing import TypeGuard

from durable.classify.verdict import (
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_LIMITED,
    RECOVERABLE_UNKNOWN,
    TRANSIENT,
    Verdict,
)

CODE_LENGTH = 5

#: Lost a race with another transaction; the whole transaction is worth repeating at once.
#: Section 13.5: 40001 unconditionally, 40P01 advisably.
TRANSIENT_CODES = {
    "40000": "transaction_rollback",
    "40001": "serialization_failure",
    "40P01": "deadlock_detected",
    "55P03": "lock_not_available",
    "57P05": "idle_session_timeout",
}
RECOVERABLE_CODES = {
    "25006": "read_only_sql_transaction",  # a failover under way, or a bug
    "25P03": "idle_in_transaction_session_timeout",
    "25P04": "transaction_timeout",
    "53000": "insufficient_resources",
    "53100": "disk_full",
    "53200": "out_of_memory",
    "53300": "too_many_connections",
    "55006": "object_in_use",
    "57000": "operator_intervention",
    "57014": "query_canceled",  # statement_timeout as well as a cancel request
    "57P01": "admin_shutdown",
    "57P02": "crash_shutdown",
    "57P03": "cannot_connect_now",
    "58000": "system_error",
    "58030": "io_error",
    "HV00N": "fdw_unable_to_establish_connection",
}
#: Whether the commit took place is unknown.
UNKNOWN_CODES = {
    "08007": "transaction_resolution_unknown",
    "40003": "statement_completion_unknown",
}
LIMITED_CODES = {"XX000": "internal_error"}

#: Connection exceptions; 08P01 too, which is what PgBouncer sends for most troubles.
RECOVERABLE_CLASS = {"08": "connection_exception"}

#: Only for the reason text: everything that is not listed above is permanent. A
#: unique violation (23505) may, on a rerun, mean that an earlier attempt committed;
#: who wants it tried again says so with ``autoretry_for``.
PERMANENT_CLASSES = {
    "0A": "feature_not_supported",
    "22": "data_exception",
    "23": "integrity_constraint_violation",
    "25": "invalid_transaction_state",
    "28": "invalid_authorization_specification",
    "3D": "invalid_catalog_name",
    "42": "syntax_error_or_access_rule_violation",
    "54": "program_limit_exceeded",
    "P0": "plpgsql_error",
    "XX": "internal_error",
}

_LISTED = {
    code: verdict.because(f"SQLSTATE {code} ({name})")
    for codes, verdict in (
        (TRANSIENT_CODES, TRANSIENT),
        (RECOVERABLE_CODES, RECOVERABLE),
        (UNKNOWN_CODES, RECOVERABLE_UNKNOWN),
        (LIMITED_CODES, RECOVERABLE_LIMITED),
    )
    for code, name in codes.items()
}


def is_sqlstate(code: object) -> TypeGuard[str]:
    """Whether it looks like a SQLSTATE."""
    return isinstance(code, str) and len(code) == CODE_LENGTH


def by_sqlstate(code: str) -> Verdict:
    """The verdict on a SQLSTATE.

    >>> by_sqlstate("40P01").reason
    'SQLSTATE 40P01 (deadlock_detected)'
    >>> by_sqlstate("23505").retry_class
    <RetryClass.PERMANENT: 'permanent'>
    """
    listed = _LISTED.get(code)
    if listed is not None:
        return listed
    name = RECOVERABLE_CLASS.get(code[:2])
    if name is not None:
        return RECOVERABLE.because(f"SQLSTATE {code} ({name})")
    name = PERMANENT_CLASSES.get(code[:2])
    return PERMANENT.because(f"SQLSTATE {code} (class {name})" if name else f"SQLSTATE {code}")
