"""What people may do to a run, in which state, and what comes of it."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from durable.errors import NotAllowed, OptionError
from durable.store import control, queries
from durable.store.control import ActionRow, Change, From, Order, Which

__all__ = ["STATES", "TRANSITIONS", "Change", "Control", "From", "Which", "refusal", "state_of"]

if TYPE_CHECKING:
    from durable.app import Durable

#: Every state in which an action can find a run: its status and, for one that
#: runs, what its worker has been asked already.
STATES = (
    "pending",
    "running",
    "running, asked to pause",
    "running, asked to cancel",
    "sleeping",
    "waiting",
    "paused",
    "succeeded",
    "failed",
    "canceled",
)

#: What an action makes of a run. ``asked``: its worker stops before the next
#: step. ``same``: nothing is left to do, which is no error. None: refused.
#: The documentation and the tests are made from this table.
TRANSITIONS: Mapping[str, Mapping[str, str | None]] = MappingProxyType(
    {
        "cancel": {
            "pending": "canceled",
            "running": "asked",
            "running, asked to pause": "asked",
            "running, asked to cancel": "same",
            "sleeping": "canceled",
            "waiting": "canceled",
            "paused": "canceled",
            "succeeded": None,
            "failed": None,
            "canceled": "same",
        },
        "pause": {
            "pending": "paused",
            "running": "asked",
            "running, asked to pause": "same",
            "running, asked to cancel": None,
            "sleeping": "paused",
            "waiting": "paused",
            "paused": "same",
            "succeeded": None,
            "failed": None,
            "canceled": None,
        },
        "resume": {
            "pending": "same",
            "running": "same",
            "running, asked to pause": "running",
            "running, asked to cancel": None,
            "sleeping": "same",
            "waiting": "same",
            "paused": "pending",
            "succeeded": None,
            "failed": None,
            "canceled": None,
        },
        "restart": {
            "pending": None,
            "running": None,
            "running, asked to pause": None,
            "running, asked to cancel": None,
            "sleeping": None,
            "waiting": None,
            "paused": "pending",
            "succeeded": "pending",
            "failed": "pending",
            "canceled": "pending",
        },
        "settle": {
            "pending": None,
            "running": None,
            "running, asked to pause": None,
            "running, asked to cancel": None,
            "sleeping": None,
            "waiting": None,
            "paused": "paused",
            "succeeded": None,
            "failed": "failed",
            "canceled": "canceled",
        },
    }
)

_HINTS = {
    ("cancel", "succeeded"): "there is nothing left to stop",
    ("cancel", "failed"): "there is nothing left to stop",
    ("pause", "running, asked to cancel"): "it is being canceled",
    ("resume", "running, asked to cancel"): "it is being canceled",
    ("resume", "failed"): "restart it",
    ("resume", "canceled"): "restart it",
    ("restart", "pending"): "it goes on by itself; cancel or pause it first",
    ("restart", "sleeping"): "it goes on by itself; cancel or pause it first",
    ("restart", "waiting"): "it goes on by itself; cancel or pause it first",
    ("restart", "running"): "pause or cancel it first",
    ("settle", "running"): "pause it first",
    ("settle", "succeeded"): "restart it from that step instead",
}


def state_of(change: Change) -> str:
    """Name the state in which an action found a run, as `STATES` does."""
    if change.control == "cancel" and change.before in {"pending", "sleeping", "waiting"}:
        return "running, asked to cancel"  # on its way to a worker, which undoes first
    if change.control is None or change.before != "running":
        return change.before
    return f"running, asked to {change.control}"


def refusal(action: str, change: Change) -> NotAllowed | None:
    """Make the error of an action that the run's state does not allow. None: it does."""
    state = state_of(change)
    if TRANSITIONS[action][state] is not None:
        return None
    hint = _HINTS.get((action, state), "")
    return NotAllowed(
        f"run {change.run_id} is {state}: it cannot be {_PARTICIPLES[action]}"
        + (f"; {hint}" if hint else "")
    )


#: Runs in one commit of a bulk action.
_CHUNK = 500

_PARTICIPLES = {
    "cancel": "canceled",
    "pause": "paused",
    "resume": "resumed",
    "restart": "restarted",
    "settle": "given the result of a step",
}


class Control:
    """Acts on runs, single or many, and keeps a record of who did what.

    Args:
        durable: database, namespace and codec.
    """

    def __init__(self, durable: Durable) -> None:
        self._durable = durable

    def cancel(self, run_id: str, *, reason: str | None = None, actor: str | None = None) -> bool:
        """Cancel a run: at once, or before its next step if it is running.

        Returns:
            Whether there was something to do: False for one that is canceled already.

        Raises:
            NotAllowed: it has ended otherwise.
            RunNotFound: there is no such run in this namespace.
        """
        return self._one("cancel", self._order([run_id], reason, actor))

    def cancel_unfinished(
        self, run_ids: Sequence[str], reason: str, actor: str | None = None
    ) -> set[str]:
        """Cancel those that have not ended, as ``revoke`` does: without a word about the rest.

        Returns:
            The ids of those for which there was something to do.
        """
        order = self._order(run_ids, reason, actor)
        changes = self._durable.database.call(control.cancel, order)
        return {change.run_id for change in changes if change.changed}

    def pause(self, run_id: str, *, reason: str | None = None, actor: str | None = None) -> bool:
        """Pause a run: at once, or before its next step if it is running.

        Returns:
            Whether there was something to do.

        Raises:
            NotAllowed: it has ended, or is being canceled.
            RunNotFound: there is no such run in this namespace.
        """
        return self._one("pause", self._order([run_id], reason, actor))

    def resume(self, run_id: str, *, reason: str | None = None, actor: str | None = None) -> bool:
        """Let a paused run go on.

        Returns:
            Whether there was something to do: False for one that is not paused.

        Raises:
            NotAllowed: it has ended, or is being canceled.
            RunNotFound: there is no such run in this namespace.
        """
        return self._one("resume", self._order([run_id], reason, actor))

    def restart(
        self,
        run_id: str,
        *,
        from_step: str | None = None,
        ordinal: int | None = None,
        from_beginning: bool = False,
        reason: str | None = None,
        actor: str | None = None,
    ) -> bool:
        """Have an ended or paused run run again, under its id.

        What it recorded before the chosen step counts; from there on it is set
        aside, and still to be seen. By default only what failed is done again: the
        step that ended the run, and started tasks that failed; if none did, all
        that is recorded counts.

        Args:
            run_id: the run.
            from_step: name of the step to begin with.
            ordinal: its position, if the name occurs more than once; else the first.
            from_beginning: run everything again.
            reason: why, for the audit.
            actor: who; by default the user of this process and its host.

        Raises:
            NotAllowed: it has not ended and is not paused, or has no such step.
            RunNotFound: there is no such run in this namespace.
        """
        begin = _begin(from_step, ordinal, from_beginning)
        order = self._order([run_id], reason, actor)
        [change] = self._found(control.restart, order, begin)
        if not change.changed and refusal("restart", change) is None:
            self._refuse_erased(run_id)
            raise NotAllowed(
                f"run {run_id} has recorded no step {from_step!r}"
                + (f" at position {ordinal}" if ordinal is not None else "")
                + ": result.steps() shows what it has"
            )
        return self._checked("restart", change)

    def settle(
        self,
        run_id: str,
        step: str,
        value: Any,
        *,
        ordinal: int | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Give a step's result by hand, in the place of its failed attempts.

        The run does not go on by that: restart or resume it afterwards.

        Args:
            run_id: a run that is paused, has failed or was canceled.
            step: name of the step, which has to have been tried.
            value: what it is to have returned.
            ordinal: its position, if the name occurs more than once; else the last.
            reason: why, for the audit.
            actor: who; by default the user of this process and its host.

        Raises:
            NotAllowed: the run is in another state, or has no such step.
            PayloadError: the value cannot be stored.
            RunNotFound: there is no such run in this namespace.
        """
        durable = self._durable
        order = self._order([run_id], reason, actor)
        output = durable.codec.encode(value, f"the result of step {step!r}")
        rows = durable.database.call(control.places, run_id, order.namespace, step)
        found = [row for row in rows if ordinal is None or row.ordinal == ordinal]
        if not found:
            if durable.database.call(queries.get, run_id, order.namespace) is None:
                raise durable.database.call(queries.missing, run_id, order.namespace)
            raise NotAllowed(
                f"run {run_id} has not tried a step {step!r}: result.steps() shows all"
            )
        self._refuse_erased(run_id)
        place = found[-1]
        [change] = self._found(
            control.settle,
            order,
            branch=place.branch,
            ordinal=place.ordinal,
            name=step,
            output=output,
        )
        self._checked("settle", change)

    def many(
        self,
        action: str,
        runs: Sequence[str] | Which,
        *,
        reason: str | None = None,
        actor: str | None = None,
        begin: From | None = None,
    ) -> Iterator[tuple[Change, NotAllowed | None]]:
        """Cancel, pause, resume or restart many runs, some hundred in a commit.

        Args:
            action: ``cancel``, ``pause``, ``resume`` or ``restart``.
            runs: ids (unknown ones are left out), or which runs.
            reason: why, for the audit.
            actor: who; by default the user of this process and its host.
            begin: where restarts begin; by default only what failed is done again.

        Returns:
            What was done to each run, with the error of one whose state does not
            allow it. It is done as you iterate.

        Raises:
            OptionError: no such action.

        Example:
            >>> from celery import current_app
            >>> from durable.control import Which
            >>> @workflow(name="nap")
            ... def nap() -> None:
            ...     durable.sleep("8h")
            >>> naps = [nap.delay() for _ in range(3)]
            >>> control = current_app.durable.control
            >>> done = control.many("cancel", Which(name="nap"), reason="the alarm rang")
            >>> sum(1 for _ in done)
            3
        """
        if action not in {"cancel", "pause", "resume", "restart"}:
            raise OptionError(f"many({action!r}, ...): give cancel, pause, resume or restart")
        for chunk in self._chunks(runs):
            order = self._order(chunk, reason, actor)
            query = self._durable.database.call
            if action == "restart":
                changes = query(control.restart, order, begin or From("failed"))
            else:
                changes = query(getattr(control, action), order)
            for change in changes:
                yield change, refusal(action, change)

    def _chunks(self, runs: Sequence[str] | Which) -> Iterator[Sequence[str]]:
        if not isinstance(runs, Which):
            for start in range(0, len(runs), _CHUNK):
                yield runs[start : start + _CHUNK]
            return
        durable, after = self._durable, control.FIRST
        namespace = durable.settings.namespace
        while ids := durable.database.call(
            control.which, namespace, runs, after=after, limit=_CHUNK
        ):
            yield ids
            after = ids[-1]

    def actions(self, run_id: str) -> list[ActionRow]:
        """Load what people did to a run, in order."""
        durable = self._durable
        return durable.database.call(control.actions, run_id, durable.settings.namespace)

    def _one(self, action: str, order: Order) -> bool:
        [change] = self._found(getattr(control, action), order)
        return self._checked(action, change)

    def _checked(self, action: str, change: Change) -> bool:
        error = refusal(action, change)
        if error is not None:
            raise error
        return change.changed

    def _found(self, query: Any, order: Order, *args: Any, **kwargs: Any) -> list[Change]:
        durable = self._durable
        [run_id] = order.run_ids
        changes: list[Change] = durable.database.call(query, order, *args, **kwargs)
        if not changes:
            raise durable.database.call(queries.missing, run_id, order.namespace)
        return changes

    def _refuse_erased(self, run_id: str) -> None:
        durable = self._durable
        row = durable.database.call(queries.get, run_id, durable.settings.namespace)
        if row is not None and row.erased_at is not None:
            raise NotAllowed(f"the data of run {run_id} was erased: start a new run")

    def _order(self, run_ids: Sequence[str], reason: str | None, actor: str | None) -> Order:
        ids = [queries.checked_run_id(run_id) for run_id in run_ids]
        namespace = self._durable.settings.namespace
        return Order(self._durable.clock.uuid(), ids, namespace, actor or this_user(), reason)


def _begin(from_step: str | None, ordinal: int | None, from_beginning: bool) -> From:
    if from_beginning and from_step is not None:
        raise OptionError("restart() takes from_step= or from_beginning=True, not both")
    if ordinal is not None and from_step is None:
        raise OptionError("restart(ordinal=) needs from_step=")
    if from_beginning:
        return From("beginning")
    return From("failed") if from_step is None else From("step", from_step, ordinal)


def this_user() -> str:
    """Name who runs this process, for the audit."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without a passwd entry
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
