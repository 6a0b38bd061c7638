"""Queries of a re-encryption: what is stored in another form than it would be now, page by page.

A page is read without a lock; each value is then put back only over the very
text that was read. Whatever was written in between stays, and is looked at in
the next round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from durable.store.connections import Connection


@dataclass(frozen=True, slots=True)
class Table:
    """A table that holds users' data.

    Attributes:
        name: of the table.
        key: columns of its primary key, and their types.
        columns: those that hold data, each with the condition by which it is
            stale: ``{0}`` is its text, ``prefix`` how it begins once it is
            encrypted by the newest key, NULL if it is to be plain.
        namespace: condition by which a row is of the namespace.
    """

    name: str
    key: Mapping[str, str]
    columns: Mapping[str, str]
    namespace: str


_VALUE = (
    "(CASE WHEN %(prefix)s::text IS NULL THEN strpos({0}, '\"durable:encrypted\"') > 0"
    " ELSE NOT starts_with({0}, %(prefix)s) END)"
)
# A handle of started tasks is never encrypted: SQL looks into it.
_OUTPUT = f"(t.kind <> 'dispatch' AND {_VALUE})"
# As JSON within a JSON string, hence a prefix with the quotes escaped.
_MESSAGE = (
    "(CASE WHEN %(prefix)s::text IS NULL THEN t.message -> 'sealed' IS NOT NULL"
    " ELSE NOT starts_with((t.message -> 'sealed')::text, %(in_string)s)"
    " OR (t.message -> 'argsrepr')::text <> '\"***\"'"
    " OR (t.message -> 'kwargsrepr')::text <> '\"***\"'"
    + "".join(
        f" OR t.message -> '{key}' IS NOT NULL" for key in ("link", "link_error", "chain", "chord")
    )
    + " END)"
)

_KEY_NAME = r"""'__key__\\?":\\?"([0-9a-f]+)'"""

TABLES = (
    Table(
        "workflow_runs",
        {"id": "uuid"},
        {
            "input": _VALUE,
            "output": _VALUE,
            "error": _VALUE,
            "progress": _VALUE,
            "message": _MESSAGE,
        },
        "t.namespace_id = %(namespace)s",
    ),
    Table(
        "step_attempts",
        {
            "workflow_run_id": "uuid",
            "ordinal": "int",
            "attempt": "int",
            "set_aside": "smallint",
            "branch": "text",
            "step_name": "text",
        },
        {"output": _OUTPUT, "error": _VALUE},
        "EXISTS (SELECT FROM durable.workflow_runs r"
        " WHERE r.id = t.workflow_run_id AND r.namespace_id = %(namespace)s)",
    ),
    Table(
        "workflow_events",
        {"id": "uuid"},
        {"payload": _VALUE, "error": _VALUE},
        "t.namespace_id = %(namespace)s",
    ),
)

#: A row: its key, and the text of each column that is stale.
Stale = tuple[tuple[Any, ...], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The form that all is to be stored in.

    Attributes:
        prefix: how a value of the newest key begins; None: plain.
        in_string: likewise within a JSON string.
    """

    namespace: str
    prefix: str | None
    in_string: str | None

    def params(self) -> dict[str, Any]:
        """Parameters that every query here has."""
        return {
            "namespace": self.namespace,
            "prefix": self.prefix,
            "in_string": self.in_string,
        }


def page(
    conn: Connection, table: Table, wanted: Wanted, after: Sequence[Any] | None, size: int
) -> list[Stale]:
    """Read the next rows by primary key; of one with nothing stale, only the key."""
    key = ", ".join(f"t.{column}" for column in table.key)
    stale = ", ".join(
        f"CASE WHEN {condition.format(f't.{column}::text')} THEN t.{column}::text END"
        for column, condition in table.columns.items()
    )
    beyond = ", ".join(f"%(after{n})s::{kind}" for n, kind in enumerate(table.key.values()))
    start = f"AND ({key}) > ({beyond})" if after is not None else ""
    statement = (
        f"SELECT {key}, {stale} FROM durable.{table.name} t"
        f" WHERE {table.namespace} {start} ORDER BY {key} LIMIT %(size)s"
    )
    params = {f"after{n}": value for n, value in enumerate(after or ())}
    rows = conn.execute(statement.encode(), {**wanted.params(), **params, "size": size}).fetchall()
    width = len(table.key)
    return [
        (
            row[:width],
            {
                column: text
                for column, text in zip(table.columns, row[width:], strict=True)
                if text is not None
            },
        )
        for row in rows
    ]


def put(
    conn: Connection,
    table: Table,
    column: str,
    changes: Sequence[tuple[tuple[Any, ...], str, str]],
) -> int:
    """Replace texts (key, as it was read, as it is to be); how many there were still to replace.

    SKIP LOCKED: this never waits for a lock while it holds others, so it gets
    into no circle with the statements of workers. A row that was changed since
    the snapshot is judged as it is once it is locked.
    """
    given = ", ".join(
        f"%({name})s::{kind}[]"
        for name, kind in {**table.key, "was": "text", "new": "text"}.items()
    )
    same_key = " AND ".join(f"t.{name} = c.{name}" for name in table.key)
    kind = "text" if (table.name, column) == ("workflow_events", "error") else "json"
    statement = f"""
WITH change AS (
    SELECT * FROM unnest({given}) AS c ({", ".join(table.key)}, was, new)
), locked AS MATERIALIZED (
    SELECT c.* FROM change c JOIN durable.{table.name} t ON {same_key}
     WHERE t.{column}::text = c.was
       FOR NO KEY UPDATE OF t SKIP LOCKED
)
UPDATE durable.{table.name} t SET {column} = c.new::{kind}
  FROM locked c WHERE {same_key}
"""
    params: dict[str, list[Any]] = {name: [] for name in table.key}
    for key, _, _ in changes:
        for name, value in zip(table.key, key, strict=True):
            params[name].append(value)
    params["was"] = [was for _, was, _ in changes]
    params["new"] = [new for _, _, new in changes]
    return conn.execute(statement.encode(), params).rowcount


def size(conn: Connection, namespace: str) -> int:
    """Count the rows that a round looks at."""
    counts = ", ".join(
        f"(SELECT count(*) FROM durable.{table.name} t WHERE {table.namespace})" for table in TABLES
    )
    row = conn.execute(f"SELECT {counts}".encode(), {"namespace": namespace}).fetchone()
    return sum(row or ())


def stale_by_key(conn: Connection, wanted: Wanted) -> dict[str, int]:
    """Count what is to be rewritten, by the name of its key, or ``plain``."""
    parts = [
        f"SELECT coalesce(substring(t.{column}::text from {_KEY_NAME}), 'plain') AS key"
        f" FROM durable.{table.name} t"
        f" WHERE {table.namespace} AND {condition.format(f't.{column}::text')}"
        for table in TABLES
        for column, condition in table.columns.items()
    ]
    statement = f"SELECT key, count(*) FROM ({' UNION ALL '.join(parts)}) found GROUP BY key"
    return dict(conn.execute(statement.encode(), wanted.params()).fetchall())
