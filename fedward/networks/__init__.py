"""The networks that a plan can name, one file each; what a plan may ask of them, without torch.

A new network is a module here with a :class:`fedward.networks.spec.ModelSpec` in it. The plan's
vocabulary and rules, the sites' lists of models, the reference pages and the tests follow from it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from fedward.errors import ModelError
from fedward.networks.spec import ModelSpec


def _specs() -> Iterator[ModelSpec]:
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, ModelSpec):
                yield value


def _by_name(specs: Iterator[ModelSpec]) -> Mapping[str, ModelSpec]:
    found: dict[str, ModelSpec] = {}
    for spec in sorted(specs, key=lambda spec: (spec.tasks, spec.name)):
        if found.setdefault(spec.name, spec) is not spec:
            raise ModelError("two networks must not have one name", value=spec.name, fix="Rename")
    return MappingProxyType(found)


MODELS: Mapping[str, ModelSpec] = _by_name(_specs())
"""Every network by its name in a plan."""
