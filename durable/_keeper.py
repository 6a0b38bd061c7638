"""Stops the embedded Postgres when no process uses it any more.

Each process that uses the server holds a shared lock on a file. The kernel
takes it away however the process ends, so neither a SIGKILL nor a forked
child that exits early can mislead this program: it waits for the exclusive
lock, and whoever gets that is alone.

``durable.embedded`` starts it with a bare interpreter, which is why nothing
but the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Held while the server is being started or stopped.
START_LOCK = "postgres.start.lock"
#: Held shared by every process that uses the server.
USERS_LOCK = "postgres.users.lock"
#: Held by the keeper while it lives, so that there is one.
KEEPER_LOCK = "postgres.keeper.lock"

STOP_SECONDS = 60


def open_lock(directory: Path, name: str) -> int:
    """Open a lock file of ``directory`` and return its descriptor, without locking it."""
    return os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def try_lock(descriptor: int, mode: int) -> bool:
    """Take a lock unless somebody holds it; ``mode`` is ``fcntl.LOCK_SH`` or ``LOCK_EX``."""
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class Duty:
    """What the keeper is told by whoever starts it, as JSON on its command line.

    Attributes:
        directory: where the lock files are.
        keeper: descriptor of the keeper's lock. The starter has taken it and
            hands it down, so that there is no moment with a server and no keeper.
        stop: the command that stops the server and waits for its end.
        account: user and group id to stop it as, when this runs as root.
        litter: an empty directory to remove afterwards.
    """

    directory: str
    keeper: int
    stop: Sequence[str]
    account: tuple[int, int] | None = None
    litter: str | None = None


def keep(duty: Duty) -> None:
    """Wait until nobody uses the server, then stop it."""
    users = open_lock(Path(duty.directory), USERS_LOCK)
    start = open_lock(Path(duty.directory), START_LOCK)
    while True:
        fcntl.flock(users, fcntl.LOCK_EX)
        # Let go before asking for the other lock: a starting process holds
        # that one and asks for this one.
        fcntl.flock(users, fcntl.LOCK_UN)
        fcntl.flock(start, fcntl.LOCK_EX)
        if try_lock(users, fcntl.LOCK_EX):
            break
        fcntl.flock(start, fcntl.LOCK_UN)
    _stop(duty)
    # In this order: whoever starts the server next must not see a keeper.
    os.close(duty.keeper)
    os.close(users)
    os.close(start)


def _stop(duty: Duty) -> None:
    user, group = duty.account or (None, None)
    subprocess.run(  # noqa: S603 - the wheel's own pg_ctl
        duty.stop,
        user=user,
        group=group,
        extra_groups=None if duty.account is None else (),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if duty.litter is not None:
        with contextlib.suppress(OSError):
            Path(duty.litter).rmdir()


def main(duty: Duty) -> None:
    """Go to the background, so that nobody has a child to wait for, and do the duty."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    keep(duty)


if __name__ == "__main__":
    main(Duty(**json.loads(sys.argv[1])))
