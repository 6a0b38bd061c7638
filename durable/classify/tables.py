"""The built-in table, assembled. Which part decides first: ``registry.Tier``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from durable.classify.brokers import BROKERS
from durable.classify.builtin_errors import BUILTIN, PROGRAMMING
from durable.classify.cloud import CLOUD
from durable.classify.databases import DATABASES
from durable.classify.durable_errors import DURABLE, OWN
from durable.classify.http_clients import HTTP_CLIENTS
from durable.classify.llm import LLM
from durable.classify.others import OTHERS

if TYPE_CHECKING:
    from durable.classify.verdict import Table

__all__ = ["BUILTIN", "LIBRARY", "OWN", "PROGRAMMING"]

# durable.errors is in OWN as well, so the parts must not share a module's key.
LIBRARY: Table = {**DURABLE, **HTTP_CLIENTS, **DATABASES, **BROKERS, **CLOUD, **LLM, **OTHERS}
