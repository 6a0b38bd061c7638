"""A TCP proxy that can stand still, as a server or a network does that says nothing more."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Passes bytes between its port and a server's until told to stall.

    Args:
        host: of the server.
        port: of the server.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._server = (host, port)
        self._going = threading.Event()
        self._going.set()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Hold every byte back; new connections are taken and get no answer."""
        self._going.clear()

    def go(self) -> None:
        """Pass on what was held back, and all that follows."""
        self._going.set()

    def close(self) -> None:
        self._going.set()
        for each in (self._listener, *self._sockets):
            _close(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._sockets.add(client)
        self._going.wait()
        try:
            server = socket.create_connection(self._server)
        except OSError:
            _close(client)
            return
        self._sockets.add(server)
        for ends in ((client, server), (server, client)):
            threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._going.wait()
                target.sendall(data)
        for each in (source, target):
            self._sockets.discard(each)
            _close(each)


def _close(each: socket.socket) -> None:
    """Close a socket that another thread may be reading from."""
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
