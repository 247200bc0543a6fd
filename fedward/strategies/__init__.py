"""The strategies that a plan may name, each one entry in a module of this package.

A strategy has two halves. The light one is its :class:`StrategySpec`: name, settings, rules and
what it does at a site; the plan's vocabulary, its rules, the site's checks and the reference pages
derive from it. The other one is the class that combines the updates at the aggregator, which the
spec names and only :mod:`fedward_strategies` imports.
"""

from __future__ import annotations

import importlib
import pkgutil

from fedward.strategies.spec import (
    Memory,
    Setting,
    SiteHook,
    SiteResult,
    SiteRound,
    StrategySpec,
    array_names,
)

__all__ = [
    "STRATEGIES",
    "Memory",
    "Setting",
    "SiteHook",
    "SiteResult",
    "SiteRound",
    "StrategySpec",
    "array_names",
    "register",
]

STRATEGIES: dict[str, StrategySpec] = {}


def register(*specs: StrategySpec) -> None:
    """Let plans name these strategies.

    Raises
    ------
    ValueError
        Another strategy has the name.
    """
    for spec in specs:
        if STRATEGIES.setdefault(spec.name, spec) is not spec:
            raise ValueError(f"two strategies are called {spec.name}")


for _found in sorted(one.name for one in pkgutil.iter_modules(__path__)):
    register(*getattr(importlib.import_module(f"{__name__}.{_found}"), "SPECS", ()))
