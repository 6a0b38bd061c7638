"""SQLAlchemy sessions for `durable.session()`: the user's rows and ours in one commit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durable import forks
from durable.store.errors import is_disconnect
from durable.store.steps import StepAttempt, Written, record_in

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from durable.store.pool import Database
    from durable.store.step_session import StepSession


class Sessions:
    """Hands out sessions on the store's database; its engine is made on first use."""

    def __init__(self, database: Database, pool_size: int) -> None:
        self._database = database
        self._pool_size = pool_size
        self._engine: Engine | None = None
        forks.call_in_child(self._after_fork)

    def open(self) -> StepTransaction:
        """Begin the transaction of one attempt of one step."""
        from durable.store.step_session import StepSession

        if self._engine is None:
            self._engine = self._make_engine()
        return StepTransaction(StepSession(self._engine))

    def close(self) -> None:
        """Close the connections that no step uses."""
        if self._engine is not None:
            self._engine.dispose()

    def _make_engine(self) -> Engine:
        from sqlalchemy import create_engine

        return create_engine(
            "postgresql+psycopg://",
            creator=lambda: self._database.connect(autocommit=False),
            pool_size=self._pool_size,
            max_overflow=-1,  # one for each step that writes through a session right now
            pool_pre_ping=True,
        )

    def _after_fork(self) -> None:
        if self._engine is not None:
            self._engine.dispose(close=False)  # the sockets are the parent's


class StepTransaction:
    """A session and the step that is committed with it."""

    def __init__(self, session: StepSession) -> None:
        self.session = session

    def commit(self, step: StepAttempt) -> Written | None:
        """Record the step and commit; None: the answer was lost, ask `was_recorded`.

        Raises:
            Exception: what the flush or the commit raised; nothing is stored then.
        """
        self.session.ending = True
        try:
            connection: Any = self.session.connection()  # flush needs it, and so do we
            self.session.flush()
            cursor = connection.connection.cursor()
            written = record_in(cursor, step)
            cursor.close()
            if written is Written.FENCED:
                self.rollback()
            else:
                self.session.commit()
        except Exception as exc:
            self.rollback()
            if _is_lost(getattr(exc, "orig", exc)):
                return None
            raise
        else:
            return written
        finally:
            self.session.close()

    def rollback(self) -> None:
        """Throw everything away; a connection that is gone did so already."""
        self.session.ending = True
        try:
            self.session.rollback()
        except Exception as exc:
            if not is_disconnect(getattr(exc, "orig", exc)):
                raise
        finally:
            self.session.close()


def _is_lost(exc: BaseException) -> bool:
    """Tell whether nobody knows what became of a commit.

    A full disk or a read-only server is an answer: nothing was committed.
    """
    state = getattr(exc, "sqlstate", None) or ""
    return is_disconnect(exc) and not state.startswith(("53", "25"))
