"""Which settings somebody set, and where: ``app.conf``, environment, keywords.

Nothing is judged here but names: a misspelt setting would do nothing, and
nobody would notice.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from durable._accept import Kind

PREFIX = "durable_"
ENVIRONMENT_PREFIX = "DURABLE_"
TEST_PREFIX = "DURABLE_TEST_"

#: Likeness from which a ``DURABLE_*`` variable counts as a misspelt setting.
TYPO_LIKENESS = 0.8


class Configured(Protocol):
    """What is asked of a Celery app."""

    @property
    def conf(self) -> Mapping[Any, object]:
        """Celery's merged settings, of any key; reading them loads the configuration."""

    @property
    def namespace(self) -> str | None:
        """The ``namespace`` of ``config_from_object``, such as ``"CELERY"``."""


@dataclass(frozen=True)
class Given:
    """A value somebody set, and where."""

    value: object
    where: str


class Sources:
    """Looks for the settings of ``kinds``; ``problems`` collects the names that are wrong."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self.problems: list[str] = []

    def keywords(self, keywords: Mapping[str, object]) -> dict[str, Given]:
        """Those of ``Durable(app, ...)``, without prefix."""
        given = {}
        for key, value in keywords.items():
            where = f"keyword {key} of Durable()"
            if key not in self._kinds:
                self._unknown(where, key.removeprefix(PREFIX))
            elif self._is_set(key, value):
                given[key] = Given(value, where)
        return given

    def environ(self, environ: Mapping[str, str]) -> dict[str, Given]:
        """The variables ``DURABLE_*``."""
        given = {}
        for variable, value in environ.items():
            if not variable.startswith(ENVIRONMENT_PREFIX) or variable.startswith(TEST_PREFIX):
                continue
            where = f"environment variable {variable}"
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if name not in self._kinds:
                if self._looks_misspelt(name):
                    self._unknown(where, name, spell=ENVIRONMENT_PREFIX)
            elif value.strip():
                given[name] = Given(value.strip(), where)
        return given

    def conf(self, app: Configured) -> dict[str, Given]:
        """The keys ``durable_*`` of ``app.conf``, under Celery's namespace if it has one."""
        # Iterating loads a lazy configuration first; only then is the namespace known.
        keys = [key for key in app.conf if isinstance(key, str)]
        namespace = (app.namespace or "").rstrip("_")
        given = {}
        for key, name in _durable_keys(keys, namespace):
            spelled = _spelled_with(namespace, name)
            if key not in {PREFIX + name, spelled}:
                if name in self._kinds:
                    self.problems.append(f"{key} in app.conf is not read: write {spelled}")
            elif name not in self._kinds:
                spell = spelled[: len(spelled) - len(name)]
                self._unknown(f"{key} in app.conf", name, spell=spell)
            elif self._is_set(name, value := app.conf.get(PREFIX + name)):
                given[name] = Given(value, f"{key} in app.conf")
        return given

    def _is_set(self, name: str, value: object) -> bool:
        return value is not None or self._kinds[name].takes_none

    def _looks_misspelt(self, name: str) -> bool:
        """Whether a stray ``DURABLE_*`` variable is likely meant for us.

        Variables of other programs must not stop a worker, nor a longer name
        such as ``DURABLE_DATABASE_URL_REPLICA``.
        """
        longer = any(name.startswith(f"{known}_") for known in self._kinds)
        return not longer and bool(difflib.get_close_matches(name, self._kinds, 1, TYPO_LIKENESS))

    def _unknown(self, where: str, name: str, *, spell: str = "") -> None:
        close = difflib.get_close_matches(name.lower(), self._kinds, 1)
        advice = "`python -m durable.config` lists them all"
        if close:
            likely = close[0].upper() if spell.isupper() else close[0]
            advice = f"did you mean {spell}{likely}?"
        self.problems.append(f"{where} is not a setting; {advice}")


def _durable_keys(keys: list[str], namespace: str) -> Iterator[tuple[str, str]]:
    """The keys that mean us in any spelling, each with its bare lower-case name.

    Under a namespace, a key without it belongs to somebody else (Django
    settings hold everybody's), unless it is spelled as Celery reads it.
    """
    prefix = f"{namespace or 'celery'}_".lower()
    for key in keys:
        folded = key.lower()
        if folded.startswith(prefix):
            folded = folded.removeprefix(prefix)
        elif namespace and not key.startswith(PREFIX):
            continue
        if folded.startswith(PREFIX):
            yield key, folded.removeprefix(PREFIX)


def _spelled_with(namespace: str, name: str) -> str:
    if not namespace:
        return PREFIX + name
    spelled = f"{namespace}_{PREFIX}{name}"
    return spelled.upper() if namespace.isupper() else spelled.lower()
