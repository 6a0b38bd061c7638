"""Stored exceptions: what a step or run failed with, as JSON that SQL can read too.

The text is an object with these keys:

==============  ==================================================================
``type``        ``"tasks.orders:CardDeclined"``, module and qualified name
``message``     ``str()`` of the exception
``rebuild``     whether the class is imported and made again; otherwise a
                :class:`~durable.errors.StepError` stands for it
``call``        made again by calling the class, or without its ``__init__``
``args``        its arguments, null if the codec cannot store them
``attributes``  those of its attributes that the codec can store
``notes``       what ``add_note()`` added
``traceback``   text, the last 16 KiB; no values of local variables
``causes``      ``type``, ``message`` and ``link`` (``"cause"`` or ``"context"``) of
                what led to it, nearest first
==============  ==================================================================

``rebuild`` is decided once, when the exception is stored. A caller raises
``decode_failure(encode_failure(...))`` on the first run too, so that replays
see the same exception.
"""

from __future__ import annotations

import json
import traceback
from typing import TYPE_CHECKING, Any

from durable._classes import NotImportable, class_name, find_class, full_name
from durable.errors import PayloadError, StepError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from durable.codec import Codec

#: Trusted in every app. ``SoftTimeLimitExceeded`` and its like really live in the last.
ALWAYS_TRUSTED = ("builtins", "durable.errors", "celery.exceptions", "billiard.exceptions")

_HEADER = "Traceback of the attempt that failed:\n"
_OWN_ATTRIBUTES = frozenset(("__notes__", "durable_traceback", "durable_settled"))

# In characters. Together they stay far below any sensible limit on payloads.
_MESSAGE, _TRACEBACK, _NOTE, _CAUSE = 8_192, 16_384, 1_024, 1_024
_MOST_NOTES, _MOST_CAUSES = 16, 8


def encode_failure(exc: BaseException, codec: Codec, *, trusted_packages: Sequence[str]) -> str:
    """Turn an exception into JSON text. Whatever the exception does, this raises nothing.

    Args:
        exc: the exception as it was caught.
        codec: encodes arguments and attributes, and limits the size.
        trusted_packages: packages or modules, such as ``"tasks"`` or
            ``"stripe.error"``, from which exceptions are rebuilt by import,
            besides :data:`ALWAYS_TRUSTED`.

    Example:
        >>> from durable.codec import Codec
        >>> text = encode_failure(KeyError("sku"), Codec(), trusted_packages=())
        >>> decode_failure(text, Codec())
        KeyError('sku')
    """
    try:
        return codec.seal(_encoded(exc, codec, trusted_packages))
    except Exception as error:  # noqa: BLE001 - a class that breaks even its own attributes
        message = f"<it cannot be described: {type(error).__name__}>"
        return codec.seal(_encoded_least(_type_of(exc), message, codec))


def decode_failure(text: str, codec: Codec) -> BaseException:
    """Turn stored text back into an exception, ready to be raised.

    Returns:
        The exception itself, or a :class:`~durable.errors.StepError` with its
        message and type name. Its ``durable_traceback`` is the text of the
        original traceback; a note repeats it for the logs.

    Raises:
        EncryptionError: it is encrypted, and the key is not known here.

    Example:
        >>> from durable.codec import Codec
        >>> decode_failure('{"type": "stripe:CardError", "message": "declined"}', Codec())
        StepError('declined', 'stripe.CardError')
    """
    record = _read(text, codec)
    exc: BaseException | None = None
    if record.get("rebuild") is True:
        try:
            exc = _rebuilt(record)
        except Exception:  # noqa: BLE001 - code that has changed since; the stand-in says it all
            exc = None
    if exc is None:
        type_name = str(record.get("type") or "").replace(":", ".")
        exc = StepError(str(record.get("message") or ""), type_name)
    _attach(exc, record)
    return exc


# --- writing -----------------------------------------------------------------


def _encoded(exc: BaseException, codec: Codec, trusted_packages: Sequence[str]) -> str:
    record = _describe(exc)
    if _is_trusted(type(exc), trusted_packages):
        attributes = _storable_attributes(exc, codec)
        for call, args in ((True, _call_args(exc)), (False, exc.args)):
            rebuild = {"rebuild": True, "call": call, "args": list(args), "attributes": attributes}
            text = _encoded_if_it_fits({**record, **rebuild}, codec)
            if text is not None and _comes_back(exc, text, codec):
                return text
    return _encoded_to_stand_in(record, exc, codec)


def _describe(exc: BaseException) -> dict[str, Any]:
    """What can be said of any exception; all of it safe to store."""
    return {
        "type": _type_of(exc),
        "message": _clean(_text_of(exc), _MESSAGE),
        "rebuild": False,
        "call": False,
        "args": None,
        "attributes": {},
        "notes": [_clean(note, _NOTE) for note in _notes(exc)[:_MOST_NOTES]],
        "traceback": _traceback(exc),
        "causes": list(_causes(exc)),
    }


def _encoded_to_stand_in(record: dict[str, Any], exc: BaseException, codec: Codec) -> str:
    """As much of the exception as is storable and fits."""
    args = list(exc.args)
    extras = {
        "args": args if _is_storable(args, codec) else None,
        "attributes": _storable_attributes(exc, codec),
    }
    brief = {"traceback": _tail(record["traceback"], _NOTE), "notes": [], "causes": []}
    for attempt in ({**record, **extras}, record, {**record, **brief}):
        text = _encoded_if_it_fits(attempt, codec)
        if text is not None:
            return text
    return _encoded_least(record["type"], record["message"], codec)


def _encoded_if_it_fits(record: dict[str, Any], codec: Codec) -> str | None:
    try:
        return codec.encode(record, "an exception", keep_tuples=True, secret=False)
    except PayloadError:
        return None


def _encoded_least(type_name: str, message: str, codec: Codec) -> str:
    # A character takes six bytes at worst; this is half of the smallest limit.
    most = codec.max_bytes // 25
    least = {"type": type_name[-most:], "message": _clean(message, most), "rebuild": False}
    return codec.encode(least, "an exception", secret=False)


def _is_trusted(cls: type, packages: Sequence[str]) -> bool:
    try:
        class_name(cls)
    except NotImportable:
        return False
    module = f"{cls.__module__}."
    return any(module.startswith(f"{package}.") for package in (*ALWAYS_TRUSTED, *packages))


def _call_args(exc: BaseException) -> tuple[Any, ...]:
    """What the exception asks pickle to call its class with.

    Mostly its ``args``; but an OSError adds the file name, and a class whose
    ``__init__`` takes something else says so there.
    """
    try:
        reduced: Any = exc.__reduce__()
        made_by, args = reduced[:2]
    except Exception:  # noqa: BLE001 - the class's own code
        return exc.args
    return args if made_by is type(exc) else exc.args


def _comes_back(exc: BaseException, text: str, codec: Codec) -> bool:
    try:
        again = _rebuilt(codec.decode(text))
        return type(again) is type(exc) and again.args == exc.args and str(again) == str(exc)
    except Exception:  # noqa: BLE001 - the class's own code
        return False


def _storable_attributes(exc: BaseException, codec: Codec) -> dict[str, Any]:
    return {
        name: value
        for name, value in exc.__dict__.items()
        if name not in _OWN_ATTRIBUTES and _is_storable({name: value}, codec)
    }


def _is_storable(value: object, codec: Codec) -> bool:
    try:
        codec.encode(value, "an exception", keep_tuples=True, secret=False)
    except Exception:  # noqa: BLE001 - a RecursionError as well as a refusal
        return False
    return True


def _type_of(exc: BaseException) -> str:
    return _storable_text(f"{type(exc).__module__}:{type(exc).__qualname__}")


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception as error:  # noqa: BLE001 - the class's own code
        return f"<str() of this {full_name(type(exc))} raised {type(error).__name__}>"


def _notes(exc: BaseException) -> list[str]:
    """The user's notes; ours are made again from the traceback at every reading."""
    notes = exc.__dict__.get("__notes__")  # as add_note() of Python 3.11 stores them
    if not isinstance(notes, (list, tuple)):
        return []
    return [n for n in notes if isinstance(n, str) and not n.startswith(_HEADER)]


def _traceback(exc: BaseException) -> str:
    """Text of the traceback, after that of an earlier life of the exception."""
    try:
        formatted = traceback.TracebackException.from_exception(exc)
        if getattr(formatted, "__notes__", None):
            vars(formatted)["__notes__"] = _notes(exc)
        text = "".join(formatted.format())
    except Exception as error:  # noqa: BLE001 - __str__, __repr__ and source files of others
        text = f"<the traceback could not be formatted: {type(error).__name__}>\n"
    earlier = exc.__dict__.get("durable_traceback")
    if isinstance(earlier, str) and earlier:
        text = f"{earlier.rstrip()}\n\nraised again:\n\n{text}"
    return _tail(_storable_text(text), _TRACEBACK)


def _causes(exc: BaseException) -> Iterator[dict[str, str]]:
    seen = {id(exc)}
    for _ in range(_MOST_CAUSES):
        nearest, link = exc.__cause__, "cause"
        if nearest is None and not exc.__suppress_context__:
            nearest, link = exc.__context__, "context"
        if nearest is None or id(nearest) in seen:
            return
        seen.add(id(nearest))
        exc = nearest
        yield {"type": _type_of(exc), "message": _clean(_text_of(exc), _CAUSE), "link": link}


def _storable_text(text: str) -> str:
    """The text without what Postgres cannot store."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _clean(text: str, most: int) -> str:
    text = _storable_text(text)
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most} more characters)"


def _tail(text: str, most: int) -> str:
    return text if len(text) <= most else f"({len(text) - most} characters cut) ...{text[-most:]}"


# --- reading -----------------------------------------------------------------


def _read(text: str, codec: Codec) -> dict[str, Any]:
    try:
        record = codec.decode(text)
    except PayloadError:  # the class of an argument was moved, say
        try:
            record = {**json.loads(codec.open(text)), "rebuild": False}
        except (ValueError, TypeError):
            record = text
    return record if isinstance(record, dict) else {"message": str(record)}


def _rebuilt(record: dict[str, Any]) -> BaseException:
    cls: Any = find_class(record["type"])
    if not issubclass(cls, BaseException):
        raise TypeError(f"{cls} is not an exception")
    args = tuple(record["args"])
    if record["call"]:
        exc = cls(*args)
    else:
        exc = cls.__new__(cls, *args)
        exc.args = args
    exc.__dict__.update(record["attributes"])
    return exc  # type: ignore[no-any-return]


def _attach(exc: BaseException, record: dict[str, Any]) -> None:
    text = str(record.get("traceback") or "")
    notes = [str(note) for note in record.get("notes") or ()]
    # Written as add_note() does it, for Python 3.10 as well: pytest and Sentry look there.
    exc.__dict__["__notes__"] = [*notes, _HEADER + text] if text else notes
    exc.__dict__["durable_traceback"] = text
