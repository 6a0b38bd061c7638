"""Which failures are worth another attempt, and when.

:class:`Classifier` judges an exception by its type and by codes that its
library put on it (errno, SQLSTATE, HTTP status, gRPC code), never by its text::

    verdict.py       RetryClass, Verdict: the answer
    engine.py        Classifier: in which order rules are asked
    plan.py          which rules hold for one class
    registry.py      rules by class path, found without importing anything
    retry_after.py   Retry-After and its relatives
    tables.py        the built-in table, assembled from
        durable_errors.py builtin_errors.py http_status.py http_clients.py
        sqlstate.py databases.py brokers.py cloud.py llm.py others.py

A new rule for a library goes into the module that lists its kind.
"""

from durable.classify.engine import Classifier
from durable.classify.verdict import RetryClass, Verdict

__all__ = ["Classifier", "RetryClass", "Verdict"]
