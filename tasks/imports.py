"""A file into a table, in batches, each of them exactly once.

The rows of a batch and the result of its step are one commit, through
``durable.session()``: after a crash a batch is in the table and the step is
finished, or neither. No unique constraint has to sort out doubles.
"""

from __future__ import annotations

import csv
from itertools import islice
from pathlib import Path
from typing import TypedDict

from sqlalchemy import Column, Float, Integer, MetaData, Table, Text, insert

import durable
from durable import step, workflow
from tasks import services

AIRPORTS_CSV = Path(__file__).parents[1] / "examples" / "data" / "airports.csv"

airports = Table(
    "demo_airports",
    MetaData(),
    Column("import_id", Text, nullable=False),
    Column("batch", Integer, nullable=False),
    Column("iata", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("city", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("country", Text, nullable=False),
    Column("latitude", Float, nullable=False),
    Column("longitude", Float, nullable=False),
)


class Imported(TypedDict):
    """What `import_airports` returns."""

    rows: int
    batches: int


@step
def prepare(path: str) -> int:
    """Make the table; returns the number of rows to come."""
    airports.create(durable.session().connection(), checkfirst=True)
    with Path(path).open(encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


@step
def import_batch(path: str, batch: int, size: int) -> int:
    """Insert one batch; returns its number of rows."""
    rows = read_batch(path, batch, size)
    run = durable.current().id
    durable.session().execute(
        insert(airports), [{"import_id": run, "batch": batch, **row} for row in rows]
    )
    # Not committed yet: a worker that is killed while this call takes its time
    # leaves no row behind, and the batch is imported by the next worker.
    services.call("index", f"batch {batch}")
    return len(rows)


@workflow
def import_airports(path: str = str(AIRPORTS_CSV), batch_size: int = 200) -> Imported:
    """Import a CSV file of airports, ``batch_size`` rows at a time."""
    total = prepare(path)
    rows = 0
    batches = range(-(-total // batch_size))
    for batch in batches:
        rows += import_batch(path, batch, batch_size)
        durable.set_progress(rows, total, batch=batch)
    return {"rows": rows, "batches": len(batches)}


def read_batch(path: str, batch: int, size: int) -> list[dict[str, object]]:
    """Read rows ``batch * size`` to ``(batch + 1) * size`` of the file."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = islice(csv.DictReader(file), batch * size, (batch + 1) * size)
        return [
            {**row, "latitude": float(row["latitude"]), "longitude": float(row["longitude"])}
            for row in rows
        ]
