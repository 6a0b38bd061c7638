"""Erases what runs hold of people; that they took place stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from durable.control import this_user
from durable.errors import EncryptionError, NotAllowed, OptionError, RunErased, RunNotFound
from durable.failures import encode_failure
from durable.store import erasure as store
from durable.store import queries
from durable.store.erasure import Copy, Found

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.codec import Codec
    from durable.store.connections import Connection

_MOST_NAMED = 5


class Erasure:
    """One erasure: of a run, or of all runs of a subject, with all their children.

    Args:
        durable: of the app.
        run_id: the run, or
        subject: the tag that was given to ``apply_async(subject=...)``.
        force: whether runs are erased whose result, callbacks or chain Celery
            has still to deliver; it does not deliver them any more then.

    Raises:
        OptionError: neither or both are given.
        RunNotFound: ``run_id`` is no id of a run.
    """

    def __init__(
        self,
        durable: Durable,
        run_id: str | None = None,
        subject: str | None = None,
        *,
        force: bool = False,
    ) -> None:
        if (run_id is None) == (subject is None):
            raise OptionError("erase() takes the id of a run, or subject=, and not both")
        self._durable = durable
        self._run_id = None if run_id is None else queries.checked_run_id(run_id)
        self._subject = subject
        self._force = force

    def preview(self) -> list[Found]:
        """Find what is to be erased.

        Raises:
            RunNotFound: there is no such run, or none of the subject.
        """
        namespace = self._durable.settings.namespace
        found = self._durable.database.call(store.find, namespace, self._run_id, self._subject)
        return found or self._nothing()

    def run(self, *, reason: str | None = None, actor: str | None = None) -> list[str]:
        """Erase, all or nothing.

        Args:
            reason: why, for the audit.
            actor: who; by default the user of this process and its host.

        Returns:
            Ids of the runs that were erased now; those erased before are not among them.

        Raises:
            NotAllowed: a run has not ended, or is still needed; the error names it.
            RunNotFound: there is no such run, or none of the subject.
        """
        order = self._durable.clock.uuid()
        actor = actor or this_user()
        erased = self._durable.database.call(self._erase, order, actor, reason)
        return self._nothing() if erased is None else erased

    def _nothing(self) -> Any:
        durable, run_id = self._durable, self._run_id
        if run_id is not None:
            raise durable.database.call(queries.missing, run_id, durable.settings.namespace)
        raise RunNotFound(
            f"there is no run of subject {self._subject!r} in namespace"
            f" {durable.settings.namespace!r}"
        )

    def _erase(
        self, conn: Connection, order: str, actor: str, reason: str | None
    ) -> list[str] | None:
        with conn.transaction():
            done = store.ordered(conn, order)
            if done:
                return done
            namespace = self._durable.settings.namespace
            found = store.lock(conn, namespace, self._run_id, self._subject)
            if not found:
                return None
            self._check(found)
            ids = [run.id for run in found if not run.erased]
            self._erase_copies(conn, ids)
            store.erase(conn, ids, order=order, actor=actor, reason=reason)
        return ids

    def _check(self, found: Sequence[Found]) -> None:
        running = [run for run in found if not run.ended]
        if running:
            raise NotAllowed(
                f"nothing was erased: {_named(running)} not ended. Cancel first, with"
                " result.cancel() or app.durable.control.cancel(id), and erase when the run has"
                " ended"
            )
        owed = [run for run in found if run.owed]
        if owed and not self._force:
            raise NotAllowed(
                f"nothing was erased: {_named(owed)} ended, but Celery has still to deliver the"
                " result, callbacks or chain. A worker does so within seconds; to give that up,"
                " use force=True (--force)"
            )

    def _erase_copies(self, conn: Connection, ids: Sequence[str]) -> None:
        """Take the outcomes out of the histories of parents that stay."""
        codec = self._durable.codec
        pending: dict[tuple[Any, ...], Copy] = {}
        for found in store.copies(conn, ids):
            if not found.parent_ended:
                raise NotAllowed(
                    f"nothing was erased: run {found.parent} ({found.parent_status}) has started"
                    f" run {found.run} and goes on with its outcome. Erase that one when it has"
                    " ended"
                )
            place = (found.parent, found.branch, found.ordinal, found.name, found.set_aside)
            copy = pending.get(place, found)
            text = encode_failure(_erased(found.run), codec, trusted_packages=())
            copy = replace(copy, run=found.run, index=found.index)
            pending[place] = (
                _without_result(copy, text)
                if found.kind == "result"
                else _without_item(copy, text, codec)
            )
        for copy in pending.values():
            store.replace(conn, copy)


def _erased(run_id: str) -> RunErased:
    return RunErased(f"the data of run {run_id} was erased")


def _named(runs: Sequence[Found]) -> str:
    names = [f"{run.id} ({run.name}, {run.status})" for run in runs[:_MOST_NAMED]]
    more = f" and {len(runs) - _MOST_NAMED} more" if len(runs) > _MOST_NAMED else ""
    several = len(runs) > 1
    return f"run{'s' * several} {', '.join(names)}{more} {'have' if several else 'has'}"


def _without_result(copy: Copy, error: str) -> Copy:
    """The outcome of a child: asked for again, after a restart of the parent, it is an error."""
    about = {**json.loads(copy.context or "{}"), "reason": None}
    if about.get("outcome") == "canceled" or copy.status == "running":
        return replace(copy, output=None, error=None, context=json.dumps(about))
    about["outcome"] = "failed"
    return replace(copy, status="failed", output=None, error=error, context=json.dumps(about))


def _without_item(copy: Copy, error: str, codec: Codec) -> Copy:
    """The outcomes of a fan-out, which are in one row, without that of one item."""
    about = json.loads(copy.context or "{}")
    if copy.status != "succeeded":
        return replace(copy, error=error) if about.get("run") == copy.run else copy
    item = {"item": copy.index, "run": copy.run, "outcome": "failed", "reason": None}
    try:
        values = json.loads(codec.open(copy.output or "null"))
        failed = json.loads(codec.open(copy.error or "null")) or []
    except EncryptionError:  # of a key that is gone: what nobody can read goes as a whole
        return replace(
            copy, status="failed", output=None, error=error, context=json.dumps({**about, **item})
        )
    values[copy.index] = None
    failed = [each for each in failed if each["about"]["item"] != copy.index]
    failed.append({"about": item, "error": json.loads(error)})
    return replace(
        copy, output=codec.seal(json.dumps(values)), error=codec.seal(json.dumps(failed))
    )
