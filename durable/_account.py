"""Whom the embedded Postgres runs as, when this process runs as root."""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from durable.errors import ConfigurationError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Account:
    """Whom the server runs as; Postgres refuses to run as root."""

    uid: int
    gid: int
    name: str


def choose_account(data: Path) -> Account | None:
    """As root: the owner of the data, else ``postgres`` or ``nobody``; otherwise ourselves."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(FileNotFoundError):
        owner = data.stat().st_uid
        if owner != 0:
            return _account(pwd.getpwuid(owner))
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return _account(pwd.getpwnam(name))
    raise ConfigurationError(
        "Postgres does not run as root, and there is neither a user postgres nor nobody: "
        "start the program as another user."
    )


def _account(entry: pwd.struct_passwd) -> Account:
    return Account(entry.pw_uid, entry.pw_gid, entry.pw_name)


def open_way_to(path: Path, name: str) -> None:
    """Let others pass (not list) the directories above ``path``, and ``path`` itself."""
    for step in (*reversed(path.resolve().parents), path.resolve()):
        mode = step.stat().st_mode
        if step.is_dir() and not mode & 0o001:
            logger.warning("chmod o+x %s, so that Postgres can run as %s", step, name)
            step.chmod(mode | 0o001)


def open_tree(root: Path) -> None:
    """Let others read what ``pip`` installed under a strict umask."""
    for path in (root, *root.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(mode | 0o004 | (0o001 if mode & 0o100 else 0))
