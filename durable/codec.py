r"""Values as JSON text: what is stored is what the user gets, on the first run and on replays.

================================================  =====================================
value                                             comes back as
================================================  =====================================
None, bool, int, float, str, list, dict           itself: big ints and floats exact
tuple, named tuple                                list; a tuple inside a set, a
                                                  dataclass or an exception stays one
OrderedDict, defaultdict, Counter                 dict
datetime, date, time, UUID, Decimal, bytes        itself; of a time zone, the offset
their subclasses                                  the plain type, if equal; else refused
what ``kombu.utils.json.register_type`` added     as registered
what has ``__json__()``                           what that returns
timedelta, set, frozenset                         itself
enum member                                       the same member, found by its name
dataclass                                         an equal one, made by calling its class
pydantic v2 model                                 an equal one, validated from its JSON
``durable.Secret``, pydantic's secrets            itself, with its value
other subclasses of str, int, float, dict, list   refused
NaN, infinities, ``\u0000``, lone surrogates       refused
keys that are not exactly str                     refused
circular, too deep or too large values            refused
anything else                                     refused
================================================  =====================================

Where the middle of the table changes a type, it does so before anybody sees
the value: the first run, too, works with what comes back. A refusal is a
:class:`~durable.errors.PayloadError` that names the element and the fix.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from durable._codec_types import TYPE, Refusal
from durable._codec_walk import MAX_DEPTH, SCALARS, Walk, from_json, to_json
from durable.encryption import SEALED, Keyring, opened
from durable.errors import EncryptionError, OptionError, PayloadError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")

_LEAST_BYTES = 1024


class Codec:
    """Turns values into JSON text and back.

    Args:
        max_bytes: largest text, in bytes of UTF-8 before encryption; at least 1024.
        keyring: encrypts what is encoded, if it is to, and decrypts what is decoded.

    Example:
        >>> from decimal import Decimal
        >>> codec = Codec()
        >>> text = codec.encode({"price": Decimal("9.90")}, "result of step 'quote'")
        >>> text
        '{"price":{"__type__":"decimal","__value__":"9.90"}}'
        >>> codec.decode(text)
        {'price': Decimal('9.90')}
        >>> codec.encode({"prices": [1, {2: 3}]}, "result of step 'quote'")
        Traceback (most recent call last):
            ...
        durable.errors.PayloadError: result of step 'quote' cannot be stored: \
$.prices[1]: the key 2 is of type int; use a string key.
    """

    __slots__ = ("_sealing", "keyring", "max_bytes")

    def __init__(self, *, max_bytes: int = 1_048_576, keyring: Keyring | None = None) -> None:
        if type(max_bytes) is not int or max_bytes < _LEAST_BYTES:
            raise OptionError(
                f"max_bytes={max_bytes!r} is not a number of bytes; "
                f"give an int of at least {_LEAST_BYTES}."
            )
        self.max_bytes = max_bytes
        self.keyring = keyring
        self._sealing = keyring if keyring is not None and keyring.writes else None

    @property
    def encrypts(self) -> bool:
        """Whether what is encoded is encrypted too."""
        return self._sealing is not None

    def encode(
        self, value: object, what: str, *, keep_tuples: bool = False, secret: bool = True
    ) -> str:
        """Turn a value into JSON text.

        Args:
            value: what to store.
            what: what the value is, for the error: ``"result of step 'charge'"``.
            keep_tuples: store tuples in a form of their own, instead of as lists.
            secret: whether it is a user's data, which is encrypted if there are keys.

        Raises:
            PayloadError: the value cannot be stored without changing it, or is
                larger than ``max_bytes``.
        """
        try:
            text = _encode_plain(value)
            if text is None:
                text = to_json(Walk(keep_tuples=keep_tuples).to_plain(value))
            self._check_size(text)
        except Refusal as refusal:
            path = "$" + "".join(reversed(refusal.path))
            raise _payload_error(f"{what} cannot be stored: {path}", refusal) from refusal.__cause__
        return text if self._sealing is None or not secret else self._sealing.seal(text)

    def decode(self, text: str) -> Any:
        """Turn stored text back into the value.

        Raises:
            PayloadError: the text is no JSON, or a type in it is not known here
                (its class was moved, or not registered in this process).
            EncryptionError: it is encrypted, and the key is not known here.

        Example:
            >>> Codec().decode('{"__type__":"enum:http:HTTPStatus","__value__":"OK"}')
            <HTTPStatus.OK: 200>
        """
        try:
            # Without a marker in it the text needs no hook, and reads four times as fast.
            return from_json(self.open(text)) if TYPE in text else json.loads(text)
        except Refusal as refusal:
            raise _payload_error("a stored value cannot be read", refusal) from refusal.__cause__
        except (ValueError, RecursionError) as error:
            raise PayloadError(f"a stored value cannot be read: {error}.") from error

    def seal(self, text: str) -> str:
        """Encrypt JSON text if there are keys for it.

        Example:
            >>> Codec().seal("[1]")
            '[1]'
        """
        return text if self._sealing is None else self._sealing.seal(text)

    def open(self, text: str) -> str:
        """Decrypt what is encrypted in stored JSON text; values stay encoded.

        Raises:
            EncryptionError: the key is not known here.
        """
        return opened(text, self.keyring) if SEALED in text else text

    def reseal(self, text: str) -> str:
        """Return stored JSON text as it would be stored now: by the newest key, or plain."""
        return self.seal(self.open(text))

    def seal_text(self, text: str) -> str:
        """Encrypt text for a column of texts, such as the reason of a refused event."""
        return text if self._sealing is None else self._sealing.seal(json.dumps(text))

    def open_text(self, text: str) -> str:
        """Undo `seal_text`.

        Raises:
            EncryptionError: the key is not known here.
        """
        return str(json.loads(self.open(text))) if SEALED in text else text

    def readable(self, row: R, *columns: str, texts: Sequence[str] = ()) -> R:
        """Decrypt fields of a row for people; what has no key here stays as it is.

        Args:
            row: a dataclass.
            *columns: its fields of JSON text, or None.
            texts: those that `seal_text` has made.
        """
        plain = {}
        for name in (*columns, *texts):
            text = getattr(row, name)
            if text is not None and SEALED in text:
                with suppress(EncryptionError):
                    plain[name] = self.open_text(text) if name in texts else self.open(text)
        return dataclasses.replace(row, **plain) if plain else row

    def _check_size(self, text: str) -> None:
        size = len(text) if text.isascii() else len(text.encode())
        if size > self.max_bytes:
            raise Refusal(
                f"it is {size} bytes as JSON, more than the limit of {self.max_bytes}",
                "keep the data elsewhere and store a reference to it, or raise "
                "durable_max_payload_bytes",
            )


def _payload_error(what: str, refusal: Refusal) -> PayloadError:
    return PayloadError(f"{what}: {refusal.problem}; {refusal.fix}.")


def _encode_plain(value: object) -> str | None:
    """JSON text of a value that is plain throughout; None when it needs a closer look."""
    if not _is_plain(value, MAX_DEPTH):
        return None
    try:
        text = to_json(value)
        if not text.isascii():
            text.encode()  # refuses lone surrogates
    except ValueError:  # NaN, an infinity, an int too long for text, a lone surrogate
        return None
    return None if "\\u0000" in text else text  # NUL, or the user's own backslash and u0000


def _is_plain(value: Any, depth: int) -> bool:
    """Whether JSON gives back exactly this, but for NUL, surrogates, NaN and infinities.

    Types are compared, not asked with isinstance: the C encoder would write an
    IntEnum as a number, and a key of 1 as "1".
    """
    if depth == 0:
        return False
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str or (
                type(item) not in SCALARS and not _is_plain(item, depth - 1)
            ):
                return False
        return TYPE not in value
    if kind is list:
        if SCALARS.issuperset(map(type, value)):  # at the speed of C
            return True
        return all(type(item) in SCALARS or _is_plain(item, depth - 1) for item in value)
    return kind in SCALARS
