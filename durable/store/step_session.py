"""The SQLAlchemy session of a step: its transaction ends when the step does."""

from __future__ import annotations

from sqlalchemy import event
from sqlalchemy.orm import Session

from durable.errors import UnsupportedByDurable


class StepSession(Session):
    """Refuses to be committed early, and survives ``with durable.session() as session:``.

    SQLAlchemy's own would throw its rows away at the end of the block, and the
    step would then be recorded without them.
    """

    ending = False

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None:
            self.rollback()

    def close(self) -> None:
        """Only the end of the step closes it."""
        if self.ending:
            super().close()


@event.listens_for(StepSession, "before_commit")
def _refuse_early(session: StepSession) -> None:
    if not (session.ending or session.in_nested_transaction()):
        raise UnsupportedByDurable(
            "durable.session() is committed together with the result of the step: leave out"
            " commit() and begin(); begin_nested() is fine"
        )
