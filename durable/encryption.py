"""Encryption of what is stored: a value's JSON text becomes one Fernet token.

It is stored as ``{"__type__":"durable:encrypted","__key__":"5f0e1c2d","__value__":"gAAA..."}``,
so it stays valid JSON, and SQL can tell it from plain text and by which key it
was made. The name of a key is a digest that says nothing about the key. No
value of a user looks like this: the codec writes a dict with a ``__type__`` of
its own in another form.

Rows are copied within SQL, from an event into a step, from a child into its
parent, and gathered into arrays. So a token is bound to no place, and one is
found at whatever depth of a stored value.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from durable._codec_types import TYPE, VALUE
from durable.errors import ConfigurationError, EncryptionError

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

MARKER = "durable:encrypted"
KEY = "__key__"

#: What text with a token in it has in it; other text with this in it is looked at closer.
SEALED = f'"{MARKER}"'

#: Why a worker leaves a run that it lacks a key for, and for how long, in seconds.
LOCKED_OUT = "a worker could not decrypt it"
LOCKED_OUT_REST = 30.0

_WHOLE = re.compile(
    rf'\{{"{TYPE}":"{MARKER}","{KEY}":"([0-9a-f]+)","{VALUE}":"([A-Za-z0-9_=-]+)"\}}'
)
_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Keyring:
    """The keys of an app: the first one writes, every one reads.

    Args:
        keys: Fernet keys, 32 bytes in URL-safe base64 each.
        writes: whether new values are encrypted; else the keys are for reading.

    Raises:
        ConfigurationError: the package `cryptography` is missing.

    Example:
        >>> old, new = "b2xk" * 10 + "b2s=", "bmV3" * 10 + "bmU="
        >>> token = Keyring([old]).seal('{"iban":"DE02"}')
        >>> Keyring([new, old]).open(token)
        '{"iban":"DE02"}'
        >>> Keyring([new]).open(token)
        Traceback (most recent call last):
            ...
        durable.errors.EncryptionError: it is encrypted with the key cd28109c, which is not among \
the durable_encryption_keys of this process (it has the key eb0f21fb): add that key to the list
    """

    __slots__ = ("_fernets", "current", "writes")

    def __init__(self, keys: Sequence[str], *, writes: bool = True) -> None:
        fernet = _fernet()
        self._fernets: dict[str, Fernet] = {name_of(key): fernet(key) for key in keys}
        self.current = next(iter(self._fernets))
        self.writes = writes

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._fernets)})"

    def prefix(self) -> str:
        """Return how the text of each value begins that the first key has encrypted."""
        return f'{{"{TYPE}":"{MARKER}","{KEY}":"{self.current}"'

    def seal(self, text: str) -> str:
        """Encrypt JSON text; the result is JSON text."""
        token = self._fernets[self.current].encrypt(text.encode()).decode("ascii")
        return f'{self.prefix()},"{VALUE}":"{token}"}}'

    def open(self, text: str) -> str:
        """Return JSON text with all in it that is encrypted made plain again.

        Raises:
            EncryptionError: a key is missing, or a token was tampered with.
        """
        return opened(text, self)

    def read(self, key: str, token: str) -> str:
        """Decrypt a token that the key of this name has made."""
        fernet = self._fernets.get(key)
        if fernet is None:
            raise missing(key, self._fernets)
        from cryptography.fernet import InvalidToken

        try:
            return fernet.decrypt(token).decode()
        except InvalidToken:
            raise EncryptionError(
                f"it is encrypted with the key {key}, which this process has, but it was changed"
                " since: restore that row from a backup"
            ) from None


def opened(text: str, keyring: Keyring | None) -> str:
    """Return JSON text with all in it that is encrypted made plain again."""
    if SEALED not in text:
        return text
    read = _no_key if keyring is None else keyring.read
    whole = _WHOLE.fullmatch(text)
    if whole is not None:
        return read(whole[1], whole[2])

    def plain(found: dict[str, Any]) -> Any:
        if found.get(TYPE) != MARKER:
            return found
        return json.loads(read(str(found.get(KEY)), str(found.get(VALUE))))

    return _dump(json.loads(text, object_hook=plain))


def name_of(key: str) -> str:
    """Return the name by which stored values call a key.

    Example:
        >>> name_of("b2xk" * 10 + "b2s=")
        'cd28109c'
    """
    return hmac.digest(key.encode(), b"celery-durable: name of a key", hashlib.sha256)[:4].hex()


def missing(key: str, known: Sequence[str] | dict[str, Any]) -> EncryptionError:
    """Make the error for a key that is not there."""
    names = ", ".join(known)
    has = f"it has the key{'s' if len(known) > 1 else ''} {names}" if known else "it has none"
    return EncryptionError(
        f"it is encrypted with the key {key}, which is not among the durable_encryption_keys of"
        f" this process ({has}): add that key to the list"
    )


def _no_key(key: str, _token: str) -> str:
    raise missing(key, ())


def _fernet() -> type[Fernet]:
    try:
        from cryptography.fernet import Fernet
    except ImportError as exc:
        raise ConfigurationError(
            "durable_encryption_keys is set, and the package cryptography is not installed:"
            ' pip install "celery-durable[encryption]"'
        ) from exc
    return Fernet
