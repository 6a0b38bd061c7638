"""``transaction=``: the caller's transaction, checked to be one of the runs' own database."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from durable import context
from durable.errors import NotInWorkflow, OptionError
from durable.store import transactions
from durable.store.transactions import Borrowed, Identity

if TYPE_CHECKING:
    from durable.store.connections import Connection
    from durable.store.pool import Database

P = ParamSpec("P")
T = TypeVar("T")


class Outbox:
    """Makes callers' transactions usable for the runs of one database.

    Args:
        database: where the runs are kept.
    """

    def __init__(self, database: Callable[[], Database]) -> None:
        self._database = database
        self._own: Identity | None = None

    def caller(self, transaction: object) -> Caller:
        """Return what runs queries: in ``transaction``, or on a connection of our own if None.

        Raises:
            OptionError: nothing can be started in it.
            NotInWorkflow: in the body of a workflow, outside its steps.
        """
        if transaction is None:
            return Caller(self._database(), None)
        refuse_in_body("transaction")
        borrowed = transactions.borrow(transaction)
        self._check(borrowed)
        return Caller(self._database(), borrowed)

    def is_ours(self, transaction: object) -> bool:
        """Tell whether a usable transaction is one of our database."""
        try:
            self._check(transactions.borrow(transaction))
        except OptionError:
            return False
        return True

    def _check(self, borrowed: Borrowed) -> None:
        own = self._own or self._identity()  # first, as it may have to make the schema
        theirs, has_schema = transactions.identity(borrowed)
        if theirs != own:
            own = self._identity()  # the server may have been restarted
        if theirs == own and has_schema:
            return
        lacks = "" if has_schema else ", which has no schema 'durable'"
        raise OptionError(
            f"transaction=: {borrowed.what} is on database {theirs[0]!r}{lacks}, and runs are kept in"
            f" another one, {own[0]!r} (durable_database_url): they cannot be one commit. Set"
            " durable_database_url to the database of the transaction, or start the run after the"
            " commit"
        )

    def _identity(self) -> Identity:
        self._own, _ = self._database().call(transactions.identity)
        return self._own


def refuse_in_body(option: str) -> None:
    """Refuse an option in the body of a workflow, which is repeated.

    Raises:
        NotInWorkflow: it is called there, outside the steps.
    """
    if context.of_body() is not None:
        raise NotInWorkflow(
            f"{option}= belongs in a step: what the body of a workflow starts or sends outside its"
            " steps is remembered, and so done once, anyway. In a step transaction="
            "durable.session() makes it part of the step's commit"
        )


class Caller:
    """Runs queries of the store in the caller's transaction, if there is one."""

    def __init__(self, database: Database, borrowed: Borrowed | None) -> None:
        self._database = database
        self._borrowed: Any = borrowed

    @property
    def commits(self) -> bool:
        """Whether a query is committed when it returns."""
        return self._borrowed is None

    def call(
        self, query: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a query."""
        if self._borrowed is None:
            return self._database.call(query, *args, **kwargs)
        return query(self._borrowed, *args, **kwargs)
