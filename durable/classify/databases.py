"""Rules for database drivers and what wraps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durable.classify.sqlstate import by_sqlstate, is_sqlstate
from durable.classify.verdict import (
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_UNKNOWN,
    TRANSIENT,
    Case,
    RetryClass,
    Rule,
    Table,
    Verdict,
    rules,
)

if TYPE_CHECKING:
    from durable.classify.verdict import RuleFunction


def _coded(attribute: str, otherwise: Verdict) -> RuleFunction:
    """By SQLSTATE, or by class where the server never answered.

    A refused connection, a bad password, a missing database and too many
    connections all come without a code from both psycopgs.
    """

    def rule(exc: BaseException, _case: Case) -> Verdict:
        code = getattr(exc, attribute, None)
        return by_sqlstate(code) if is_sqlstate(code) else otherwise

    return rule


def _dbapi(attribute: str) -> dict[str, Rule]:
    return {
        **rules("OperationalError InterfaceError", _coded(attribute, RECOVERABLE)),
        "Error": _coded(attribute, PERMANENT),
    }


ASYNCPG: dict[str, Rule] = {
    # 0A000, yet another attempt prepares the statement anew.
    "InvalidCachedStatementError": TRANSIENT,
    "PostgresError": _coded("sqlstate", PERMANENT),
    # Wrong arguments are InterfaceErrors as well: these two are ValueErrors.
    **rules("DataError ClientConfigurationError UnsupportedClientFeatureError", PERMANENT),
    "InterfaceError": RECOVERABLE,
}


def _sqlalchemy(otherwise: Verdict) -> RuleFunction:
    """By the driver's code; otherwise a dead connection is worth another try.

    ``connection_invalidated`` is False where connecting itself failed, so it
    can only add to what the driver's error says.
    """

    def rule(exc: Any, case: Case) -> Verdict:
        for attribute in ("sqlstate", "pgcode"):  # SQLAlchemy's own wrapper of asyncpg has both
            code = getattr(exc.orig, attribute, None)
            if is_sqlstate(code):
                return by_sqlstate(code)
        verdict = case.classify(exc.orig) or otherwise
        if exc.connection_invalidated and verdict.retry_class is RetryClass.PERMANENT:
            return RECOVERABLE.because("connection_invalidated")
        return verdict

    return rule


SQLALCHEMY: dict[str, Rule] = {
    **rules("OperationalError InterfaceError", _sqlalchemy(RECOVERABLE)),
    "DBAPIError": _sqlalchemy(PERMANENT),
    **rules("TimeoutError DisconnectionError", RECOVERABLE),
}


def _django(otherwise: Verdict) -> RuleFunction:
    """Django raises its own class from the driver's error."""

    def rule(exc: BaseException, case: Case) -> Verdict:
        return case.classify(exc.__cause__) or otherwise

    return rule


DJANGO: dict[str, Rule] = {
    **rules("OperationalError InterfaceError", _django(RECOVERABLE)),
    "Error": _django(PERMANENT),
}

#: ObjectDoesNotExist may mean that the run was started before the row was committed
#: (pass ``transaction=``); waiting is not the cure.
DJANGO_CORE: dict[str, Rule] = rules(
    "AppRegistryNotReady BadRequest DisallowedHost EmptyResultSet FieldDoesNotExist FieldError "
    "FullResultSet ImproperlyConfigured MiddlewareNotUsed MultipleObjectsReturned "
    "ObjectDoesNotExist ObjectNotUpdated PermissionDenied RequestAborted SuspiciousOperation "
    "SynchronousOnlyOperation TooManyFieldsSent TooManyFilesSent ValidationError ViewDoesNotExist",
    PERMANENT,
)

#: Lock wait timeout (it rolls back only the statement, so repeat the transaction),
#: deadlock, record changed, group replication conflicts, disconnected while idle.
MYSQL_TRANSIENT = frozenset({1020, 1205, 1213, 1614, 1689, 3101, 3572, 4031})
#: Resources, connections, shutdown, timeouts, read-only.
MYSQL_RECOVERABLE = frozenset(
    {1021, 1037, 1040, 1041, 1053, 1158, 1159, 1160, 1161, 1180, 1203, 1206, 1226, 1290, 1317}
    | {1836, 1927, 1969, 2002, 2003, 2005, 2006, 2013, 2014, 2045, 2055, 3024, 3168}
)


def _mysql(exc: BaseException, _case: Case) -> Verdict:
    number = exc.args[0] if exc.args else None
    if number in MYSQL_TRANSIENT:
        return TRANSIENT.because(f"MySQL error {number}")
    if number in MYSQL_RECOVERABLE:
        return RECOVERABLE.because(f"MySQL error {number}")
    return PERMANENT.because(f"MySQL error {number}" if isinstance(number, int) else "MySQL error")


REDIS: dict[str, Rule] = {
    # They subclass ConnectionError.
    **rules("AuthenticationError AuthorizationError", PERMANENT),
    **rules("WatchError TryAgainError AskError", TRANSIENT),
    **rules("BusyLoadingError MaxConnectionsError", RECOVERABLE),
    **rules("ConnectionError TimeoutError", RECOVERABLE_UNKNOWN),
    **rules("ClusterDownError ReadOnlyError OutOfMemoryError LockError", RECOVERABLE),
    **rules("RedisError RedisClusterException", PERMANENT),
}

MONGO_WRITE_CONFLICT = 112
#: Host unreachable or not found, network timeout, shutdown, not primary, exceeded time limit.
MONGO_RECOVERABLE = frozenset(
    {6, 7, 89, 91, 134, 189, 262, 9001, 10058, 10107, 11600, 11602, 13435, 13436}
)


def _mongo_label(exc: Any) -> Verdict | None:
    if exc.has_error_label("SystemOverloadedError"):
        return RECOVERABLE.because("MongoDB label SystemOverloadedError")
    for label in ("TransientTransactionError", "RetryableWriteError"):
        if exc.has_error_label(label):
            return TRANSIENT.because(f"MongoDB label {label}")
    if exc.has_error_label("UnknownTransactionCommitResult"):
        return RECOVERABLE_UNKNOWN.because("MongoDB label UnknownTransactionCommitResult")
    return None


def _mongo_connection(exc: Any, _case: Case) -> Verdict:
    return _mongo_label(exc) or RECOVERABLE_UNKNOWN


def _mongo(exc: Any, _case: Case) -> Verdict:
    label = _mongo_label(exc)
    if label is not None:
        return label
    if exc.timeout:
        return RECOVERABLE_UNKNOWN.because("MongoDB timeout")
    code = getattr(exc, "code", None)
    if code == MONGO_WRITE_CONFLICT:
        return TRANSIENT.because(f"MongoDB code {code} (WriteConflict)")
    found = RECOVERABLE if code in MONGO_RECOVERABLE else PERMANENT
    return found.because(f"MongoDB code {code}")


DATABASES: Table = {
    "psycopg": _dbapi("sqlstate"),
    "psycopg2": _dbapi("pgcode"),
    "asyncpg": ASYNCPG,
    "sqlalchemy.exc": SQLALCHEMY,
    "sqlalchemy.orm.exc": {"StaleDataError": TRANSIENT},
    "django.db.utils": DJANGO,
    "django.core.exceptions": DJANGO_CORE,
    "pymysql.err": {"Error": _mysql},
    "MySQLdb": {"Error": _mysql},
    "redis.exceptions": REDIS,
    "pymongo.errors": {"ConnectionFailure": _mongo_connection, "PyMongoError": _mongo},
}
