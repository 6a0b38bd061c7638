"""``Workflow`` and ``@workflow``: the Celery task whose steps are remembered."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from celery import Task, shared_task
from celery.exceptions import Retry
from celery.states import READY_STATES

from durable import boundary, context
from durable.backend import ConfirmedBackend
from durable.coroutines import entering
from durable.durations import parse_seconds
from durable.errors import ConfigurationError, OptionError, Parked, UnsupportedByDurable
from durable.on_commit import StartsInTransaction, starts_after_commit
from durable.result import DurableResult
from durable.steps import is_async, refuse_suspending
from durable.store.runs import Park
from durable.versions import checked_versions

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from durable.app import Durable

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)

#: From where on an unknown option is taken for a misspelt one.
_TYPO_LIKENESS = 0.8

_ROUTING = ("queue", "exchange", "routing_key")


class Workflow(Task):
    """Base class of durable tasks: ``@app.task(base=durable.Workflow)``.

    The app's own task class stays underneath: a class made from this one
    gets ``app.Task`` as a further base, and calls go on to it.

    Celery's hooks and signals see what they see of any task, with two
    exceptions. ``task_prerun`` and ``before_start`` come before the claim, so
    their ``args`` and ``kwargs`` are empty. A run that parks ends the task for
    Celery in state RETRY: ``on_retry`` gets the error behind it or a `Parked`,
    the ``task_retry`` signal always a `Parked`. Time limits count anew each
    time the run is woken; a ``SoftTimeLimitExceeded`` is remembered only if it
    was raised in a step, so that is where to catch it.

    Attributes:
        deadline: duration after which a run that has not ended fails, counted
            from its start call; None: never.
        version: of the code. A run keeps the one that it was started under, and
            only workers that have it execute the run. None: any code runs any
            run that has none.
        accepts: older versions whose runs this code can go on with.

    Example:
        >>> from celery import Celery
        >>> app = Celery("orders", set_as_current=False)
        >>> _ = durable.Durable(app)
        >>> @app.task(base=durable.Workflow, deadline="7d")
        ... def fulfil(order_id: str) -> str:
        ...     return f"{order_id} is done"
        >>> fulfil("o-42")  # a direct call runs inline
        'o-42 is done'
    """

    abstract = True
    Request = "durable.request:Request"
    Strategy = "durable.request:strategy"

    deadline: Any = None
    version: str | None = None
    accepts: Sequence[str] = ()

    #: Whether Celery's backend is told STARTED, which is the claim's to say:
    #: Celery would do it for any message, also a late one of a run that failed.
    durable_track_started = False

    #: Whether the run keeps its result even if Celery ignores it: a fan-out reads it.
    durable_keeps_output = False

    #: Whether the body is an ``async def``.
    durable_async = False

    #: ``queue``, ``exchange`` and ``routing_key`` of the task's definition.
    #: Celery warns of them as attributes; they are kept here and given with
    #: each call that names no route of its own.
    durable_routing: Mapping[str, Any] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        routing = {key: cls.__dict__[key] for key in _ROUTING if cls.__dict__.get(key) is not None}
        for key in routing:
            delattr(cls, key)
        if routing:
            cls.durable_routing = {**cls.durable_routing, **routing}
        if cls.deadline is not None:
            parse_seconds(cls.deadline, name="deadline")
        checked_versions(cls.version, cls.accepts)
        _refuse_misspelt(cls)
        refuse_suspending(cls.run, "a workflow")
        _take_async(cls)
        app = cls.__dict__.get("app")
        if app is not None and not issubclass(cls, app.Task):
            cls.__bases__ = (*cls.__bases__, app.Task)
        if starts_after_commit(cls):
            cls.__bases__ = (StartsInTransaction, *cls.__bases__)

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Take over ``track_started``, whether from the task or the app's configuration."""
        super().on_bound(app)
        if cls.track_started:
            cls.durable_track_started, cls.track_started = True, False

    @classmethod
    def runs_versions(cls) -> tuple[str, ...]:
        """Return the versions whose runs this code executes, besides runs without one."""
        return checked_versions(cls.version, cls.accepts)

    @property
    def durable(self) -> Durable:
        """The `Durable` of the task's app."""
        durable: Durable | None = getattr(self.app, "durable", None)
        if durable is None:
            raise ConfigurationError(
                f"{self.name!r} is a durable task, but its app has no Durable: put"
                " `Durable(app, database_url=...)` beside `app = Celery(...)`"
            )
        return durable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body: durably in a worker, inline when called or eager.

        Called in the body of another workflow it is a plain call, whose steps
        belong to that run. A direct call of an ``async def`` returns a coroutine.
        """
        body = super().__call__
        request = self.request
        begins = self._begins_eagerly(request)
        if context.running.get() is not None and not begins:
            return body(*args, **kwargs)
        if not (request.called_directly or request.is_eager):
            return boundary.run_in_worker(self, self.durable, body)
        if request.is_eager and body.__func__ is Task.__call__:
            body = self.run  # Celery's own __call__ would hide the request
        return boundary.run_inline(self, self.durable, body, args, kwargs)

    def _begins_eagerly(self, request: Any) -> bool:
        """Tell whether eager mode starts a coroutine here: that is a run of its own."""
        if not (self.durable_async and request.is_eager) or "durable_begun" in request.__dict__:
            return False
        request.durable_begun = True
        return True

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Start a run.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            **options: Celery's, and of ours ``deadline``; ``transaction``, in which the run is
                written; ``idempotency_key``, for which there is one run, with
                ``idempotency_ttl`` and ``idempotency_reuse`` (see docs/transactions.md).

        Raises:
            OptionError: an option that cannot be.
            PayloadError: arguments that cannot be stored.
            IdempotencyConflict: the key is that of a run with other arguments.
        """
        _ = self.durable  # without one it would be a plain message, which no worker can take
        return super().apply_async(args, kwargs, **options)

    @property
    def backend(self) -> Any:
        """The result backend; in a worker one that takes of runs only what their rows say."""
        backend, durable = self._backend or self.app.backend, getattr(self.app, "durable", None)
        if durable is None or not durable.worker_id or self.request.is_eager:
            return backend
        return ConfirmedBackend(backend)

    @backend.setter
    def backend(self, value: Any) -> None:
        self._backend = value

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult[Any]:  # noqa: N802
        """Return the handle of a run of this workflow."""
        return DurableResult(
            task_id, backend=self.backend, task_name=self.name, app=self.app, **kwargs
        )

    def update_state(
        self,
        task_id: str | None = None,
        state: str | None = None,
        meta: Any = None,
        **kwargs: Any,
    ) -> None:
        """Report a state of your own, such as ``PROGRESS``: to Postgres, and to Celery's backend.

        Raises:
            UnsupportedByDurable: the state is one that a task ends in.

        Example:
            >>> @workflow(bind=True)
            ... def load(self, rows: int) -> dict[str, int]:
            ...     self.update_state(state="PROGRESS", meta={"done": 1, "of": rows})
            ...     return load.AsyncResult(self.request.id).info  # what anybody sees meanwhile
            >>> load.delay(8).get(timeout=30)
            {'done': 1, 'of': 8}
        """
        execution = context.running.get()
        if execution is not None and task_id in {None, execution.id} and state is not None:
            if state in READY_STATES:
                raise UnsupportedByDurable(
                    f"update_state({state!r}) in {self.name!r}: a run ends by what its body returns"
                    " or raises; give a state of your own"
                )
            execution.set_progress(state, meta)
        super().update_state(task_id=task_id, state=state, meta=meta, **kwargs)

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: BaseException | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Retry:
        """Park the run and run its body again later; recorded steps keep their results.

        A step that had failed for good is set aside, so that it runs again.
        Arguments as in Celery, but those of the run cannot be changed.

        Raises:
            OptionError: the call would change arguments or routing.

        Example:
            >>> @workflow(bind=True, max_retries=3)
            ... def fulfil(self, order_id: str) -> str:
            ...     price = run_step("price", lambda: 20)  # once: its result is kept
            ...     if self.request.retries == 0:
            ...         raise self.retry(countdown=0)
            ...     return f"{order_id} for {price}, after {self.request.retries} retry"
            >>> fulfil.delay("o-42").get(timeout=30)
            'o-42 for 20, after 1 retry'
        """
        execution = context.running.get()
        if execution is None or self.request.called_directly or self.request.is_eager:
            retry: Retry = super().retry(
                args, kwargs, exc, throw, eta, countdown, max_retries, **options
            )
            return retry
        self._refuse_changes(args, kwargs, options)
        execution.check()
        limit = self.max_retries if max_retries is None else max_retries
        if limit is not None and self.request.retries >= limit:
            raise exc or self.MaxRetriesExceededError(
                f"Can't retry {self.name}[{self.request.id}]: {limit} retries are used up"
            )
        delay = self.pause_until(
            eta or (self.default_retry_delay if countdown is None else countdown)
        )
        cause = exc if isinstance(exc, Exception) else None
        suspend = execution.park(Park("sleeping", "retry", delay=delay, retry=True), cause=cause)
        if throw and suspend is not None:
            raise suspend
        return Parked("retry", exc=cause, when=delay)

    def _refuse_changes(self, args: Any, kwargs: Any, options: Mapping[str, Any]) -> None:
        request = self.request
        if (args is not None and list(args) != list(request.args)) or (
            kwargs is not None and dict(kwargs) != dict(request.kwargs)
        ):
            raise OptionError(
                f"self.retry() in {self.name!r} cannot change the run's arguments: its recorded"
                " steps belong to the old ones. Start another run instead"
            )
        if options:
            raise OptionError(
                f"self.retry() in {self.name!r} does not take {', '.join(sorted(options))}: a run"
                " keeps the options that it was started with"
            )

    def pause_until(self, when: datetime | float | None) -> float:
        """Return the seconds until a date, or the number given; None is now."""
        if isinstance(when, datetime):
            aware = when if when.tzinfo else when.replace(tzinfo=self.app.timezone)
            return max(0.0, (aware - self.durable.clock.now()).total_seconds())
        return float(when or 0.0)

    def replace(self, sig: Any) -> Any:
        """Refused in a run; as in Celery elsewhere."""
        if context.running.get() is not None:
            raise UnsupportedByDurable(
                f"self.replace() in {self.name!r}: the run's id would belong to two tasks. Call"
                " the other task's function, or start it with .delay()"
            )
        return super().replace(sig)

    def add_to_chord(self, sig: Any, lazy: bool = False) -> Any:
        """Refused in a run; as in Celery elsewhere."""
        if context.running.get() is not None:
            raise UnsupportedByDurable(
                f"self.add_to_chord() in {self.name!r}: a repeated attempt would enlarge the chord"
                " again. Build the whole chord before you start it"
            )
        return super().add_to_chord(sig, lazy=lazy)


class WorkflowTask(Protocol[P, R_co]):
    """What `@workflow` makes of a function, for type checkers."""

    name: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def delay(self, *args: P.args, **kwargs: P.kwargs) -> DurableResult: ...
    def apply_async(self, args: Any = ..., kwargs: Any = ..., **options: Any) -> DurableResult: ...
    def s(self, *args: Any, **kwargs: Any) -> Any: ...
    def si(self, *args: Any, **kwargs: Any) -> Any: ...
    def signature(self, *args: Any, **kwargs: Any) -> Any: ...
    def AsyncResult(self, task_id: str, **kwargs: Any) -> DurableResult: ...  # noqa: N802


@overload
def workflow(function: Callable[P, R_co], /) -> WorkflowTask[P, R_co]: ...


@overload
def workflow(
    *, bind: Literal[True], base: type[Workflow] = ..., **options: Any
) -> Callable[[Callable[Concatenate[Any, P], R_co]], WorkflowTask[P, R_co]]: ...


@overload
def workflow(
    *, base: type[Workflow] = ..., **options: Any
) -> Callable[[Callable[P, R_co]], WorkflowTask[P, R_co]]: ...


def workflow(
    function: Callable[..., Any] | None = None,
    /,
    *,
    base: type[Workflow] = Workflow,
    **options: Any,
) -> Any:
    """Make a function a durable Celery task: ``@shared_task(base=durable.Workflow)``, typed.

    The body runs again from its top after every wait and every crash; what it
    does in steps is not done again. Code outside steps is.

    Args:
        function: the body.
        base: a subclass of `Workflow`.
        deadline: duration within which a run has to end, such as ``"7d"``.
        queue: queue of its messages.
        version: of this code, such as ``"2"``: runs that it starts are executed only by
            workers that have the version. None: any code runs any run that has none.
        accepts: older versions whose runs this code can go on with.
        **options: Celery's task options: name, bind, max_retries, time_limit, ...

    Raises:
        OptionError: an option that neither Celery nor this package knows.

    Example:
        >>> @workflow(deadline="1h")
        ... def greet(name: str) -> str:
        ...     return f"hello {name}"
    """
    if function is not None and not callable(function):
        raise OptionError(
            f"@workflow goes on a function, not on {function!r}; options are given by keyword"
        )
    if function is None:
        _check_options(base, options)
        return shared_task(base=base, **options)
    return shared_task(base=base)(function)


_DECORATOR_OPTIONS = frozenset(
    {
        "name",
        "bind",
        "pydantic",
        "pydantic_strict",
        "pydantic_context",
        "pydantic_dump_kwargs",
        "autoretry_for",
        "dont_autoretry_for",
        "retry_kwargs",
        "retry_backoff",
        "retry_backoff_max",
        "retry_jitter",
        "deadline",
        "queue",
        "exchange",
        "exchange_type",
        "routing_key",
        "delivery_mode",
        "compression",
        "shared",
        "lazy",
        "after_return",
        "on_success",
        "on_failure",
        "on_retry",
    }
)


def _check_options(base: type[Workflow], options: Mapping[str, Any]) -> None:
    known = _known_options(base)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise OptionError(f"@workflow does not know the option {option!r}.{hint}")
    if "deadline" in options and options["deadline"] is not None:
        parse_seconds(options["deadline"], name="deadline")
    checked_versions(options.get("version"), options.get("accepts", ()))


def _take_async(cls: type[Workflow]) -> None:
    """Have a body that is an ``async def`` run when it is called."""
    if "run" not in cls.__dict__:
        return
    given = cls.__dict__["run"]
    cls.durable_async = is_async(cls.run)
    if cls.durable_async:
        body = given.__func__ if isinstance(given, (staticmethod, classmethod)) else given
        cls.run = type(given)(entering(body)) if body is not given else entering(body)


def _refuse_misspelt(cls: type[Workflow]) -> None:
    """Refuse options of ``@app.task(base=Workflow, ...)`` that look like one we or Celery know.

    Celery makes attributes of them all, and the project may have its own.
    """
    if not cls.__dict__.get("_decorated"):
        return
    known = _known_options(cls.__mro__[1])
    for option in cls.__dict__:
        if option in known or option.startswith("_") or option in {"app", "run"}:
            continue
        close = difflib.get_close_matches(option, known, 1, _TYPO_LIKENESS)
        if close:
            raise OptionError(
                f"task {cls.name!r} has the option {option!r}. Did you mean {close[0]!r}?"
            )


def _known_options(base: type) -> frozenset[str]:
    return _DECORATOR_OPTIONS | {key for key in dir(base) if not key.startswith("_")}
