"""Which rules hold for one class, worked out once."""

from __future__ import annotations

from dataclasses import dataclass

from durable.classify.registry import Entry, Registry, Tier
from durable.classify.verdict import PASS, Verdict, type_name


@dataclass(frozen=True)
class Plan:
    """What to ask for one class.

    Attributes:
        own: the three retry classes of ``durable.errors``.
        user: registered rules.
        passes: the class is control flow, unless a user rule says otherwise.
        table: rules for libraries and builtins.
        weak: programming errors, asked only after the causes.
        fixed: the verdict, when it depends on the class alone.
        generation: the registry's, when this was worked out.
    """

    own: tuple[Entry, ...]
    user: tuple[Entry, ...]
    passes: bool
    table: tuple[Entry, ...]
    weak: tuple[Entry, ...]
    fixed: Verdict | None
    generation: int


def make_plan(cls: type[BaseException], registry: Registry) -> Plan:
    """Work out the rules for a class, and its verdict where that is fixed."""
    generation = registry.generation
    found = registry.entries(cls)
    tiers: dict[Tier, list[tuple[int, Entry]]] = {tier: [] for tier in Tier}
    for distance, entry in found:
        tiers[entry.tier].append((distance, entry))
    table = tiers[Tier.LIBRARY] + tiers[Tier.BUILTIN]
    reach = _control_flow(cls, table)
    if reach is not None:
        tiers[Tier.USER] = [item for item in tiers[Tier.USER] if item[0] < reach]
    fixed = None
    if table and reach is None and not (tiers[Tier.OWN] or tiers[Tier.USER]):
        rule = table[0][1].rule
        fixed = rule.because(reason(cls, table[0][1])) if isinstance(rule, Verdict) else None
    return Plan(
        own=_entries(tiers[Tier.OWN]),
        user=_entries(tiers[Tier.USER]),
        passes=reach is not None,
        table=_entries(table),
        weak=_entries(tiers[Tier.PROGRAMMING]),
        fixed=fixed,
        generation=generation,
    )


def _entries(found: list[tuple[int, Entry]]) -> tuple[Entry, ...]:
    return tuple(entry for _, entry in found)


def _control_flow(cls: type[BaseException], table: list[tuple[int, Entry]]) -> int | None:
    """How far up the MRO a user rule still holds for control flow; None for other classes.

    A rule for ``SystemExit`` was meant, one for ``BaseException`` or
    ``Exception`` was meant for errors.
    """
    passing = [distance for distance, entry in table if entry.rule is PASS]
    if passing:
        return min(passing) + 1
    if not issubclass(cls, Exception) and not table:  # the table knows BaseExceptionGroup
        return cls.__mro__.index(BaseException)
    return None


def reason(cls: type[BaseException], entry: Entry) -> str:
    """Which rule decided."""
    name = type_name(cls)
    rule = f"the rule for {entry.source}"
    return rule if name == entry.source else f"{name}: {rule}"
