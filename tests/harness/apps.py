"""Loading a sample app: the same module and settings in the test and in its workers."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from celery import Celery, _state
from pytest_celery import CeleryTestSetup

from tests.apps import VARIABLE

#: What each loaded module would have Celery register on every later app: its
#: tasks, which are shared. Loaded again, they would be there twice.
_shared: dict[str, set[Any]] = {}


def environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a process needs to load the app under these settings."""
    return {VARIABLE: json.dumps(dict(settings))}


def load_app(module: str, settings: Mapping[str, Any]) -> Celery:
    """Import a sample app anew under these settings.

    An app that has sent a message keeps its connections, so each test has a
    new one. A test therefore takes tasks and classes from the ``app_module``
    fixture, never from an import at its own top.
    """
    unload_app(module)
    os.environ.update(environment(settings))
    before = set(_state._on_app_finalizers)
    try:
        app: Celery = importlib.import_module(module).app
    finally:
        del os.environ[VARIABLE]
    _shared[module] = _state._on_app_finalizers - before
    app.set_current()
    return app


def unload_app(module: str) -> None:
    _state._on_app_finalizers -= _shared.pop(module, set())
    loaded: ModuleType | None = sys.modules.pop(module, None)
    if loaded is not None:
        loaded.app.close()


class LocalSetup(CeleryTestSetup):
    """pytest-celery's setup whose app is a sample app; its name is the app's module."""

    @classmethod
    def create_setup_app(
        cls, celery_setup_config: dict[str, Any], celery_setup_app_name: str
    ) -> Celery:
        return load_app(celery_setup_app_name, celery_setup_config)
