"""Rules for Celery, its brokers, and Kafka."""

from __future__ import annotations

from typing import Any

from durable.classify.verdict import (
    PASS,
    PERMANENT,
    RECOVERABLE,
    RECOVERABLE_LIMITED_UNKNOWN,
    RECOVERABLE_UNKNOWN,
    Case,
    Rule,
    Table,
    Verdict,
    rules,
)

#: WorkerLostError and TimeLimitExceeded are absent: they are raised in the parent,
#: where recovery by lease takes over.
CELERY: dict[str, Rule] = {
    **rules("Retry Ignore Reject", PASS),
    "SoftTimeLimitExceeded": RECOVERABLE_LIMITED_UNKNOWN,
    **rules("TimeoutError BackendStoreError BackendGetMetaError", RECOVERABLE),
    **rules("CeleryError BackendError", PERMANENT),
}

KOMBU: dict[str, Rule] = {
    "OperationalError": RECOVERABLE_UNKNOWN,
    **rules("KombuError InconsistencyError HttpError", PERMANENT),
}

AMQP: dict[str, Rule] = {
    "MessageNacked": RECOVERABLE_UNKNOWN,
    # Two that py-amqp has in the wrong half: a larger message stays too large,
    # and 541 is the broker's own trouble.
    "ContentTooLarge": PERMANENT,
    "InternalError": RECOVERABLE,
    **rules("RecoverableConnectionError RecoverableChannelError", RECOVERABLE),
    **rules("IrrecoverableConnectionError IrrecoverableChannelError", PERMANENT),
}


def _kafka_python(exc: Any, _case: Case) -> Verdict:
    retriable = getattr(type(exc), "retriable", False) is True
    verdict = RECOVERABLE if retriable else PERMANENT
    return verdict.because(f"{type(exc).__name__}.retriable is {retriable}")


#: librdkafka's: transport, resolver, all brokers down, timeouts, queue full, coordinator
#: awaited, "retry"; the protocol's: topic, leader or coordinator moving, timeout, network,
#: too few replicas, rebalance, throttling.
KAFKA_RECOVERABLE = frozenset(
    {-195, -187, -185, -192, -184, -166, -180, -193, -153}
    | {3, 5, 6, 7, 13, 14, 15, 16, 19, 20, 27, 89}
)


def _confluent(exc: BaseException, _case: Case) -> Verdict | None:
    """By code: ``retriable()`` is set by the transactional API only, not for a lost transport."""
    error: Any = exc.args[0] if exc.args else None
    if not hasattr(error, "retriable"):
        return None
    code = error.code()
    if error.fatal():
        return PERMANENT.because(f"Kafka error {code}, fatal")
    recoverable = error.retriable() or code in KAFKA_RECOVERABLE
    return (RECOVERABLE if recoverable else PERMANENT).because(f"Kafka error {code}")


BROKERS: Table = {
    "celery.exceptions": CELERY,
    "kombu.exceptions": KOMBU,
    "amqp.exceptions": AMQP,
    "kafka.errors": {"KafkaError": _kafka_python},
    "confluent_kafka": {"KafkaException": _confluent},
}
