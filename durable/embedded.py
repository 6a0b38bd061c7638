"""A Postgres from a wheel, for laptops, tests and trials.

``durable_database_url = "embedded"`` asks for it. The server lives in a
directory (``.durable/``) and is shared by all processes that name that
directory: the first one starts it, and it stops by itself soon after the
last one has ended, however that one ended (see ``durable._keeper``).

It listens on a Unix socket only, which nobody but the user that runs it (and
root) may use. It is an ordinary PostgreSQL with its durability on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import final

from durable import _keeper
from durable._cluster import POLL_SECONDS, Cluster
from durable.errors import DatabaseUnavailable

DEFAULT_DIRECTORY = ".durable"

#: What a new server is configured with.
SETTINGS: Mapping[str, str] = {
    "max_connections": "200",
    "listen_addresses": "",
    "log_checkpoints": "off",
}

#: Seconds that another process may take to start or stop the server.
LOCK_TIMEOUT = 120.0


@final
class EmbeddedServer:
    """A running embedded Postgres, kept running by this process.

    Attributes:
        directory: the directory that it lives in.
        url: a libpq URL of its ``postgres`` database, as a role that may do anything.

    A child that is forked from this process also keeps it running, for as
    long as the child lives and does not call ``close``.
    """

    def __init__(self, directory: Path, url: str, hold: int) -> None:
        self.directory = directory
        self.url = url
        self._hold: int | None = hold

    def close(self) -> None:
        """Say that this process does not use the server any more; the last one's word stops it."""
        if self._hold is not None:
            # Closed, never unlocked: a forked child shares the lock.
            os.close(self._hold)
            self._hold = None

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EmbeddedServer {self.directory}>"


def start(
    directory: str | os.PathLike[str] = DEFAULT_DIRECTORY,
    *,
    settings: Mapping[str, str] | None = None,
) -> EmbeddedServer:
    """Start the Postgres of a directory, or join the one that runs there.

    Safe to call from several processes and threads at once, and after any
    of them was killed at any moment. About 0.7 s in a new directory.

    Args:
        directory: where the server keeps its data; made if it is not there.
        settings: server settings for a *new* directory, such as
            ``{"fsync": "off"}`` for tests; ignored if there is data already.

    Raises:
        ConfigurationError: the extra ``embedded`` is not installed, or the
            directory cannot be used.
        DatabaseUnavailable: the server did not start; the message has the
            end of its log.

    Example:
        >>> from durable import embedded
        >>> with embedded.temporary() as first:
        ...     with embedded.start(first.directory) as second:
        ...         second.url == first.url
        True
    """
    cluster = Cluster.at(Path(directory).absolute())
    with _locked(cluster.directory, _keeper.START_LOCK, fcntl.LOCK_EX):
        cluster.create({**SETTINGS, **(settings or {})})
        cluster.ensure_running()
        hold = _acquire(cluster.directory, _keeper.USERS_LOCK, fcntl.LOCK_SH)
        cluster.ensure_kept()
    return EmbeddedServer(cluster.directory, cluster.url, hold)


@contextlib.contextmanager
def temporary(*, settings: Mapping[str, str] | None = None) -> Iterator[EmbeddedServer]:
    """A new server for the length of a ``with`` block, of which nothing is left afterwards.

    Args:
        settings: as for ``start``; without any, the server does not sync to disk.

    Example:
        >>> import psycopg
        >>> from durable import embedded
        >>> with embedded.temporary() as server, psycopg.connect(server.url) as connection:
        ...     connection.execute("SELECT 6 * 7").fetchone()
        (42,)
    """
    directory = Path(tempfile.mkdtemp(prefix="durable-pg-"))
    directory.chmod(0o711)  # as root, the server runs as somebody else
    fast = {"fsync": "off", "full_page_writes": "off"}
    try:
        with start(directory, settings=fast if settings is None else settings) as server:
            yield server
        wait_stopped(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def wait_stopped(directory: str | os.PathLike[str]) -> None:
    """Wait until the server of a directory has stopped, after its last user closed it.

    Raises:
        DatabaseUnavailable: somebody still uses it after two minutes.
    """
    # The keeper lets this lock go when it has stopped the server.
    with _locked(Path(directory).absolute(), _keeper.KEEPER_LOCK, fcntl.LOCK_EX):
        pass


@contextlib.contextmanager
def _locked(directory: Path, name: str, mode: int) -> Iterator[None]:
    descriptor = _acquire(directory, name, mode)
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(directory: Path, name: str, mode: int) -> int:
    """Wait for a lock by asking again and again, so that a gevent hub is not blocked."""
    descriptor = _keeper.open_lock(directory, name)
    deadline = time.monotonic() + LOCK_TIMEOUT
    while not _keeper.try_lock(descriptor, mode):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise DatabaseUnavailable(
                f"Another process holds {directory / name} for more than {LOCK_TIMEOUT:g} s: "
                f"see who does with: fuser {directory / name}"
            )
        time.sleep(POLL_SECONDS)
    return descriptor
