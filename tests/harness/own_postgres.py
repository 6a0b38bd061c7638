"""An embedded server that a test may stop, kill and start again as it likes."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from durable import embedded
from tests.harness.waiting import wait_for

#: For speed: what a test makes need not outlive the machine's power supply.
FAST: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}


def postmaster_pid(directory: Path) -> int | None:
    """Process id of the server that lives in ``directory``; None when there is none."""
    try:
        process = psutil.Process(
            int((directory / "postgres/postmaster.pid").read_text().split()[0])
        )
        return process.pid if process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, IndexError, psutil.NoSuchProcess):
        return None


class OwnPostgres:
    """A server in a directory of its own under the system's temporary directory.

    Attributes:
        url: the same over all stops and starts, so that clients can reconnect.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="durable-pg-"))
        self.directory.chmod(0o711)  # as root, the server runs as somebody else
        self._server = embedded.start(self.directory, settings=FAST)
        self.url = self._server.url

    @property
    def pid(self) -> int | None:
        return postmaster_pid(self.directory)

    def stop(self, mode: str = "fast") -> None:
        """Stop it: ``fast`` ends its connections, ``immediate`` is a crash with recovery after."""
        signals = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}
        assert self.pid is not None, "it is stopped already"
        os.kill(self.pid, signals[mode])
        wait_for(lambda: self.pid is None, timeout=30, what="Postgres to stop")

    def start(self) -> None:
        again = embedded.start(self.directory)
        self._server.close()
        self._server = again

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Give it up, wait until it has stopped, and remove what it stored."""
        self._server.close()
        embedded.wait_stopped(self.directory)
        shutil.rmtree(self.directory)
