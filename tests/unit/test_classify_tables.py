"""The table against the libraries that are installed here."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from durable.classify.tables import BUILTIN, LIBRARY, OWN, PROGRAMMING

#: Installed by the project's dev extra: to skip one of these would hide a mistake.
ALWAYS = {
    *BUILTIN,
    "amqp.exceptions",
    "celery.exceptions",
    "durable.errors",
    "http.client",
    "kombu.exceptions",
    "psycopg",
    "redis.exceptions",
    "smtplib",
    "sqlalchemy.exc",
    "sqlalchemy.orm.exc",
    "urllib.error",
} - {"exceptiongroup"}

#: Names that only some supported versions have.
MAY_BE_ABSENT = {
    ("builtins", "BaseExceptionGroup"),  # before Python 3.11
    ("django.core.exceptions", "FullResultSet"),
    ("django.core.exceptions", "ObjectNotUpdated"),
    ("redis.exceptions", "OutOfMemoryError"),
    ("redis.exceptions", "MaxConnectionsError"),
}

TABLES = [*OWN.items(), *LIBRARY.items(), *BUILTIN.items(), *PROGRAMMING.items()]


@pytest.mark.filterwarnings("ignore")  # of the libraries, about themselves
@pytest.mark.parametrize(("module", "rules"), TABLES, ids=[name for name, _ in TABLES])
def test_each_class_that_has_a_rule_exists(module: str, rules: dict[str, object]) -> None:
    try:
        found = vars(importlib.import_module(module))
    except ImportError:
        if module in ALWAYS:
            raise
        pytest.skip(f"{module} is not installed")
    for name in rules:
        if (module, name) not in MAY_BE_ABSENT:
            assert isinstance(found.get(name), type), name
            assert issubclass(found[name], BaseException), name


def test_no_library_is_imported_by_the_table() -> None:
    """A fresh interpreter shows what judging brought along."""
    code = (
        "import sys, durable.classify as c; before = set(sys.modules); "
        "c.Classifier().classify(ValueError()); print(sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert shown.stdout.strip() == "[]"
