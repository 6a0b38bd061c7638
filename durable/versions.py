"""Versions of a workflow's code, as ``version=`` and ``accepts=`` give them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from durable.errors import OptionError

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}")


def checked_version(version: object, option: str = "version") -> str:
    """Return a version if it is one.

    Raises:
        OptionError: it is not text of 1 to 63 letters, digits, dots, dashes, ...

    Example:
        >>> checked_version("2026-11.b")
        '2026-11.b'
        >>> checked_version(2)
        Traceback (most recent call last):
            ...
        durable.errors.OptionError: version=2: give text of 1 to 63 letters, digits, ., _, + \
and -, such as "2"
    """
    if type(version) is not str or not _VERSION.fullmatch(version):
        raise OptionError(
            f"{option}={version!r:.80}: give text of 1 to 63 letters, digits, ., _, + and -,"
            ' such as "2"'
        )
    return version


def checked_versions(version: object, accepts: object) -> tuple[str, ...]:
    """Return all versions that a task with these options runs, its own first.

    Raises:
        OptionError: one of them is no version, or ``accepts`` is no list.

    Example:
        >>> checked_versions("3", ["1", "2"])
        ('3', '1', '2')
        >>> checked_versions(None, ())
        ()
    """
    if isinstance(accepts, str) or not isinstance(accepts, Sequence | set | frozenset):
        raise OptionError(
            f"accepts={accepts!r:.80}: give a list of the older versions whose runs this code can"
            ' go on with, such as accepts=["1", "2"]'
        )
    own = () if version is None else (checked_version(version),)
    older = [checked_version(each, "accepts") for each in accepts]
    return tuple(dict.fromkeys((*own, *older)))
