"""Rules by class path, resolved against what the process has imported already.

A rule for ``httpx.ReadTimeout`` must neither import httpx nor compare
``__module__``: classes move (``celery.exceptions.SoftTimeLimitExceeded`` lives
in billiard, confluent's ``KafkaException`` in ``cimpl``). So a path is looked
up in ``sys.modules`` and stays pending until its module appears there.
"""

from __future__ import annotations

import enum
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from durable.errors import OptionError

if TYPE_CHECKING:
    from durable.classify.verdict import Rule, Table


class Tier(enum.IntEnum):
    """Which rules are asked first; within a tier the class nearest in the MRO goes first.

    Libraries precede builtins, since many library errors are also one:
    ``redis.LockError`` is a ``ValueError``, ``requests.JSONDecodeError`` an ``OSError``.
    """

    OWN = 0
    USER = 1
    LIBRARY = 2
    BUILTIN = 3
    PROGRAMMING = 4


@dataclass(frozen=True)
class Entry:
    """One rule for one class.

    Attributes:
        source: path of the class, for the reason text.
        tier: when it is asked.
        order: position of registration; of two user rules for one class the newer is asked first.
    """

    source: str
    rule: Rule
    tier: Tier
    order: int


class Registry:
    """All rules of one classifier.

    Attributes:
        generation: raised whenever a class gained a rule; what was
            worked out under an older one is stale.
        modules_seen: size of ``sys.modules`` at the last look.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.modules_seen = -1
        self._entries: dict[type, list[Entry]] = {}
        self._pending: dict[str, list[tuple[str, Entry]]] = {}
        self._order = 0
        self._lock = threading.Lock()

    def add_table(self, table: Table, tier: Tier) -> None:
        """Add the rules of a built-in table."""
        for module, named in table.items():
            for name, rule in named.items():
                self._add_path(module, name, rule, tier)

    def add(self, target: object, rule: Rule, tier: Tier) -> None:
        """Add a rule for a class, or for the path of one.

        Raises:
            OptionError: the target is neither.
        """
        if isinstance(target, str):
            self._add_path(*_split(target), rule, tier)
        elif isinstance(target, type) and issubclass(target, BaseException):
            with self._lock:
                entry = self._entry(f"{target.__module__}.{target.__qualname__}", rule, tier)
                self._bind(target, entry)
        else:
            raise OptionError(
                f"exc_type={target!r}: give an exception class, or its path such as "
                '"stripe.error.CardError" (for a nested class "shop.models:Order.DoesNotExist").'
            )

    def entries(self, cls: type) -> list[tuple[int, Entry]]:
        """All rules for ``cls`` and its bases, in the order in which they are asked.

        Each with the distance of its class in the MRO.
        """
        self.refresh()
        found = [
            (distance, entry)
            for distance, base in enumerate(cls.__mro__)
            for entry in self._entries.get(base, ())
        ]
        return sorted(found, key=lambda item: (item[1].tier, item[0], -item[1].order))

    def refresh(self) -> None:
        """Bind the pending paths whose class exists by now."""
        with self._lock:
            self.modules_seen = len(sys.modules)
            for module in [name for name in self._pending if name in sys.modules]:
                waiting = [
                    (name, entry)
                    for name, entry in self._pending[module]
                    if not self._bind_path(module, name, entry)
                ]
                self._pending[module] = waiting
                if not waiting:
                    del self._pending[module]

    def _add_path(self, module: str, name: str, rule: Rule, tier: Tier) -> None:
        with self._lock:
            entry = self._entry(f"{module}.{name}", rule, tier)
            if not self._bind_path(module, name, entry):
                self._pending.setdefault(module, []).append((name, entry))

    def _entry(self, source: str, rule: Rule, tier: Tier) -> Entry:
        self._order += 1
        return Entry(source.removeprefix("builtins."), rule, tier, self._order)

    def _bind_path(self, module: str, name: str, entry: Entry) -> bool:
        target = _lookup(module, name)
        if not (isinstance(target, type) and issubclass(target, BaseException)):
            return False
        self._bind(target, entry)
        return True

    def _bind(self, target: type, entry: Entry) -> None:
        self._entries.setdefault(target, []).append(entry)
        self.generation += 1


def _split(path: str) -> tuple[str, str]:
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    parts = [*module.split("."), *name.split(".")]
    if not module or not all(part.isidentifier() for part in parts):
        raise OptionError(
            f'exc_type={path!r} is no class path: write "package.module.Class" '
            'or "package.module:Outer.Class".'
        )
    return module, name


def _lookup(module: str, name: str) -> object:
    """The object at that path, touching nothing that could start an import.

    ``object.__getattribute__`` goes round lazy modules, which load at the
    first plain attribute access; the module's ``__dict__`` goes round its
    ``__getattr__``.
    """
    found: object = sys.modules.get(module)
    for part in name.split("."):
        try:
            namespace = object.__getattribute__(found, "__dict__")
        except AttributeError:
            return None
        found = namespace.get(part)
    return found
