"""Idempotency keys of start calls: read from the options, and what a conflict says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from durable.durations import parse_seconds
from durable.errors import IdempotencyConflict, OptionError, PayloadError
from durable.masking import HIDDEN
from durable.names import LONGEST_NAME, is_name
from durable.store.runs import Key

if TYPE_CHECKING:
    from durable.codec import Codec
    from durable.masking import Mask
    from durable.store.runs import NewRun

#: Options of `apply_async` that only a workflow can have.
EXACTLY_ONCE = ("idempotency_key", "idempotency_reuse", "idempotency_ttl", "transaction")

_REUSE = ("after_ttl", "after_failure", "after_end")
_SHOWN = 60
_DIFFERENCES = 3
#: How deep an argument is in an input: args[0], kwargs.name.
_ARGUMENT = 2
_SECRET = re.compile(r"pass(word|phrase|wd)|secret|token|api_?key|authorization|card|cvv|cvc|iban")


def key_of(options: Mapping[str, Any], plain: str, default_ttl: float) -> Key | None:
    """Read the idempotency key of a call.

    Args:
        options: of ``apply_async``.
        plain: JSON text of the input.
        default_ttl: ``durable_idempotency_ttl``.

    Raises:
        OptionError: it is no key, or what belongs to one came without.
    """
    key, ttl = options.get("idempotency_key"), options.get("idempotency_ttl")
    reuse = options.get("idempotency_reuse")
    if key is None:
        for name in ("idempotency_ttl", "idempotency_reuse"):
            if options.get(name) is not None:
                raise OptionError(f"{name}= goes together with idempotency_key=")
        return None
    check_key(key)
    if reuse is not None and reuse not in _REUSE:
        raise OptionError(
            f"idempotency_reuse={reuse!r}: give 'after_ttl' (the default), 'after_failure' or"
            " 'after_end'"
        )
    seconds = default_ttl if ttl is None else parse_seconds(ttl, name="idempotency_ttl")
    return Key(key, plain, seconds, reuse or _REUSE[0])


def check_key(key: object) -> None:
    """Refuse what is no idempotency key.

    Raises:
        OptionError: it is no text, or too long for an index.
    """
    if not is_name(key):
        raise OptionError(
            f"idempotency_key={_short(key)}: give text of 1 to {LONGEST_NAME} printable characters,"
            " such as 'order-42'"
        )


def refuse_with_id(options: Mapping[str, Any]) -> None:
    """Refuse a key for a run whose id is fixed already.

    Raises:
        OptionError: both are given.
    """
    if options.get("idempotency_key") is not None and options.get("task_id") is not None:
        raise OptionError(
            "idempotency_key= and task_id= cannot go together: a key may stand for a run that has"
            " another id. In a canvas (chain, group, chord, link) each member has its id"
            " beforehand: give a key to a single task, or task_id=uuid.uuid5(...) to a member"
        )


def refuse_in_canvas(signatures: Any) -> None:
    """Refuse what no member of a canvas can have: it is sent later, by a worker.

    Raises:
        OptionError: a member has an idempotency key or a transaction.
    """
    for options in _options_in(signatures):
        for name in EXACTLY_ONCE:
            if options.get(name) is not None:
                raise OptionError(
                    f"{name}= in a canvas: the ids of its members are fixed beforehand, and a worker"
                    " sends them later. Give it to a single task's apply_async"
                )


def refuse_in_chord(options: Mapping[str, Any]) -> None:
    """Refuse a transaction for a chord: its body, which gets the options too, is sent by a worker.

    Raises:
        OptionError: it is given.
    """
    if options.get("transaction") is not None:
        raise OptionError(
            "transaction= for a chord: its body is started by a worker, after your transaction."
            " Start one workflow in the transaction, and the chord in that one's body"
        )


def _options_in(signatures: Any) -> Iterator[Mapping[str, Any]]:
    """Go through the options of signatures, and of what is in them."""
    if isinstance(signatures, Mapping):
        if "task" in signatures:
            yield signatures.get("options") or {}
        for name in ("kwargs", "options", "tasks", "header", "body", "link", "link_error", "chord"):
            if name in signatures:
                yield from _options_in(signatures[name])
    elif isinstance(signatures, (list, tuple)):
        for each in signatures:
            yield from _options_in(each)


def conflict(
    run: NewRun,
    key: Key,
    run_id: str,
    theirs: str,
    *,
    codec: Codec,
    mask: Mask,
    function: Callable[..., Any] | None,
) -> IdempotencyConflict:
    """Make the error for a key whose run was started with another input.

    Args:
        run: that was to be started.
        key: that it was to have.
        run_id: of the run that has it.
        theirs: JSON text of that run's input.
        codec: reads both inputs.
        mask: of the app; what it hides is not in the error.
        function: of the workflow, whose parameters are the names of positional arguments.
    """
    try:
        there, here = codec.decode(theirs), codec.decode(key.plain)
    except PayloadError:
        different = ["an input that cannot be read here"]
    else:
        differences = _Differences(mask.hides_all)
        seen = (_seen(given, mask, function) for given in (there, here))
        different = list(differences.of("", _Sides(there, here, *seen)))
    more = "; ..." if len(different) > _DIFFERENCES else ""
    shown = "; ".join(different[:_DIFFERENCES]) + more or "in its form only"
    return IdempotencyConflict(
        f"idempotency key {key.key!r} of {run.name!r} belongs to run {run_id}, which was started with"
        f" other arguments ({shown}). Use another key for another input, or the same arguments",
        run_id,
    )


def _seen(given: Any, mask: Mask, function: Callable[..., Any] | None) -> Any:
    """What people may see of an input."""
    if isinstance(given, dict) and given.keys() == {"args", "kwargs"}:
        args, kwargs = mask.arguments(function, given["args"], given["kwargs"])
        return {"args": args, "kwargs": kwargs}
    return mask.value(given)


@dataclass(frozen=True, slots=True)
class _Sides:
    """Two values that are compared, and what may be seen of them."""

    there: Any
    here: Any
    seen_there: Any
    seen_here: Any

    def part(self, key: Any) -> _Sides:
        return _Sides(
            self.there[key],
            self.here[key],
            _part(self.seen_there, key),
            _part(self.seen_here, key),
        )


@dataclass(frozen=True, slots=True)
class _Differences:
    """Describes where two inputs differ, with secrets left out.

    Attributes:
        paths_only: whether no value is shown, and of an argument nothing but its name:
            keys in it are data too.
    """

    paths_only: bool

    def of(self, path: str, sides: _Sides, depth: int = 0) -> Iterator[str]:
        """Go through the differences of two values."""
        there, here = sides.there, sides.here
        if self.paths_only and depth == _ARGUMENT:
            if type(there) is not type(here) or there != here:
                yield path
        elif isinstance(there, dict) and isinstance(here, dict):
            for name in dict.fromkeys((*there, *here)):
                sub = f"{path}.{name}".lstrip(".")
                if name in there and name in here:
                    yield from self.of(sub, sides.part(name), depth + 1)
                elif name in there:
                    yield self._only(sub, "there", _part(sides.seen_there, name))
                else:
                    yield self._only(sub, "here", _part(sides.seen_here, name))
        elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
            for index in range(len(there)):
                yield from self.of(f"{path}[{index}]", sides.part(index), depth + 1)
        elif type(there) is not type(here) or there != here:
            yield self._both(path, sides)

    def _only(self, path: str, where: str, seen: Any) -> str:
        only = f"{path} only {where}"
        return only if self.paths_only else f"{only}: {_masked(path, seen)}"

    def _both(self, path: str, sides: _Sides) -> str:
        if self.paths_only:
            return path
        seen = _masked(path, sides.seen_there), _masked(path, sides.seen_here)
        return f"{path}: there {seen[0]}, here {seen[1]}"


def _part(seen: Any, key: Any) -> Any:
    """A part of what may be seen; nothing of what is hidden as a whole."""
    try:
        return HIDDEN if isinstance(seen, str) else seen[key]
    except (LookupError, TypeError):
        return HIDDEN


def _masked(path: str, value: Any) -> str:
    if value == HIDDEN or _SECRET.search(path.lower()):
        return HIDDEN
    if isinstance(value, (dict, list)):
        try:
            if _SECRET.search(json.dumps(value, default=str).lower()):
                return HIDDEN
        except ValueError:
            return HIDDEN
    return _short(value)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
