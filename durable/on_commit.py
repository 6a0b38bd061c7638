"""Django's ``delay_on_commit``, for workflows: in the transaction rather than after it."""

from __future__ import annotations

from typing import Any

_CELERYS = "celery.contrib.django.task"


def starts_after_commit(task: type) -> bool:
    """Tell whether a task class has Celery's ``delay_on_commit``, and not the project's own."""
    for each in task.__mro__:
        if "delay_on_commit" in each.__dict__:
            return each.__module__ == _CELERYS
    return False


class StartsInTransaction:
    """Goes before `celery.contrib.django.task.DjangoTask` in the bases of workflows.

    Celery's own sends after the commit, and a process that dies in between
    has lost the message. Here the run is a row of the transaction, if that is
    one of the database that keeps the runs; else all is as in Celery.
    """

    durable: Any
    app: Any

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Start a run with the commit of Django's current transaction."""
        self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(self, args: Any = None, kwargs: Any = None, **options: Any) -> None:
        """Start a run with the commit of Django's current transaction; options as ever."""
        from django.db import connection

        task: Any = self
        if self._is_in_ours(connection):
            task.apply_async(args, kwargs, **{**options, "transaction": connection})
        else:
            task_after: Any = super()
            task_after.apply_async_on_commit(args, kwargs, **options)

    def _is_in_ours(self, connection: Any) -> bool:
        if not connection.in_atomic_block or self.app.conf.task_always_eager:
            return False
        durable = self.durable
        return not durable.settings.accept_only and bool(durable.outbox.is_ours(connection))
