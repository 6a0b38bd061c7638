"""What the body of a workflow, and a step in it, can call."""

from __future__ import annotations

import random as _random
import uuid as _uuid
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from durable.errors import NotInWorkflow

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from durable.execution import Execution

#: The run whose body this thread, greenlet or task is executing.
running: ContextVar[Execution | None] = ContextVar("durable_running", default=None)


@dataclass(frozen=True, slots=True)
class Current:
    """Where the calling code is.

    Attributes:
        id: the run's id, which is the Celery task id.
        workflow: name of the workflow, which is the Celery task name.
        attempt: number of this claim; take-overs count too, so there may be gaps.
        step: name of the step whose body is running; None between steps.
        step_attempt: number of this attempt of the step, from 1.
        version: of the code that the run is for; None: any.
        passes: how often `continue_as_new` has begun the run anew.
    """

    id: str
    workflow: str
    attempt: int
    step: str | None = None
    step_attempt: int | None = None
    version: str | None = None
    passes: int = 0


def active(verb: str) -> Execution:
    """Return the run of the calling code.

    Raises:
        NotInWorkflow: there is none.
    """
    execution = running.get()
    if execution is None:
        raise NotInWorkflow(
            f"durable.{verb}() needs a run: call it in a workflow (a task made with @workflow or"
            " base=durable.Workflow), or in a step that a workflow calls"
        )
    return execution


def stored() -> Execution | None:
    """Return the run of the calling code if what it does is stored; None inline and elsewhere."""
    execution = running.get()
    return None if execution is None or execution.journal.inline else execution


def of_body() -> Execution | None:
    """Return the stored run in whose body the calling code is; None in a step too."""
    execution = stored()
    return None if execution is None or execution.in_step else execution


def current() -> Current:
    """Return where the calling code is: run, workflow, step and attempts.

    Raises:
        NotInWorkflow: outside a run.

    Example:
        >>> @step
        ... def note(text: str) -> str:
        ...     where = durable.current()
        ...     return f"{text} (attempt {where.step_attempt})"
        >>> @workflow
        ... def remember(text: str) -> str:
        ...     return note(text)
        >>> remember("tea")
        'tea (attempt 1)'
    """
    return active("current").where()


def is_replaying() -> bool:
    """Tell whether the steps just ahead have been recorded by an earlier attempt.

    Use it to keep code between steps quiet on replay, such as log lines.
    False outside a run.

    Example:
        >>> @workflow
        ... def fulfil(order_id: str) -> None:
        ...     if not durable.is_replaying():
        ...         print(f"fulfilling {order_id}")
        >>> fulfil("o-42")
        fulfilling o-42
    """
    execution = running.get()
    return execution is not None and execution.is_replaying()


def idempotency_key() -> str:
    """Return a key for the outside call that this step makes: the same on every attempt.

    Pass it to a payment provider, say, so that a step that is tried again
    charges once. A UUID as text; other steps and runs have other keys.

    Raises:
        NotInWorkflow: outside a step of a run.

    Example:
        >>> @step
        ... def charge(cents: int) -> str:
        ...     return durable.idempotency_key()  # payments.charge(cents, key=...)
        >>> @workflow
        ... def pay(cents: int) -> list[str]:
        ...     return [charge(cents), charge(cents)]
        >>> first, second = pay(100)
        >>> len(first), first == second
        (36, False)
    """
    return active("idempotency_key").idempotency_key()


def session() -> Session:
    """Return a SQLAlchemy session whose commit is the step's own: exactly once.

    What is written through it and the step's result become visible in one
    commit, in the database that ``durable_database_url`` names, or not at
    all. It is committed and closed at the end of the step, not by you; a
    ``with`` block around it is fine, and so is ``begin_nested()``.

    Raises:
        NotInWorkflow: outside a step of a run, and in a run that is executed
            inline (called directly, or ``task_always_eager``).

    Example:
        >>> from sqlalchemy import text
        >>> @step
        ... def reserve(sku: str, n: int) -> None:
        ...     durable.session().execute(
        ...         text("UPDATE stock SET n = n - :n WHERE sku = :sku"), {"sku": sku, "n": n}
        ...     )
    """
    opened: Session = active("session").session()
    return opened


def set_progress(current: float, total: float | None = None, **details: Any) -> None:
    """Report how far the run is: ``result.info`` and Flower show it.

    One statement and one commit; report batches, not rows. Celery's
    ``update_state`` in a workflow does the same under a state of its own.

    Args:
        current: how much is done.
        total: how much there is to do, if known.
        **details: anything the codec can store.

    Raises:
        NotInWorkflow: outside a run.
        PayloadError: a detail cannot be stored.

    Example:
        >>> @workflow
        ... def load(batches: list[list[int]]) -> int:
        ...     for number, batch in enumerate(batches):
        ...         durable.set_progress(number, total=len(batches), rows=len(batch))
        ...     return len(batches)
        >>> load([[1, 2], [3]])
        2
    """
    meta: dict[str, Any] = {"current": current, "total": total, **details}
    active("set_progress").set_progress("PROGRESS", meta)


def now() -> datetime:
    """Return the time by the database's clock, recorded: the same on every replay.

    Costs what a step costs. Aware, in UTC.

    Raises:
        NotInWorkflow: outside a run.

    Example:
        >>> @workflow
        ... def stamp() -> str:
        ...     return str(durable.now().tzinfo)
        >>> stamp()
        'UTC'
    """
    moment: datetime = active("now").value("durable.now")
    return moment


def uuid4() -> _uuid.UUID:
    """Return a random UUID that is the same on every replay. Costs nothing.

    Raises:
        NotInWorkflow: outside the body of a workflow.

    Example:
        >>> @workflow
        ... def ticket() -> int:
        ...     return durable.uuid4().version
        >>> ticket()
        4
    """
    return _uuid.UUID(int=_dice("uuid4").getrandbits(128), version=4)


def random() -> float:
    """Return a float in ``[0, 1)`` that is the same on every replay. Costs nothing.

    Raises:
        NotInWorkflow: outside the body of a workflow.

    Example:
        >>> @workflow
        ... def sample() -> bool:
        ...     return 0 <= durable.random() < 1
        >>> sample()
        True
    """
    return _dice("random").random()


def _dice(verb: str) -> _random.Random:
    return _random.Random(active(verb).derived_key())  # noqa: S311 - not for secrets
