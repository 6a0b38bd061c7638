"""``Durable(app)``: reads the configuration and wires the package into a Celery app."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.backends.base import DisabledBackend
from celery.utils.log import get_logger

from durable import beat, boundary, canvas, context, items, joining, outcomes, shown
from durable.classify import Classifier
from durable.clock import SYSTEM, Clock
from durable.codec import Codec
from durable.config import Settings, load_settings
from durable.control import Control
from durable.encryption import Keyring
from durable.erasure import Erasure
from durable.errors import (
    ConfigurationError,
    DatabaseReadOnly,
    DatabaseUnavailable,
    StoreError,
)
from durable.execution import SENDING, Services
from durable.keys import check_key
from durable.lease import Lease
from durable.masking import Mask
from durable.outbox import Outbox
from durable.result import DurableGroupResult, DurableResult
from durable.start import Starter
from durable.steps import Step
from durable.store import code, events, outbox, queries, runs
from durable.store.events import NewEvent
from durable.store.pool import Database
from durable.store.sessions import Sessions
from durable.task import Workflow
from durable.waiting import check_event_type

if TYPE_CHECKING:
    from celery import Celery

    from durable.store.runs import Claim, StepRecord
    from durable.worker.keeper import Keeper

logger = get_logger(__name__)

#: How long no publish is tried after one that failed: a dead broker costs one
#: call its timeout, not every call.
_BROKER_REST = 2.0
#: Before a run is rung again whose message a worker without a lease had got.
_LEASE_REST = 2.0
#: Between two looks of a claim that waits.
_CLAIM_PAUSE = 0.2


class Durable:
    """Makes the durable tasks of a Celery app durable.

    Args:
        app: the app. Its configuration is read later, at the first use.
        clock: time and chance; for tests.
        **settings: any ``durable_*`` setting without its prefix. The app's
            configuration and the environment go before them.

    Example:
        >>> from celery import Celery
        >>> app = Celery("shop", broker="memory://")
        >>> durable = Durable(app, database_url="postgresql://localhost/shop")
        >>> app.durable is durable
        True
    """

    def __init__(self, app: Celery, *, clock: Clock = SYSTEM, **settings: Any) -> None:
        if getattr(app, "durable", None) is not None:
            raise ConfigurationError(f"Durable() was called twice for the app {app.main!r}")
        self.app = app
        self.clock = clock
        self.worker_id = ""
        self.keeper: Keeper | None = None
        self._keywords = settings
        self._broker_rests_until = 0.0
        self._install()

    def _install(self) -> None:
        from durable.worker.step import DurableStep
        from durable.worker.unknown import UnknownWorkflows

        app = self.app
        app.durable = self
        self.starter = Starter(self, app.send_task)
        app.send_task = self.starter.send_task
        app.AsyncResult = _result_class(app)
        app.GroupResult = app.subclass_with_self(DurableGroupResult, name="GroupResult")
        app.steps["worker"].add(DurableStep)
        app.steps["consumer"].add(UnknownWorkflows)
        signals.task_postrun.connect(self._on_postrun, weak=False)
        beat.install(self)
        canvas.install()
        joining.install()
        shown.install()
        outcomes.install(self)
        items.install(app)

    # --- made at first use

    @cached_property
    def settings(self) -> Settings:
        """The merged and checked settings."""
        return load_settings(self.app, self._keywords, os.environ)

    @cached_property
    def database(self) -> Database:
        """The store's connections of this process."""
        settings = self.settings
        return Database(
            self._database_url,
            pool_size=settings.pool_size,
            connect_timeout=settings.connect_timeout,
            prepare_threshold=settings.prepare_threshold,
            auto_migrate=settings.auto_migrate,
            sleep=self.clock.sleep,
            jitter=self.clock.random,
        )

    @cached_property
    def sessions(self) -> Sessions:
        """SQLAlchemy sessions for `durable.session()`."""
        return Sessions(self.database, self.settings.pool_size)

    @cached_property
    def outbox(self) -> Outbox:
        """What makes ``transaction=`` of a call usable."""
        return Outbox(lambda: self.database)

    @cached_property
    def codec(self) -> Codec:
        """What turns values into stored text."""
        settings = self.settings
        keys = settings.encryption_keys
        keyring = Keyring(keys, writes=settings.encrypt) if keys else None
        return Codec(max_bytes=settings.max_payload_bytes, keyring=keyring)

    @cached_property
    def mask(self) -> Mask:
        """What hides from people what ``durable_mask`` names, or all that is encrypted."""
        return Mask(self.settings.mask, hides_all=self.codec.encrypts)

    @cached_property
    def classifier(self) -> Classifier:
        """What judges errors; `register` rules of your own on it."""
        return Classifier()

    @cached_property
    def lease(self) -> Lease:
        """The lease word; a worker makes it before its pool forks."""
        return Lease(self.settings.lease, self.clock.monotonic)

    @cached_property
    def services(self) -> Services:
        """What every execution shares."""
        return Services(
            self.codec, self.classifier, self.clock, self._trusted_packages(), self.mask
        )

    @cached_property
    def control(self) -> Control:
        """What people do to runs: cancel, pause, resume, restart, settle a step."""
        return Control(self)

    @property
    def has_backend(self) -> bool:
        """Whether the app has a Celery result backend."""
        return not isinstance(self.app.backend, DisabledBackend)

    def _database_url(self) -> str:
        url = self.settings.require_database_url()
        return self._embedded_url if url == "embedded" else url

    @cached_property
    def _embedded_url(self) -> str:
        from durable import embedded

        return embedded.start(self.settings.embedded_dir).url

    def _trusted_packages(self) -> Sequence[str]:
        """Packages of the app's own tasks: their exceptions are rebuilt by import."""
        modules = {task.__module__ for task in self.app.tasks.values()}
        packages = {module.partition(".")[0] for module in modules} - {"celery", "durable"}
        return (*sorted(packages), *self.settings.exception_modules)

    # --- what the worker's processes ask for

    def claim(
        self, run_id: str, versions: Sequence[str] = ()
    ) -> tuple[Claim, Sequence[StepRecord]] | None:
        """Take a run for this process. None: it is not there for the taking.

        A run of a version that is not among ``versions`` goes to another worker.

        Waits, up to a lease, for a lease that was missed and for a database
        that is away: a worker that is cut off from it and refuses fast would
        empty the broker, ahead of those that can work.
        """
        until = self.clock.monotonic() + self.settings.lease
        while not self.lease.shutting_down:
            late = self.clock.monotonic() >= until
            if self.lease.held():
                try:
                    return self._claim(run_id, versions)
                except (DatabaseUnavailable, DatabaseReadOnly):
                    if late:
                        raise
            elif late:
                break
            self.clock.sleep(_CLAIM_PAUSE)
        self._decline(run_id)
        return None

    def _claim(
        self, run_id: str, versions: Sequence[str]
    ) -> tuple[Claim, Sequence[StepRecord]] | None:
        namespace = self.settings.namespace
        claimed = self.database.call(
            runs.claim,
            run_id,
            namespace,
            worker=self.worker_id,
            pid=boundary.this_pid(),
            tail_timeout=self.settings.tail_timeout,
            versions=versions,
        )
        if claimed is None:
            if self.hand_back(run_id, versions):
                logger.info("run %s goes to a worker that has its version", run_id)
            else:
                self._complain_of_stray(run_id, namespace)
        return claimed

    def _complain_of_stray(self, run_id: str, namespace: str) -> None:
        """A message of another namespace or database is a mistake that costs both dearly."""
        theirs = self.database.call(queries.namespace_of, run_id)
        if theirs is None:
            logger.error(
                "there is no run %s in this worker's database: is durable_database_url the"
                " same where it was started?",
                run_id,
            )
        elif theirs != namespace:
            logger.error(
                "%s: give each namespace queues of its own, or a broker",
                queries.foreign(run_id, theirs, namespace),
            )

    def _decline(self, run_id: str) -> None:
        """Have a run rung again whose message came to a worker that may not begin it.

        At a warm shutdown at once: another worker is to have it. Without a
        lease with a pause, or a worker that cannot beat would ring for itself
        without end.
        """
        self.ring_again(run_id, 0.0 if self.lease.shutting_down else _LEASE_REST)

    def hand_back(self, run_id: str, versions: Sequence[str] | None = None) -> bool:
        """Have a run rung for a worker that has its code, since this one got its message.

        Args:
            run_id: the run.
            versions: what this worker has of the workflow; None: nothing.

        Returns:
            Whether this worker lacks the code.
        """
        namespace = self.settings.namespace
        try:
            return self.database.call(code.hand_back, run_id, namespace, self.worker_id, versions)
        except StoreError as exc:
            logger.warning("run %s: rung again after durable_ring_interval: %s", run_id, exc)
            return False

    def ring_again(self, run_id: str, delay: float = 0.0) -> None:
        """Have the dispatchers send a run's message again, ``delay`` seconds from now.

        Without Postgres it is later: when they notice that nobody has claimed it.
        """
        try:
            self.database.call(runs.unring, [run_id], delay=delay)
        except StoreError as exc:
            logger.warning("run %s: rung again after durable_ring_interval: %s", run_id, exc)

    def send_event(
        self,
        run_id: str,
        event_type: str,
        payload: Any = None,
        *,
        idempotency_key: str | None = None,
        transaction: object = None,
    ) -> str:
        """Send an event to a run; see `durable.send_event`."""
        check_event_type(event_type)
        if idempotency_key is not None:
            check_key(idempotency_key)
        run_id = queries.checked_run_id(run_id)
        if transaction is not None:
            caller = self.outbox.caller(transaction)
            event = self._event(run_id, event_type, payload, idempotency_key)
            return caller.call(outbox.put_event, event)
        execution = context.of_body()
        if execution is not None:
            send = partial(self._send_event, run_id, event_type, payload, idempotency_key)
            sent: str = execution.step(Step(send, "send_event", SENDING), (), {}, "dispatch")
            return sent
        return self._send_event(run_id, event_type, payload, idempotency_key)

    def _send_event(
        self, run_id: str, event_type: str, payload: Any, idempotency_key: str | None
    ) -> str:
        event = self._event(run_id, event_type, payload, idempotency_key)
        return self.database.call(events.send, event)

    def _event(
        self, run_id: str, event_type: str, payload: Any, idempotency_key: str | None
    ) -> NewEvent:
        execution = context.stored()
        return NewEvent(
            id=self.clock.uuid() if execution is None else execution.new_task_id(),
            run_id=run_id,
            namespace=self.settings.namespace,
            type=event_type,
            payload=self.codec.encode(payload, f"the payload of event {event_type!r}"),
            idempotency_key=idempotency_key,
        )

    def erase(
        self,
        run_id: str | None = None,
        *,
        subject: str | None = None,
        reason: str | None = None,
        actor: str | None = None,
        force: bool = False,
    ) -> list[str]:
        """Erase the data of an ended run, or of all runs of a subject, with all their children.

        Arguments, results, errors, progress, steps' results, events' payloads
        and callbacks with their arguments go, also what a parent's history has
        of them. Ids, names, statuses and times stay.

        Args:
            run_id: the run, or
            subject: the tag of ``apply_async(subject=...)``.
            reason: why, for the audit.
            actor: who; by default the user of this process and its host.
            force: whether to give up what Celery has still to deliver of an ended run.

        Returns:
            Ids of the runs that were erased now.

        Raises:
            NotAllowed: one of the runs has not ended, or is still needed; nothing is erased.
            RunNotFound: there is no such run, or none of the subject.

        Example:
            >>> from celery import current_app
            >>> @workflow
            ... def fulfil(order_id: str) -> str:
            ...     return f"{order_id} is done"
            >>> result = fulfil.apply_async(["o-42"], subject="customer-7")
            >>> result.get(timeout=30)
            'o-42 is done'
            >>> current_app.durable.erase(subject="customer-7") == [result.id]
            True
            >>> row = result.run()
            >>> row.name.endswith("fulfil"), row.status, row.input, row.output
            (True, 'succeeded', None, None)
        """
        return Erasure(self, run_id, subject, force=force).run(reason=reason, actor=actor)

    def cancel(self, run_id: str, reason: str) -> None:
        """Cancel a run for Celery's sake; it is rung again if the database is away."""
        try:
            self.control.cancel_unfinished([run_id], reason)
        except StoreError as exc:
            logger.warning("run %s could not be canceled: %s", run_id, exc)

    def on_process_lost(self, run_id: str, pid: int | None) -> None:
        """A child died with a run: the keeper releases it."""
        if self.keeper is not None:
            self.keeper.process_lost(run_id, pid)

    def on_time_limit(self, run_id: str, seconds: float) -> None:
        """A run met its hard time limit: the keeper ends it."""
        if self.keeper is not None:
            self.keeper.time_limit(run_id, seconds)

    def broker_answers(self) -> bool:
        """Whether a publish is worth a try: not shortly after one that failed."""
        return self.clock.monotonic() >= self._broker_rests_until

    def broker_failed(self) -> None:
        """Note that a publish failed."""
        self._broker_rests_until = self.clock.monotonic() + _BROKER_REST

    def _on_postrun(self, task: Any = None, state: str | None = None, **_: Any) -> None:
        if isinstance(task, Workflow) and task.app is self.app:
            boundary.confirm_tail(self, task.request, state)

    def close(self) -> None:
        """Close this process's connections to the database and to the broker."""
        self.starter.close()
        if "sessions" in self.__dict__:
            self.sessions.close()
        if "database" in self.__dict__:
            self.database.close()


def _result_class(app: Celery) -> Callable[..., Any]:
    """Make ``app.AsyncResult``: a run's handle, unless the task is known to be a plain one."""
    plain = app.AsyncResult

    def async_result(id: str, *args: Any, task_name: str | None = None, **kwargs: Any) -> Any:  # noqa: A002
        task = app.tasks.get(task_name) if task_name else None
        if task is not None and not isinstance(task, Workflow):
            return plain(id, *args, task_name=task_name, **kwargs)
        return DurableResult(id, *args, task_name=task_name, **{"app": app, **kwargs})

    return async_result
