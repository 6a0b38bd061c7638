"""What errors say, without the values that some of them repeat."""

from __future__ import annotations

import sys


def without_input(error: BaseException) -> str:
    """Say what an error says, but for the values that pydantic repeats in its own.

    Example:
        >>> without_input(ValueError("too short"))
        'too short'
    """
    pydantic = sys.modules.get("pydantic_core")
    if pydantic is None or not isinstance(error, pydantic.ValidationError):
        return str(error)
    found = error.errors(include_url=False, include_input=False, include_context=False)
    each = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ") for one in found)
    return "; ".join(each)
