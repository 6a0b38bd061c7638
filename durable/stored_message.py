"""The ``message`` column: publish options in the clear, canvas encrypted.

A dispatcher rings runs of all workflows, maybe without the keys; it needs only
the options. The canvas, which has arguments of other tasks in it, is not sent
along: the claim takes it from the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kombu.utils.json import dumps as dump_message
from kombu.utils.json import loads as load_message

from durable.masking import HIDDEN

if TYPE_CHECKING:
    from durable.codec import Codec

#: What is filled in from the row at the claim, and not sent along.
CANVAS = ("link", "link_error", "chain", "chord")
#: Where it is when it is encrypted: JSON text in a string, which every loader leaves alone.
SEALED = "sealed"
#: Texts that show arguments to people.
REPRS = ("argsrepr", "kwargsrepr")


def dumped(message: Mapping[str, Any], codec: Codec) -> str:
    """Turn publish options and canvas into what the column holds.

    Example:
        >>> from durable.codec import Codec
        >>> dumped({"queue": "orders", "link": [{"task": "ship"}]}, Codec())
        '{"queue": "orders", "link": [{"task": "ship"}]}'
    """
    if not codec.encrypts:
        return str(dump_message(message))
    rest = {key: each for key, each in message.items() if key not in CANVAS}
    rest.update(dict.fromkeys(rest.keys() & set(REPRS), HIDDEN))
    canvas = {key: message[key] for key in CANVAS if message.get(key)}
    if canvas:
        rest[SEALED] = codec.seal(str(dump_message(canvas)))
    return str(dump_message(rest))


def loaded(text: str, codec: Codec) -> dict[str, Any]:
    """Read the column, canvas included.

    Raises:
        EncryptionError: the key of the canvas is not known here.

    Example:
        >>> from durable.codec import Codec
        >>> loaded('{"queue": "orders"}', Codec())
        {'queue': 'orders'}
    """
    message: dict[str, Any] = load_message(text)
    sealed = message.pop(SEALED, None)
    if sealed is not None:
        message.update(load_message(codec.open(sealed)))
    return message
