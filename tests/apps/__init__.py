"""Sample apps of the acceptance tests.

The test and its workers load the same module; the settings of the test come
in one environment variable, which each app reads at import.
"""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "DURABLE_TEST_SETTINGS"


def settings_from_environment() -> dict[str, Any]:
    """The Celery settings of the running test; none outside one."""
    settings: dict[str, Any] = json.loads(os.environ.get(VARIABLE, "{}"))
    return settings
