"""Names for what tests make on shared servers, so that leftovers can be told.

A name carries this machine and the process that made it. What a killed run
left behind is swept by the next one, and nothing else is ever touched.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import socket

_MACHINE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_counter = itertools.count(1)
_PATTERN = re.compile(rf"durable_test_{_MACHINE}_(\d+)_")

#: Every name that tests of this machine make starts so.
PREFIX = f"durable_test_{_MACHINE}_"


def unique_name(what: str = "") -> str:
    """A name that no other test and no other run has, such as ``durable_test_1a2b3c_77_4``."""
    return f"{PREFIX}{os.getpid()}_{next(_counter)}{'_' if what else ''}{what}"


def is_left_over(name: str) -> bool:
    """Whether a run that is no more made this name, on this machine."""
    match = _PATTERN.match(name)
    if match is None:
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
