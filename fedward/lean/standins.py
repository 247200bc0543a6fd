"""Modules that stand in the place of others for a while."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """A module of a few names; who asks for another one gets the real module's.

    Parameters
    ----------
    name : str
        Whose place it takes.
    words : mapping
        Its names and what they are.
    make_way : callable
        Takes it, and those that came with it, out of the way of the real ones.
    """

    def __init__(self, name: str, words: Mapping[str, Any], make_way: Callable[[], None]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update(words)
        self._make_way = make_way

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._make_way()
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def stand_in(places: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, StandIn]]:
    """Put stand-ins into the places of modules; where one of these is loaded already, none.

    Parameters
    ----------
    places : mapping
        By the modules' names, the names that each stand-in has.
    """
    if any(name in sys.modules for name in places):
        yield {}
        return
    made: dict[str, StandIn] = {}

    def remove() -> None:
        for name, one in made.items():
            if sys.modules.get(name) is one:
                del sys.modules[name]

    made |= {name: StandIn(name, words, remove) for name, words in places.items()}
    sys.modules.update(made)
    try:
        yield made
    finally:
        remove()
