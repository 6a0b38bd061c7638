"""``AsyncResult`` of a run: Celery's interface, answered from Postgres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, GroupResult, assert_will_not_block, result_from_tuple

from durable.context import of_body
from durable.errors import EncryptionError, RunErased
from durable.failures import decode_failure
from durable.joining import join
from durable.store import events, queries, steps

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.store.control import ActionRow
    from durable.store.events import EventRow
    from durable.store.queries import RunRow
    from durable.store.steps import StepRow

_FIRST_PAUSE = 0.001
_SHARE_OF_WAIT = 0.1


class DurableResult(AsyncResult):
    """Handle of a run; its id is the run's id and the Celery task id.

    All of Celery's interface works with and without a result backend, since
    the answers come from Postgres. For the id of a plain task, and for a run
    that has not reached Postgres yet, Celery's own answer is given; without a
    result backend that is PENDING.
    """

    _cache: dict[str, Any] | None

    @property
    def _durable(self) -> Durable:
        durable: Durable = self.app.durable
        return durable

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        no_ack: bool = True,
        follow_parents: bool = True,
        callback: Any = None,
        on_message: Any = None,
        on_interval: Any = None,
        disable_sync_subtasks: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Wait for the run's end; return its result or raise its exception.

        In the body of a workflow it parks that run until then, and only tasks
        that the body has started can be waited for.

        Looks at Postgres at once, then in growing pauses: a tenth of the time
        waited so far, between 1 ms and ``durable_result_poll_max``.

        Args:
            timeout: seconds to wait at most; None: without end.
            propagate: whether to raise the run's exception; else it is returned.
            follow_parents: whether the failure of an earlier member of the
                chain is raised here.
            callback: called with (id, result).
            on_interval: called before each look.
            disable_sync_subtasks: whether waiting inside a task is refused.
            interval: has no meaning here, as for Celery's Redis backend.
            no_ack: likewise.
            on_message: likewise.
            **kwargs: the rest of Celery's signature.

        Raises:
            celery.exceptions.TimeoutError: the run did not end in time.
            celery.exceptions.TaskRevokedError: the run was canceled.
            RunErased: its data was erased.

        Example:
            >>> @workflow
            ... def fulfil(order_id: str) -> str:
            ...     return f"{order_id} is done"
            >>> fulfil.delay("o-42").get(timeout=30)
            'o-42 is done'
        """
        execution = of_body()
        if execution is not None:
            options = {"timeout": timeout, "propagate": propagate, "callback": callback}
            return join(execution, self, {**options, "follow_parents": follow_parents})
        if self.ignored:
            return None
        if disable_sync_subtasks:
            assert_will_not_block()
        self._wait(timeout, follow_parents and propagate, on_interval)
        if propagate:
            self.maybe_throw(callback=callback)
            if isinstance(self.result, RunErased):  # of a run that has succeeded, too
                raise self.result
        elif callback is not None:
            callback(self.id, self.result)
        return self.result

    wait = get

    def _wait(self, timeout: float | None, follow_parents: bool, on_interval: Any) -> None:
        clock = self._durable.clock
        started = clock.monotonic()
        while not self.ready():
            if follow_parents and self.parent:
                self._maybe_reraise_parent_error()
            if on_interval is not None:
                on_interval()
            waited = clock.monotonic() - started
            if timeout is not None and waited >= timeout:
                raise CeleryTimeoutError(f"run {self.id} did not end within {timeout} s")
            pause = min(
                max(_FIRST_PAUSE, waited * _SHARE_OF_WAIT), self._durable.settings.result_poll_max
            )
            clock.sleep(pause if timeout is None else min(pause, timeout - waited))

    def _get_task_meta(self) -> dict[str, Any]:
        if self._cache is not None:
            return self._cache
        durable = self._durable
        outcome = None
        if queries.is_run_id(self.id):
            outcome = durable.database.call(queries.outcome, self.id, durable.settings.namespace)
        if outcome is None:
            return self._meta_of_celery()
        try:
            state, result = _as_celery(self.id, outcome, durable)
        except EncryptionError as exc:
            raise EncryptionError(f"the outcome of run {self.id} cannot be read: {exc}") from exc
        meta = {
            "task_id": self.id,
            "status": state,
            "result": result,
            "traceback": getattr(result, "durable_traceback", None),
            "children": [],
            "date_done": outcome.completed_at,
        }
        if state in states.READY_STATES:
            self._cache = meta
            self.on_ready(self)
        return meta

    @property
    def children(self) -> Any:
        """What Celery has started after the task: its callbacks. Only the result backend knows."""
        if not self._durable.has_backend:
            return []
        known = self.backend.get_task_meta(self.id).get("children") or []
        return [result_from_tuple(child, self.app) for child in known]

    def _meta_of_celery(self) -> dict[str, Any]:
        if not self._durable.has_backend:  # nobody to ask; Celery fails with an AttributeError
            return {"task_id": self.id, "status": states.PENDING, "result": None}
        meta: dict[str, Any] = super()._get_task_meta()
        return meta

    def run(self) -> RunRow:
        """Load the run's row: status, attempt, worker, times, input, output.

        Raises:
            RunNotFound: there is no such run in this namespace.

        Example:
            >>> @workflow
            ... def remind(order_id: str) -> None: ...
            >>> row = remind.apply_async(["o-42"], countdown=3600).run()
            >>> row.status, row.attempt, row.input
            ('sleeping', 0, '{"args":["o-42"],"kwargs":{}}')
        """
        durable, run_id = self._durable, queries.checked_run_id(self.id)
        namespace = durable.settings.namespace
        row = durable.database.call(queries.get, run_id, namespace)
        if row is None:
            raise durable.database.call(queries.missing, run_id, namespace)
        return durable.codec.readable(row, "input", "output", "error", "progress")

    def steps(self) -> list[StepRow]:
        """Load the attempts of the run's steps, in order.

        Example:
            >>> @workflow
            ... def fulfil(order_id: str) -> None:
            ...     run_step("charge", lambda: 20)
            ...     run_step("ship", lambda: f"parcel of {order_id}")
            >>> result = fulfil.delay("o-42")
            >>> result.get(timeout=30)
            >>> [(step.name, step.status, step.output) for step in result.steps()]
            [('charge', 'succeeded', '20'), ('ship', 'succeeded', '"parcel of o-42"')]
        """
        if not queries.is_run_id(self.id):
            return []
        durable = self._durable
        rows = durable.database.call(steps.of_run, self.id, durable.settings.namespace)
        return [durable.codec.readable(row, "output", "error") for row in rows]

    def cancel(self, reason: str = "canceled", *, actor: str | None = None) -> bool:
        """Cancel the run: at once if it is parked or queued, else before its next step.

        Args:
            reason: why; kept in the audit and shown with the run.
            actor: who asks; by default the user and host of this process.

        Returns:
            Whether there was something to cancel: False for a run that has ended.

        Example:
            >>> @workflow
            ... def remind(order_id: str) -> None: ...
            >>> result = remind.apply_async(["o-42"], countdown=3600)
            >>> result.cancel("the order is paid"), result.run().status
            (True, 'canceled')
            >>> result.cancel()
            False
        """
        if not queries.is_run_id(self.id):
            return False
        return bool(self._durable.control.cancel_unfinished([self.id], reason, actor))

    def send_event(
        self,
        event_type: str,
        payload: Any = None,
        *,
        idempotency_key: str | None = None,
        transaction: object = None,
    ) -> str:
        """Send an event to the run; see `durable.send_event`.

        Returns:
            The id of the event, once it is committed, or is to be with ``transaction``.
        """
        return self._durable.send_event(
            self.id,
            event_type,
            payload,
            idempotency_key=idempotency_key,
            transaction=transaction,
        )

    def events(self) -> list[EventRow]:
        """Load the events that were sent to the run, in order: when they came, who took them."""
        if not queries.is_run_id(self.id):
            return []
        durable = self._durable
        rows = durable.database.call(events.of_run, self.id, durable.settings.namespace)
        return [durable.codec.readable(row, "payload", texts=["error"]) for row in rows]

    def pause(self, *, reason: str | None = None, actor: str | None = None) -> bool:
        """Pause the run: at once if it is parked or queued, else before its next step.

        Args:
            reason: why; kept in the audit and shown with the run.
            actor: who asks; by default the user and host of this process.

        Returns:
            Whether there was something to do: False for one that is paused already.

        Raises:
            NotAllowed: it has ended, or is being canceled.
            RunNotFound: there is no such run in this namespace.

        Example:
            >>> @workflow
            ... def remind(order_id: str) -> str:
            ...     durable.sleep(0.1)
            ...     return order_id
            >>> result = remind.apply_async(["o-42"], countdown=3600)
            >>> result.pause(reason="the shop is closed"), result.run().status
            (True, 'paused')
            >>> result.resume(), result.run().status
            (True, 'sleeping')
        """
        return self._durable.control.pause(self.id, reason=reason, actor=actor)

    def resume(self, *, reason: str | None = None, actor: str | None = None) -> bool:
        """Let the run go on if it is paused.

        Returns:
            Whether there was something to do: False for one that is not paused.

        Raises:
            NotAllowed: it has ended, or is being canceled.
            RunNotFound: there is no such run in this namespace.
        """
        return self._durable.control.resume(self.id, reason=reason, actor=actor)

    def restart(
        self,
        *,
        from_step: str | None = None,
        ordinal: int | None = None,
        from_beginning: bool = False,
        reason: str | None = None,
        actor: str | None = None,
    ) -> bool:
        """Have the run, which has ended or is paused, run again under its id.

        Arguments and errors are those of `durable.control.Control.restart`.

        Example:
            >>> @durable.step
            ... def charge(attempts: str) -> str:
            ...     with open(attempts, "a+") as file:
            ...         file.write(".")
            ...         file.seek(0)
            ...         if len(file.read()) < 2:
            ...             raise durable.PermanentError("the card is gone")
            ...     return "paid"
            >>> @workflow
            ... def pay(attempts: str) -> str:
            ...     return charge(attempts)
            >>> import tempfile
            >>> with tempfile.NamedTemporaryFile() as file:
            ...     result = pay.delay(file.name)
            ...     print(type(result.get(timeout=30, propagate=False)).__name__)
            ...     _ = result.restart()
            ...     print(result.get(timeout=30))
            PermanentError
            paid
        """
        self._cache = None
        return self._durable.control.restart(
            self.id,
            from_step=from_step,
            ordinal=ordinal,
            from_beginning=from_beginning,
            reason=reason,
            actor=actor,
        )

    def settle(
        self,
        step: str,
        value: Any,
        *,
        ordinal: int | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Give a step's result by hand; see `durable.control.Control.settle`."""
        self._durable.control.settle(
            self.id, step, value, ordinal=ordinal, reason=reason, actor=actor
        )

    def actions(self) -> list[ActionRow]:
        """Load what people did to the run: who, when and why."""
        return self._durable.control.actions(self.id) if queries.is_run_id(self.id) else []

    def revoke(
        self,
        connection: Any = None,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """Cancel the run, workers or no workers. Arguments as in Celery.

        Workers are told only if its process is to be terminated, or if it is no run:
        a word that arrives late would cancel a run that was restarted meanwhile.
        """
        self.cancel("revoked")
        durable = self._durable
        if not terminate and queries.is_run_id(self.id):
            namespace = durable.settings.namespace
            if durable.database.call(queries.known, [self.id], namespace):
                return None
        return super().revoke(connection, terminate, signal, wait, timeout)

    def forget(self) -> None:
        """Forget what Celery's backend holds; the run stays until it is pruned."""
        self._cache = None
        if self._durable.has_backend:
            super().forget()


class DurableGroupResult(GroupResult):
    """Handle of a group, among whose members may be runs."""

    @property
    def supports_native_join(self) -> bool:
        """Never: the backend does not know all about runs."""
        return False


def _as_celery(run_id: str, outcome: queries.Outcome, durable: Durable) -> tuple[str, Any]:
    """Translate a run's status and payload into Celery's state and result."""
    _, status, started, reason, output, error, progress, _, erased = outcome
    if status in {"succeeded", "failed"}:
        state = states.SUCCESS if status == "succeeded" else states.FAILURE
        if erased:
            return state, RunErased(f"run {run_id} has ended, and its data was erased since")
        codec, succeeded = durable.codec, status == "succeeded"
        text = (output if succeeded else error) or "null"
        return state, codec.decode(text) if succeeded else decode_failure(text, codec)
    if status == "canceled":
        return states.REVOKED, TaskRevokedError(reason or "canceled")
    if progress is not None and status in {"running", "pending"}:
        report = durable.codec.decode(progress)
        return report["state"], report["meta"]
    if not started:
        return states.PENDING, None
    return (states.STARTED if status == "running" else states.RETRY), None
