"""What a setting accepts: how it is read, and how that is said in an error or a table.

A kind reads the native value (``app.conf``, keywords) and its text
(environment variables, settings that were themselves read from one).
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from durable.durations import parse_duration
from durable.errors import DurableError

if TYPE_CHECKING:
    from collections.abc import Callable

EMBEDDED = "embedded"
AUTO = "auto"
OFF = "off"
#: A message's priority is one byte in AMQP.
HIGHEST_PRIORITY = 255
NO = frozenset({"0", "false", "no", "off"})
YES = frozenset({"1", "true", "yes", "on"})

#: ``password=...`` of a keyword string or a URL's query, quoted or not, also unterminated.
SECRET_WORD = re.compile(
    r"""(password\s*=\s*)(?:'(?:[^'\\]|\\.)*(?:'|$)|(?:\\.|[^\s&'"])*)""", re.IGNORECASE
)
#: ``user:password@``, up to the last ``@``: an unescaped one may be part of the password.
SECRET_IN_URL = re.compile(r"(://[^:/@\s]*:).*@", re.DOTALL)
KEYWORD_STRING = re.compile(r"\s*[a-z_]+\s*=")


class RefusedError(ValueError):
    """A value is not accepted; the message, if any, adds why to what is accepted."""


@dataclass(frozen=True)
class Kind:
    """One sort of setting.

    Attributes:
        accepts: the accepted values in words, for errors and for the docs.
        read: gives the value to use, or raises ``RefusedError``.
        takes_none: whether ``None`` is a value, rather than "not set".
        secret: whether the value is never shown.
    """

    accepts: str
    read: Callable[[object], object]
    takes_none: bool = False
    secret: bool = False


def seconds(least: float, most: float) -> Kind:
    """A duration, read as seconds."""
    accepts = f'timedelta, seconds or text such as "90s", from {least:g} to {most:g} s'

    def read(value: object) -> float:
        duration = _seconds(value)
        if not least <= duration <= most:
            raise RefusedError
        return duration

    return Kind(accepts, read)


def _seconds(value: object) -> float:
    if isinstance(value, bool):
        raise RefusedError
    try:
        bare = float(value) if isinstance(value, str) else value
    except ValueError:
        bare = value
    try:
        return parse_duration(bare, name="setting").total_seconds()
    except (DurableError, TypeError, ValueError, OverflowError):
        raise RefusedError from None


def whole(least: int, most: int, *, zero_is_none: bool = False) -> Kind:
    """A whole number; with ``zero_is_none`` 0 and None are the same and read as None."""
    accepts = f"whole number from {least} to {most}" + (" or None" if zero_is_none else "")

    def read(value: object) -> int | None:
        if zero_is_none and (value is None or value == "none"):
            return None
        number = _whole(value)
        if not least <= number <= most:
            raise RefusedError
        return None if zero_is_none and number == 0 else number

    return Kind(accepts, read, takes_none=zero_is_none)


def _whole(value: object) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise RefusedError from None
    if isinstance(value, bool) or not isinstance(value, int):
        raise RefusedError
    return value


def priority() -> Kind:
    """A message's priority, or a word that stands for one."""

    def read(value: object) -> int | str:
        word = value.strip().lower() if isinstance(value, str) else ""
        if word in {AUTO, OFF}:
            return word
        number = _whole(value)
        if not 0 <= number <= HIGHEST_PRIORITY:
            raise RefusedError
        return number

    return Kind(f"whole number from 0 to {HIGHEST_PRIORITY}, `{AUTO}` or `{OFF}`", read)


def flag() -> Kind:
    """True or false."""

    def read(value: object) -> bool:
        if isinstance(value, bool):
            return value
        word = value.strip().lower() if isinstance(value, str) else ""
        if word not in YES | NO:
            raise RefusedError
        return word in YES

    return Kind('True or False (as text "true", "false", "1", "0", "yes", "no", "on", "off")', read)


def text(*, most: int) -> Kind:
    """A short printable name."""

    def read(value: object) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= most or not value.isprintable():
            raise RefusedError
        return value

    return Kind(f"text of 1 to {most} printable characters", read)


def path() -> Kind:
    """A directory."""

    def read(value: object) -> str:
        given = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(given, str) or not given.strip() or "\0" in given:
            raise RefusedError
        return given

    return Kind("path, from the working directory when relative", read)


def modules() -> Kind:
    """Names of importable packages."""

    def read(value: object) -> tuple[str, ...]:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)):
            raise RefusedError
        return tuple(_module(name) for name in names)

    return Kind('list of package names (as text "shop.errors,stripe")', read)


def _module(name: object) -> str:
    bare = name.strip() if isinstance(name, str) else ""
    if not all(part.isidentifier() for part in bare.split(".")):
        raise RefusedError
    return bare


class Hidden(tuple[str, ...]):
    """Texts that do not show: not in the repr of settings, of a local variable, of an error."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} hidden>"

    __str__ = __repr__


def fernet_keys() -> Kind:
    """Keys for encryption: nothing of a refused one is shown."""

    def read(value: object) -> Hidden:
        keys = value.split(",") if isinstance(value, str) else value
        if not isinstance(keys, (list, tuple)):
            raise RefusedError
        return Hidden(_fernet_key(key, number) for number, key in enumerate(keys, 1))

    return Kind(
        "list of Fernet keys, as `cryptography.fernet.Fernet.generate_key()` makes them"
        " (as text, with commas between them)",
        read,
        secret=True,
    )


_FERNET_KEY_BYTES = 32


def _fernet_key(key: object, number: int) -> str:
    bare = key.decode("ascii", "replace") if isinstance(key, bytes) else key
    why = f"key {number} is not 32 bytes in URL-safe base64"
    if not isinstance(bare, str):
        raise RefusedError(why)
    try:
        raw = base64.b64decode(bare.strip(), altchars=b"-_", validate=True)
    except ValueError:
        raise RefusedError(why) from None
    if len(raw) != _FERNET_KEY_BYTES:
        raise RefusedError(why)
    return bare.strip()


def names() -> Kind:
    """Names of fields and arguments."""

    def read(value: object) -> tuple[str, ...]:
        given = value.split(",") if isinstance(value, str) else value
        if not isinstance(given, (list, tuple, set, frozenset)):
            raise RefusedError
        if not all(isinstance(name, str) and any(map(str.isalnum, name)) for name in given):
            raise RefusedError
        return tuple(name.strip() for name in given)

    return Kind('list of names (as text "password,card_number")', read)


def postgres_url() -> Kind:
    """A Postgres: URL, libpq keywords, or ``embedded``. Read as libpq takes it."""
    accepts = (
        "`postgresql://` or `postgres://` URL, libpq keywords such as "
        f"`host=db dbname=shop`, or `{EMBEDDED}`"
    )

    def read(value: object) -> str:
        if not isinstance(value, str):
            why = f"it is a {type(value).__name__}, not text"
            raise RefusedError(why)
        url = value.strip()
        return url if url == EMBEDDED else _conninfo(url)

    return Kind(accepts, read)


def _conninfo(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not KEYWORD_STRING.match(url):
            raise RefusedError
        return url
    if re.search(r"[\s=]", scheme):  # libpq keywords that have "://" in a value
        return url
    database, _, driver = scheme.lower().partition("+")
    if database not in {"postgresql", "postgres"}:
        why = f"runs are kept in Postgres; {scheme}:// is something else"
        raise RefusedError(why)
    if driver not in {"", "psycopg"}:
        why = f"the driver is psycopg 3; write postgresql:// instead of {scheme}://"
        raise RefusedError(why)
    return f"postgresql://{rest}"


def mask_secrets(shown: str) -> str:
    """Hide what looks like a password in text that goes into an error.

    >>> mask_secrets("postgresql://shop:s3cret@db/shop")
    'postgresql://shop:***@db/shop'
    >>> mask_secrets("host=db password='s3 cret' dbname=shop")
    'host=db password=*** dbname=shop'
    """
    return SECRET_WORD.sub(r"\1***", SECRET_IN_URL.sub(r"\1***@", shown))
