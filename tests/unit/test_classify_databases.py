"""Databases and brokers: codes where there are any, classes where there are none."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import amqp.exceptions
import celery.exceptions
import kombu.exceptions
import psycopg
import psycopg.errors
import pytest
import redis
import redis.exceptions
import sqlalchemy.exc
import sqlalchemy.orm.exc

from durable.classify import Classifier, RetryClass
from durable.classify.sqlstate import by_sqlstate

T, R, P = RetryClass.TRANSIENT, RetryClass.RECOVERABLE, RetryClass.PERMANENT
Judged = tuple[RetryClass, bool, bool]


def judged(exc: BaseException) -> Judged:
    verdict = Classifier().classify(exc)
    assert verdict.matched, repr(exc)
    return verdict.retry_class, verdict.limited, verdict.outcome_unknown


def caught(action: Callable[[], object]) -> BaseException:
    try:
        action()
    except Exception as exc:  # noqa: BLE001
        return exc
    pytest.fail("nothing was raised")


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- SQLSTATE

SQLSTATES = [
    ("40000 40001 40P01 55P03 57P05", (T, False, False)),
    ("08000 08001 08003 08004 08006 08P01 53000 53100 53200 53300 55006", (R, False, False)),
    ("57000 57014 57P01 57P02 57P03 58000 58030 25006 25P03 25P04 HV00N", (R, False, False)),
    ("08007 40003", (R, False, True)),
    ("XX000", (R, True, False)),
    ("23000 23502 23503 23505 23514 23P01 22001 22P02 42601 42P01 42501", (P, False, False)),
    ("25P02 25000 28P01 28000 3D000 0A000 53400 54001 57P04 XX001 XX002", (P, False, False)),
    ("P0001 P0002 40002 55000 58P01 99999", (P, False, False)),
]


@pytest.mark.parametrize(("codes", "expected"), SQLSTATES, ids=lambda value: str(value)[:20])
def test_each_sqlstate_has_its_class(codes: str, expected: Judged) -> None:
    for code in codes.split():
        verdict = by_sqlstate(code)
        found = (verdict.retry_class, verdict.limited, verdict.outcome_unknown)
        assert found == expected, code
        assert code in verdict.reason


def test_psycopg_goes_by_sqlstate() -> None:
    for code, expected in (("40P01", T), ("57014", R), ("23505", P), ("42601", P)):
        exc = psycopg.errors.lookup(code)("for the message only: deadlock, unique, timeout")
        assert judged(exc) == (expected, False, False)
    reason = Classifier().classify(psycopg.errors.DeadlockDetected()).reason
    assert reason == "SQLSTATE 40P01 (deadlock_detected)"


def test_psycopg_without_sqlstate_goes_by_class(closed_port: int) -> None:
    refused = caught(lambda: psycopg.connect(host="127.0.0.1", port=closed_port))
    assert isinstance(refused, psycopg.OperationalError)
    assert refused.sqlstate is None
    assert judged(refused) == (R, False, False)
    assert judged(psycopg.InterfaceError("closed")) == (R, False, False)
    assert judged(psycopg.ProgrammingError("no result")) == (P, False, False)
    assert judged(psycopg.DataError("null byte")) == (P, False, False)


def wrap(orig: BaseException, *, invalidated: bool = False) -> sqlalchemy.exc.DBAPIError:
    exc = sqlalchemy.exc.DBAPIError.instance(
        "SELECT 1",
        {},
        orig,
        psycopg.Error,
        connection_invalidated=invalidated,  # type: ignore[arg-type]
    )
    assert isinstance(exc, sqlalchemy.exc.DBAPIError)
    return exc


def test_sqlalchemy_is_unwrapped() -> None:
    assert judged(wrap(psycopg.errors.DeadlockDetected())) == (T, False, False)
    assert judged(wrap(psycopg.errors.UniqueViolation())) == (P, False, False)
    assert judged(wrap(psycopg.errors.AdminShutdown(), invalidated=True)) == (R, False, False)
    assert judged(wrap(psycopg.OperationalError("gone"))) == (R, False, False)


def test_sqlalchemy_s_dead_connection_adds_only_where_no_code_decides() -> None:
    assert judged(wrap(psycopg.ProgrammingError("closed"), invalidated=True)) == (R, False, False)
    assert judged(wrap(psycopg.ProgrammingError("wrong"))) == (P, False, False)
    dropped = psycopg.errors.lookup("57P04")()
    assert judged(wrap(dropped, invalidated=True)) == (P, False, False)


def test_a_real_connect_through_sqlalchemy(closed_port: int) -> None:
    engine = sqlalchemy.create_engine(f"postgresql+psycopg://127.0.0.1:{closed_port}/x")
    exc = caught(engine.connect)
    assert isinstance(exc, sqlalchemy.exc.OperationalError)
    assert not exc.connection_invalidated
    assert judged(exc) == (R, False, False)


def test_sqlalchemy_s_own_errors() -> None:
    assert judged(sqlalchemy.exc.TimeoutError("pool")) == (R, False, False)
    assert judged(sqlalchemy.exc.DisconnectionError()) == (R, False, False)
    assert judged(sqlalchemy.orm.exc.StaleDataError()) == (T, False, False)


def test_a_deadlock_stays_transient_however_often_it_is_wrapped() -> None:
    wrapped: BaseException = wrap(psycopg.errors.DeadlockDetected())
    for outer in (RuntimeError("repository"), ValueError("service"), Exception("task")):
        outer.__cause__ = wrapped
        wrapped = outer
    assert judged(wrapped) == (T, False, False)


# --- redis

#: Not in the redis-py that Celery 5.5 goes with.
NEW_IN_REDIS = {"InvalidPipelineStack"}
REDIS = [
    ("AuthenticationError AuthorizationError NoPermissionError DataError", (P, False, False)),
    ("ResponseError NoScriptError InvalidPipelineStack", (P, False, False)),
    ("WatchError TryAgainError", (T, False, False)),
    ("ConnectionError TimeoutError", (R, False, True)),
    ("BusyLoadingError ClusterDownError ReadOnlyError", (R, False, False)),
    ("LockError LockNotOwnedError", (R, False, False)),  # ValueErrors, both
]


@pytest.mark.parametrize(("names", "expected"), REDIS)
def test_redis_goes_by_class(names: str, expected: Judged) -> None:
    for name in names.split():
        if name in NEW_IN_REDIS and not hasattr(redis.exceptions, name):
            continue
        assert judged(getattr(redis.exceptions, name)("x")) == expected, name


def test_a_redirect_of_a_redis_cluster_is_transient() -> None:
    assert judged(redis.exceptions.MovedError("1 127.0.0.1:7000")) == (T, False, False)


def test_a_redis_that_refuses_is_recoverable(closed_port: int) -> None:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis(port=closed_port, retry=Retry(NoBackoff(), 0))
    assert judged(caught(client.ping)) == (R, False, True)
    client.close()


# --- Celery and its brokers


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (kombu.exceptions.OperationalError("x"), (R, False, True)),
        (kombu.exceptions.EncodeError("x"), (P, False, False)),
        (kombu.exceptions.ContentDisallowed("x"), (P, False, False)),
        (amqp.exceptions.MessageNacked(), (R, False, True)),
        (amqp.exceptions.ConnectionForced(), (R, False, False)),
        (amqp.exceptions.ResourceLocked(), (R, False, False)),
        (amqp.exceptions.InternalError(), (R, False, False)),
        (amqp.exceptions.ContentTooLarge(), (P, False, False)),
        (amqp.exceptions.AccessRefused(), (P, False, False)),
        (amqp.exceptions.NotFound(), (P, False, False)),
        (celery.exceptions.SoftTimeLimitExceeded(), (R, True, True)),  # really billiard's
        (celery.exceptions.TimeoutError(), (R, False, False)),
        (celery.exceptions.BackendStoreError("x"), (R, False, False)),
        (celery.exceptions.NotRegistered("x"), (P, False, False)),  # a KeyError too
        (celery.exceptions.MaxRetriesExceededError("x"), (P, False, False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_celery_and_its_brokers(exc: BaseException, expected: Judged) -> None:
    assert judged(exc) == expected


# --- libraries outside the dev environment


def test_psycopg2(closed_port: int) -> None:
    psycopg2 = pytest.importorskip("psycopg2")
    refused = caught(lambda: psycopg2.connect(host="127.0.0.1", port=closed_port))
    assert judged(refused) == (R, False, False)
    assert judged(psycopg2.ProgrammingError("x")) == (P, False, False)


def test_asyncpg() -> None:
    asyncpg = pytest.importorskip("asyncpg")
    assert judged(asyncpg.DeadlockDetectedError("x")) == (T, False, False)
    assert judged(asyncpg.InvalidCachedStatementError("x")) == (T, False, False)
    assert judged(asyncpg.FeatureNotSupportedError("x")) == (P, False, False)
    assert judged(asyncpg.InterfaceError("connection is closed")) == (R, False, False)
    assert judged(asyncpg.DataError("invalid input")) == (P, False, False)


def test_django() -> None:
    utils = pytest.importorskip("django.db.utils")
    exceptions = pytest.importorskip("django.core.exceptions")
    deadlock = utils.OperationalError("x")
    deadlock.__cause__ = psycopg.errors.DeadlockDetected()
    assert judged(deadlock) == (T, False, False)
    assert judged(utils.OperationalError("bare")) == (R, False, False)
    assert judged(utils.IntegrityError("bare")) == (P, False, False)
    assert judged(exceptions.ObjectDoesNotExist()) == (P, False, False)


def test_pymysql(closed_port: int) -> None:
    pymysql = pytest.importorskip("pymysql")
    for number, expected in ((1213, T), (1205, T), (2006, R), (3024, R), (1062, P), (1146, P)):
        assert judged(pymysql.err.OperationalError(number, "x")) == (expected, False, False)
    refused = caught(lambda: pymysql.connect(host="127.0.0.1", port=closed_port))
    assert judged(refused) == (R, False, False)


def test_pymongo() -> None:
    errors = pytest.importorskip("pymongo.errors")

    def failure(code: int, *labels: str) -> BaseException:
        exc: BaseException = errors.OperationFailure("x", code, {"errorLabels": list(labels)})
        return exc

    assert judged(failure(1, "SystemOverloadedError", "RetryableWriteError")) == (R, False, False)
    assert judged(failure(1, "TransientTransactionError")) == (T, False, False)
    assert judged(failure(1, "UnknownTransactionCommitResult")) == (R, False, True)
    assert judged(failure(112)) == (T, False, False)
    assert judged(failure(50)) == (R, False, True)
    assert judged(failure(10107)) == (R, False, False)
    assert judged(failure(11000)) == (P, False, False)
    assert judged(errors.ServerSelectionTimeoutError("x")) == (R, False, True)
    labelled = errors.AutoReconnect("x")
    labelled._add_error_label("RetryableWriteError")
    assert judged(labelled) == (T, False, False)
    assert judged(errors.ConfigurationError("x")) == (P, False, False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kafka_python() -> None:
    errors = pytest.importorskip("kafka.errors")
    assert judged(errors.NodeNotReadyError()) == (R, False, False)
    assert judged(errors.IllegalArgumentError()) == (P, False, False)


def test_confluent_kafka() -> None:
    kafka = pytest.importorskip("confluent_kafka")
    # Raised for a lost transport, retriable() is False: hence the list of codes.
    transport = kafka.KafkaError(kafka.KafkaError._TRANSPORT)
    assert not transport.retriable()

    def error(code: int, **flags: Any) -> BaseException:
        exc: BaseException = kafka.KafkaException(kafka.KafkaError(code, "x", **flags))
        return exc

    assert judged(kafka.KafkaException(transport)) == (R, False, False)
    assert judged(error(kafka.KafkaError._TRANSPORT, fatal=True)) == (P, False, False)
    assert judged(error(kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED)) == (P, False, False)
    assert judged(error(10, retriable=True)) == (R, False, False)
