"""A background duty: one thread that does one thing again and again."""

from __future__ import annotations

import threading

from celery.utils.log import get_logger

from durable.errors import StoreError
from durable.store.errors import translated

logger = get_logger(__name__)


class Duty:
    """Runs `tick` every `interval` seconds in a daemon thread until stopped.

    An error in one tick is logged and does not end the duty: a database that
    is away comes back.

    Args:
        name: of the thread.
        interval: seconds between the starts of two pauses.
    """

    def __init__(self, name: str, interval: float) -> None:
        self.name = name
        self.interval = interval
        self._stopping = threading.Event()
        self._complaint: str | None = None
        self._thread: threading.Thread | None = None

    def tick(self) -> None:
        """Do it once."""
        raise NotImplementedError

    def pause(self) -> None:
        """Wait for the next tick."""
        self._stopping.wait(self.interval)

    def recover(self) -> None:
        """Get ready for another try after an error, such as by dropping a connection."""

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Ask the thread to end and wait for it; it ends at the next pause."""
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    @property
    def stopping(self) -> bool:
        """Whether the duty was asked to end."""
        return self._stopping.is_set()

    def _run(self) -> None:
        while not self.stopping:
            try:
                with translated():
                    self.tick()
            except Exception as exc:  # noqa: BLE001 - a duty outlives its errors
                self._complain(exc)
                self._stopping.wait(min(self.interval, 1.0))
                continue
            if self._complaint is not None:
                logger.warning("%s: works again", self.name)
                self._complaint = None
            self.pause()

    def _complain(self, exc: Exception) -> None:
        """Log the first of a row of errors at length, others in a line, and repeats not at all."""
        if str(exc) != self._complaint:
            brief = isinstance(exc, StoreError) or self._complaint is not None
            logger.warning("%s: %s", self.name, exc, exc_info=None if brief else exc)
        self._complaint = str(exc)
        try:
            self.recover()
        except Exception:
            logger.debug("%s: recovering from that failed too", self.name, exc_info=True)
