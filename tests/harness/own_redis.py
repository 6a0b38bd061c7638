"""A Redis server of one test alone, to stop, freeze and empty as it likes."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tests.harness.brokers import LocalBroker
from tests.harness.services import missing
from tests.harness.waiting import wait_for


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class OwnRedis(LocalBroker):
    """A ``redis-server`` in memory on a free port."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            missing("there is no program redis-server")
        self._port = free_port()
        directory.mkdir()
        self._command = [str(program), "--port", str(self._port), "--bind", "127.0.0.1"]
        self._command += ["--save", "", "--dir", str(directory)]
        super().__init__("own_redis", f"redis://127.0.0.1:{self._port}/0")
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(self._listens, what="redis-server to listen")

    def stop(self) -> None:
        """Kill it; it forgets everything."""
        self._process.kill()
        self._process.wait()

    def stall(self) -> None:
        """Freeze it: connections are taken by the system, and nobody answers."""
        self._process.send_signal(signal.SIGSTOP)

    def go(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def empty(self, queue: str | None = None) -> int:
        """Forget everything there is, queues, bindings and all."""
        import redis

        with redis.Redis(port=self._port) as client:
            count = int(client.llen(queue or self.queue))
            client.flushall()
        return count

    def teardown(self) -> None:
        self.stop()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0
