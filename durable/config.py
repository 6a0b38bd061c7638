"""The settings: each declared once, read from four places, checked before anything runs.

The first place that sets a key wins:

1. ``app.conf.durable_lease`` (with Django, or any other ``namespace="CELERY"``:
   ``CELERY_DURABLE_LEASE``);
2. the environment variable ``DURABLE_LEASE``;
3. the keyword of ``Durable(app, lease=...)``;
4. the default.

``None`` in ``app.conf`` or in a keyword, and an empty environment variable,
mean "not set", so that ``os.environ.get(...)`` can be passed on as it is;
``prepare_threshold`` alone takes ``None`` as a value.

``python -m durable.config`` prints the table of ``docs/configuration.md``.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from durable import _accept as accept
from durable._sources import PREFIX, Given, Sources
from durable.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from durable._sources import Configured


def _setting(kind: accept.Kind, meaning: str, *, default: object, unit: str = "") -> Any:
    metadata = {"kind": kind, "meaning": meaning, "unit": unit}
    return field(default=default, repr=not kind.secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting; durations are seconds as ``float``.

    >>> Settings(database_url="embedded").lease
    10.0
    """

    database_url: str | None = _setting(
        accept.postgres_url(),
        "Where the runs are kept; `embedded` starts a Postgres of its own in `embedded_dir`.",
        default=None,
    )
    embedded_dir: str = _setting(
        accept.path(),
        "Directory of the embedded Postgres, shared by all processes that name it.",
        default=".durable",
    )
    namespace: str = _setting(
        accept.text(most=63),
        "Which runs of the database are this app's; apps of another namespace never see them.",
        default="default",
    )
    lease: float = _setting(
        accept.seconds(2, 600),
        "How long a worker may be silent before its runs are taken over.",
        default=10.0,
        unit="s",
    )
    heartbeat_interval: float = _setting(
        accept.seconds(0.1, 200),
        "Pause between two signs of life; at most a third of `lease` "
        "(unset, a quarter of a lease shorter than 10 s).",
        default=2.5,
        unit="s",
    )
    poll_interval: float = _setting(
        accept.seconds(0.05, 60),
        "Pause between two looks for due runs while LISTEN works; it is at most 1 s without.",
        default=2.0,
        unit="s",
    )
    ring_interval: float = _setting(
        accept.seconds(1, 3600),
        "How long a message may stay undelivered while a worker of its queue is idle, "
        "before it is sent again; at least `poll_interval`.",
        default=20.0,
        unit="s",
    )
    listen: bool = _setting(
        accept.flag(),
        "Whether LISTEN/NOTIFY is used; switch it off behind PgBouncer in transaction mode.",
        default=True,
    )
    prepare_threshold: int | None = _setting(
        accept.whole(0, 1_000_000, zero_is_none=True),
        "Executions after which a statement is prepared on the server; "
        "0 or None: never (older PgBouncers).",
        default=5,
    )
    dispatch_batch: int = _setting(
        accept.whole(1, 10_000),
        "Due runs that are rung in one statement.",
        default=100,
        unit="runs",
    )
    wake_priority: int | str = _setting(
        accept.priority(),
        "Priority of the message that rings a run which was begun before, so that it gets ahead "
        "of new ones; `auto`: the highest with RabbitMQ and Redis; `off`: the run's own.",
        default=accept.AUTO,
    )
    max_recoveries: int = _setting(
        accept.whole(1, 1_000),
        "How often a run may take its worker down without a step in between, before it is failed.",
        default=10,
    )
    max_payload_bytes: int = _setting(
        accept.whole(1_024, 268_435_456),
        "Largest input, step result or output, encoded.",
        default=1_048_576,
        unit="bytes",
    )
    idempotency_ttl: float = _setting(
        accept.seconds(0, 315_576_000),
        "How long after the end of its run an idempotency key stays taken.",
        default=604_800.0,
        unit="s",
    )
    exception_modules: tuple[str, ...] = _setting(
        accept.modules(),
        "Packages, beside the tasks' own, whose stored exceptions are rebuilt by import.",
        default=(),
    )
    encryption_keys: tuple[str, ...] = _setting(
        accept.fernet_keys(),
        "Keys by which arguments, results, errors and events are encrypted in Postgres: the first "
        "one writes, each one reads. Needs the extra `encryption`.",
        default=(),
    )
    encrypt: bool = _setting(
        accept.flag(),
        "Whether new values are encrypted when there are keys; switched off, the keys only read.",
        default=True,
    )
    mask: tuple[str, ...] = _setting(
        accept.names(),
        "Arguments, keys and fields whose values are shown as `***` in messages, logs and tools, "
        "whatever their case, underscores and hyphens.",
        default=(),
    )
    accept_only: bool = _setting(
        accept.flag(),
        "Whether producers still send ordinary messages, and workers ring runs on queues of their "
        "own: while some workers do not know the package yet.",
        default=False,
    )
    publish_timeout: float = _setting(
        accept.seconds(0.1, 60),
        "How long a start waits for the broker; the run is accepted all the same.",
        default=3.0,
        unit="s",
    )
    pool_size: int = _setting(
        accept.whole(1, 1_000),
        "Most database connections of one process; one that runs a task at a time uses one.",
        default=4,
        unit="connections",
    )
    connect_timeout: float = _setting(
        accept.seconds(1, 300),
        "How long connecting to Postgres may take.",
        default=5.0,
        unit="s",
    )
    auto_migrate: bool = _setting(
        accept.flag(),
        "Whether first use creates and updates the schema `durable`.",
        default=True,
    )
    result_poll_max: float = _setting(
        accept.seconds(0.01, 60),
        "Longest pause between two looks of `AsyncResult.get()`.",
        default=0.25,
        unit="s",
    )
    tail_timeout: float = _setting(
        accept.seconds(1, 86_400),
        "How long after the end of a run its Celery continuation (chain, chord, callbacks, "
        "result) may stay unconfirmed before it is repeated.",
        default=30.0,
        unit="s",
    )

    def require_database_url(self) -> str:
        """The database URL, or an error that says how to give one."""
        if self.database_url is None:
            message = (
                "no database: set durable_database_url (app.conf, or Durable(app, "
                "database_url=...)) or the environment variable DURABLE_DATABASE_URL to a "
                "postgresql:// URL; the value 'embedded' starts a Postgres of its own"
            )
            raise ConfigurationError(message)
        return self.database_url


FIELDS: dict[str, Field[Any]] = {each.name: each for each in fields(Settings)}


def load_settings(
    app: Configured,
    keywords: Mapping[str, object],
    environ: Mapping[str, str],
) -> Settings:
    """Merge and check the settings of an app. Reads ``app.conf``, hence loads it.

    Args:
        app: the Celery app.
        keywords: those of ``Durable(app, ...)``, keys without the prefix.
        environ: usually ``os.environ``.

    Raises:
        ConfigurationError: names every unknown, ill-typed or out-of-range
            setting at once, where each came from and what is accepted.

    >>> from celery import Celery
    >>> app = Celery()
    >>> app.conf.durable_lease = "30s"
    >>> load_settings(app, {"lease": 20, "pool_size": 8}, {"DURABLE_POOL_SIZE": "6"}).pool_size
    6
    """
    sources = Sources({name: each.metadata["kind"] for name, each in FIELDS.items()})
    given = sources.keywords(keywords) | sources.environ(environ) | sources.conf(app)
    problems = sources.problems
    values = _read(given, problems)
    if not problems:
        settings = _with_followers(values)
        problems += _conflicts(settings, given)
        if not problems:
            return settings
    raise ConfigurationError("\n".join(problems))


def _read(given: Mapping[str, Given], problems: list[str]) -> dict[str, Any]:
    values = {}
    for name, setting in given.items():
        kind: accept.Kind = FIELDS[name].metadata["kind"]
        try:
            values[name] = kind.read(setting.value)
        except accept.RefusedError as why:
            shown = "***" if kind.secret else accept.mask_secrets(repr(setting.value))
            detail = f" ({why})" if str(why) else ""
            problems.append(f"{setting.where} is {shown}; accepted: {kind.accepts}{detail}")
    return values


def _with_followers(values: dict[str, Any]) -> Settings:
    """Defaults that follow another setting, so that one change does not ask for two."""
    settings = Settings(**values)
    if "heartbeat_interval" in values:
        return settings
    interval = min(settings.heartbeat_interval, settings.lease / 4)
    return Settings(**values, heartbeat_interval=interval)


def _conflicts(settings: Settings, given: Mapping[str, Given]) -> Iterator[str]:
    def described(name: str) -> str:
        where = given[name].where if name in given else f"the default of {PREFIX}{name}"
        return f"{where} ({getattr(settings, name):g} s)"

    if settings.heartbeat_interval > settings.lease / 3:
        # Two beats may be late or lost before a healthy worker counts as dead.
        beat, lease = described("heartbeat_interval"), described("lease")
        yield f"{beat} must be at most a third of {lease}"
    if settings.ring_interval < settings.poll_interval:
        ring, poll = described("ring_interval"), described("poll_interval")
        yield f"{ring} must be at least {poll}"


def table() -> str:
    """The settings as a markdown table."""
    rows = ["| Setting | Default | Accepted | Meaning |", "|---|---|---|---|"]
    for name, each in FIELDS.items():
        accepts = each.metadata["kind"].accepts.replace("|", "\\|")
        default = _shown_default(each)
        rows.append(f"| `{PREFIX}{name}` | {default} | {accepts} | {each.metadata['meaning']} |")
    return "\n".join(rows)


def _shown_default(each: Field[Any]) -> str:
    if each.default is None or each.default == ():
        return "none"
    number = isinstance(each.default, (int, float)) and not isinstance(each.default, bool)
    shown = f"{each.default:.10g}" if number else str(each.default)
    return f"`{shown}` {each.metadata['unit']}".rstrip()


if __name__ == "__main__":
    print(table())  # noqa: T201 - a command
