"""What really happened: plain SQL on the tables, and the journal of the outside world."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

import psycopg

AIRPORTS = 3_376
BATCH = 200

_FINISHED = """
SELECT s.workflow_run_id::text, s.step_name, s.ordinal
  FROM durable.step_attempts s
 WHERE s.workflow_run_id = ANY(%s::uuid[]) AND s.status = 'succeeded'
 ORDER BY s.workflow_run_id, s.ordinal
"""
_RUNS = """
SELECT id::text, status, attempt, output, error, recoveries,
       extract(epoch FROM completed_at - created_at)::float8 AS seconds
  FROM durable.workflow_runs
 WHERE id = ANY(%s::uuid[])
"""
_TIMELINE = """
SELECT extract(epoch FROM s.created_at)::float8 AS moment,
       extract(epoch FROM r.created_at)::float8 AS zero,
       s.step_name, s.attempt, s.status, s.error,
       extract(epoch FROM s.completed_at - s.created_at)::float8 AS seconds
  FROM durable.step_attempts s JOIN durable.workflow_runs r ON r.id = s.workflow_run_id
 WHERE r.id = %s
 ORDER BY s.ordinal, s.attempt
"""
_NOW = "SELECT extract(epoch FROM now())::float8"
_BUSY = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid()
   AND state IN ('active', 'idle in transaction')
"""
_BATCHES = "SELECT batch, count(*) FROM demo_airports WHERE import_id = %s GROUP BY batch"

#: Which call of the outside world a step makes.
CALLS = {
    "load_order": "find_order",
    "reserve_stock": "reserve",
    "charge": "charge",
    "ship": "ship",
    "send_receipt": "mail",
    "import_batch": "index",
}


@dataclass(frozen=True)
class Snapshot:
    """What was finished and what had been called when the worker was killed.

    Attributes:
        moment: seconds since 1970, by the database's clock.
        finished: run, step and position of each.
        journal: the calls of the outside world, and of what.
    """

    moment: float
    finished: list[tuple[str, str, int]]
    journal: list[tuple[str, str]]


@final
class Evidence:
    """Reads the database at ``url`` and the journal; changes neither."""

    def __init__(self, url: str, journal: Path) -> None:
        self._journal = journal
        self._connection = psycopg.connect(url, autocommit=True)
        self._order = self._load = ""

    def __enter__(self) -> Evidence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    def watch(self, *, order: str, load: str) -> None:
        """Say which two runs are looked at."""
        self._order, self._load = order, load

    # --- while it runs

    def finished(self, step: str) -> int:
        """How many calls of a step have a recorded result."""
        return sum(_short(name) == step for _, name, _ in self._finished())

    def ended(self) -> bool:
        """Whether both runs are over."""
        return all(run["status"] in {"succeeded", "failed", "canceled"} for run in self._runs())

    def progress(self) -> str:
        """Both runs in a line."""
        finished = self._finished()
        batches = sum(_short(name) == "import_batch" for _, name, _ in finished)
        steps = [_short(name) for run, name, _ in finished if run == self._order]
        status = {run["id"]: run["status"] for run in self._runs()}
        return (
            f"import {status[self._load]:<9} {batches:>2} of {_batches()} batches    "
            f"order {status[self._order]:<9} {len(steps):>2} of 11 steps"
            f"{', last ' + steps[-1] if steps else ''}"
        )

    def snapshot(self) -> Snapshot:
        """What was finished, once the database has noticed that the workers are gone."""
        moment = self._rows(_NOW)[0][0]
        deadline = time.monotonic() + 5
        while self._rows(_BUSY)[0][0] and time.monotonic() < deadline:
            time.sleep(0.02)
        return Snapshot(moment, self._finished(), self._calls())

    # --- afterwards

    def timelines(self, before: Snapshot) -> list[tuple[str, list[list[str]]]]:
        """For each run a title, and a row for each attempt of each step."""
        names = {self._order: "fulfil", self._load: "import_airports"}
        return [
            (
                _title(names[run["id"]], run),
                _timeline(self._dicts(_TIMELINE, run["id"]), before.moment),
            )
            for run in self._runs()
        ]

    def failures(self) -> list[str]:
        """What went wrong with the runs that did not succeed."""
        return [
            f"run {run['id']} is {run['status']}: {_message(run['error'])}"
            for run in self._runs()
            if run["status"] != "succeeded"
        ]

    def effects(self) -> list[list[str]]:
        """For each step: results recorded, bodies run, and what came of it."""
        finished = Counter(_short(name) for _, name, _ in self._finished())
        ran = Counter(call for call, _ in self._calls())
        rows = sum(self._imported().values())
        came_of_it = {
            "charge": f"{ran['money taken']} payment",
            "ship": f"{len(self._distinct('ship'))} parcels",
            "send_receipt": f"{ran['mail']} mail",
            "import_batch": f"{rows:,} rows, in {len(self._imported())} batches",
        }
        return [
            [step, str(finished[step]), str(ran[call]), came_of_it.get(step, "")]
            for step, call in CALLS.items()
        ]

    def checks(self, before: Snapshot) -> list[tuple[bool, str]]:
        """Each thing that has to hold, and whether it does."""
        runs = self._runs()
        finished = self._finished()
        batches = self._imported()
        sizes = {n: min(BATCH, AIRPORTS - n * BATCH) for n in range(_batches())}
        output = {run["id"]: run["output"] for run in runs}
        repeated = self._repeated(before)
        return [
            (all(run["status"] == "succeeded" for run in runs), "both runs succeeded"),
            (all(run["attempt"] > 1 for run in runs), "both had to be taken over"),
            (
                output[self._load] == {"rows": AIRPORTS, "batches": _batches()},
                f"the import counts {AIRPORTS:,} rows",
            ),
            (batches == sizes, "the table holds every batch once, none twice"),
            (not repeated, f"no finished step ran again{_listed(repeated)}"),
            (set(before.finished) <= set(finished), "no finished step was lost"),
            (len(set(finished)) == len(finished), "no step is recorded as finished twice"),
            (self._cut_off(before) <= len(runs), "at most one step a run was cut off and repeated"),
            (Counter(c for c, _ in self._calls())["money taken"] == 1, "the card was charged once"),
        ]

    def _repeated(self, before: Snapshot) -> set[tuple[str, str]]:
        """Calls made after the kill for steps that were finished before it.

        The steps of a run go one after the other, so the first k distinct
        calls belong to the first k finished steps of that name.
        """
        finished = Counter(_short(name) for _, name, _ in before.finished)
        done = {
            (CALLS[step], of)
            for step, count in finished.items()
            if step in CALLS
            for of in _distinct(before.journal, CALLS[step])[:count]
        }
        return done & set(self._calls()[len(before.journal) :])

    def _cut_off(self, before: Snapshot) -> int:
        """Calls of the outside world that were made again after the kill."""
        return len(set(before.journal) & set(self._calls()[len(before.journal) :]))

    # --- reading

    def _finished(self) -> list[tuple[str, str, int]]:
        return self._rows(_FINISHED, [self._order, self._load])

    def _runs(self) -> list[dict[str, Any]]:
        runs = self._dicts(_RUNS, [self._order, self._load])
        return sorted(runs, key=lambda run: run["id"] != self._order)

    def _imported(self) -> dict[int, int]:
        return dict(self._rows(_BATCHES, self._load))

    def _calls(self) -> list[tuple[str, str]]:
        if not self._journal.exists():
            return []
        lines = self._journal.read_text(encoding="utf-8").splitlines()
        return [(call, of) for call, _, of in (line.partition("\t") for line in lines)]

    def _distinct(self, call: str) -> list[str]:
        return _distinct(self._calls(), call)

    def _rows(self, query: str, *params: object) -> list[Any]:
        return self._connection.execute(query.encode(), params).fetchall()

    def _dicts(self, query: str, *params: object) -> list[dict[str, Any]]:
        with self._connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
            return cursor.execute(query.encode(), params).fetchall()


def _batches() -> int:
    return -(-AIRPORTS // BATCH)


def _title(name: str, run: dict[str, Any]) -> str:
    took = run["seconds"] or 0.0
    story = "taken over by another worker" if run["recoveries"] else "never interrupted"
    return f"{name} {run['id']}: {run['status']} after {took:.1f} s, {story}"


def _timeline(rows: list[dict[str, Any]], killed: float) -> list[list[str]]:
    told = [(row["moment"], _attempt(row)) for row in rows]
    told.append((killed, ["kill -9", "", "", "worker and children gone"]))
    zero = rows[0]["zero"] if rows else killed
    return [[f"{moment - zero:6.2f} s", *row] for moment, row in sorted(told)]


def _attempt(row: dict[str, Any]) -> list[str]:
    outcome = row["status"] + (f": {_message(row['error'])}" if row["error"] else "")
    return [_short(row["step_name"]), str(row["attempt"]), f"{row['seconds']:.2f} s", outcome]


def _short(step_name: str) -> str:
    return step_name.rpartition(".")[2]


def _distinct(calls: Sequence[tuple[str, str]], name: str) -> list[str]:
    return list(dict.fromkeys(of for call, of in calls if call == name))


def _listed(calls: set[tuple[str, str]]) -> str:
    return "".join(f" - but {call} of {of} did" for call, of in sorted(calls))


def _message(error: Any) -> str:
    """The text of a stored exception."""
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
