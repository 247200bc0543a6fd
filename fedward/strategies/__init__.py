"""The strategies that a plan may name, each one entry in a module of this package.

A module has the whole of a strategy: the :class:`SiteHook` with what it does at a site, the
:class:`ServerRule` that combines the updates, and the :class:`StrategySpec` from which the plan's
vocabulary, its rules, the checks at both ends and the reference pages derive. A strategy that
Flower ships is named by its class, which only :mod:`fedward_strategies` imports.
"""

from __future__ import annotations

import importlib
import pkgutil

from fedward.strategies.spec import (
    Contribution,
    Memory,
    Pasts,
    ServerRound,
    ServerRule,
    Setting,
    SiteHook,
    SitePast,
    SiteResult,
    SiteRound,
    StrategySpec,
    array_names,
)

__all__ = [
    "STRATEGIES",
    "Contribution",
    "Memory",
    "Pasts",
    "ServerRound",
    "ServerRule",
    "Setting",
    "SiteHook",
    "SitePast",
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
