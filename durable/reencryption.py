"""Brings all that is stored into the form that ``durable_encryption_keys`` asks for now."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from durable import stored_message
from durable.errors import ConfigurationError, EncryptionError
from durable.store import reencryption as store
from durable.store.reencryption import TABLES, Stale, Table, Wanted

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.codec import Codec

#: Rows that somebody else holds or has just written are tried again so often.
_ROUNDS = 5
_PAUSE = 0.5
_MOST_NAMED = 10


@dataclass(slots=True)
class Report:
    """What a re-encryption has done.

    Attributes:
        rewritten: values that are in the new form now.
        missed: values that others were writing each time they were looked at.
        unreadable: why values could not be read, by where they are; at most ten.
        unreadable_count: how many could not be read.
    """

    rewritten: int = 0
    missed: int = 0
    unreadable_count: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)


class Reencryption:
    """Re-encrypts the rows of a namespace while workers go on.

    It can be stopped at any time and started anew: what is in the new form
    already is passed over.

    Args:
        durable: of the app, with the keys as they are to be from now on.
        batch: rows that are read, and locked for a moment, at a time.
    """

    def __init__(self, durable: Durable, *, batch: int = 100) -> None:
        codec = durable.codec
        if codec.keyring is None:
            raise ConfigurationError(
                "there are no keys: set durable_encryption_keys (or DURABLE_ENCRYPTION_KEYS). To"
                " make all plain again, keep the keys and set durable_encrypt = False"
            )
        self._durable = durable
        self._codec: Codec = codec
        self._batch = batch
        prefix = codec.keyring.prefix() if codec.encrypts else None
        in_string = None if prefix is None else json.dumps(prefix)[:-1]
        self._wanted = Wanted(durable.settings.namespace, prefix, in_string)

    def stale(self) -> Mapping[str, int]:
        """Count the values to be rewritten, by the name of their present key, or ``plain``."""
        return self._durable.database.call(store.stale_by_key, self._wanted)

    def size(self) -> int:
        """Count the rows to be looked at."""
        return self._durable.database.call(store.size, self._wanted.namespace)

    def run(self, advance: Callable[[int], object] | None = None) -> Report:
        """Rewrite what is stale.

        Args:
            advance: called with the number of rows that were looked at, in the first round.
        """
        report = Report()
        for number in range(_ROUNDS):
            if number:
                self._durable.clock.sleep(_PAUSE)
            report.missed = 0
            report.unreadable_count = 0
            for table in TABLES:
                self._table(table, report, advance if number == 0 else None)
            if not report.missed:
                break
        return report

    def _table(self, table: Table, report: Report, advance: Callable[[int], object] | None) -> None:
        after = None
        while True:
            rows = self._durable.database.call(store.page, table, self._wanted, after, self._batch)
            if not rows:
                return
            after = rows[-1][0]
            for column in table.columns:
                self._column(table, column, rows, report)
            if advance is not None:
                advance(len(rows))

    def _column(self, table: Table, column: str, rows: list[Stale], report: Report) -> None:
        changes = []
        for key, texts in rows:
            if column not in texts:
                continue
            try:
                new = self._rewritten(table, column, texts[column])
            except EncryptionError as exc:
                report.unreadable_count += 1
                if len(report.unreadable) < _MOST_NAMED:
                    report.unreadable[_where(table, column, key)] = str(exc)
                continue
            changes.append((key, texts[column], new))
        if changes:
            done = self._durable.database.call(store.put, table, column, changes)
            report.rewritten += done
            report.missed += len(changes) - done

    def _rewritten(self, table: Table, column: str, text: str) -> str:
        codec = self._codec
        if column == "message":
            return stored_message.dumped(stored_message.loaded(text, codec), codec)
        if (table.name, column) == ("workflow_events", "error"):
            return codec.seal_text(codec.open_text(text))
        return codec.reseal(text)


def _where(table: Table, column: str, key: tuple[Any, ...]) -> str:
    run = "event" if table.name == "workflow_events" else "run"
    place = f" step {key[5]!r}" if table.name == "step_attempts" else ""
    return f"{run} {key[0]}{place}, {column}"
