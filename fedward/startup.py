"""Import finders that skip unused parts of torch, Opacus and MONAI for a quick start."""

from __future__ import annotations

import functools
import getpass
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

# Modules that stand in the place of others for a while.


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


_UNNEEDED: Final = frozenset({"matplotlib", "sklearn"})
# What Opacus takes from torch at its import; nothing of these kinds exists in a process here.
_SHARDED: Final = {
    "torch.distributed.tensor": ("DTensor",),
    "torch.distributed._tensor": (),
    "torch.distributed._tensor.experimental": ("implicit_replication",),
    "torch.distributed._composable": (),
    "torch.distributed._composable.fsdp": ("FSDPModule",),
    "torch.distributed.fsdp": ("FSDPModule", "MixedPrecisionPolicy", "fully_shard"),
}
_COMPILER: Final = "torch._dynamo"
_Around = Callable[[ModuleType], AbstractContextManager[None]]


class _Absent(MetaPathFinder):
    """Says that a package is not there while MONAI is being imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name in _UNNEEDED and _begins(sys.modules.get("monai")):
            raise ModuleNotFoundError(f"{name} is left out of MONAI's start", name=name)


def _begins(module: ModuleType | None) -> bool:
    return module is not None and not hasattr(module, "__all__")


@contextmanager
def _unsharded(module: ModuleType) -> Iterator[None]:
    """Stand-ins are in the place of sharded training while Opacus is loaded."""
    distributed = importlib.import_module("torch.distributed")
    places = {
        name: {word: type(word, (), {"__module__": name}) for word in words}
        for name, words in _SHARDED.items()
    }
    with stand_in(places) as made:
        # Opacus asks for torch.distributed.fsdp.FSDPModule while it trains, too.
        for name in ("tensor", "fsdp") if made else ():
            setattr(distributed, name, made[f"torch.distributed.{name}"])
        yield


@contextmanager
def _uncompiled(module: ModuleType) -> Iterator[None]:
    """What the compiler must leave alone is told to it only where somebody has loaded it."""
    yield
    tell = getattr(module, "_disable_dynamo", None)
    if tell is None:  # a torch that does this otherwise starts as ever
        return

    def wrap(fn: Callable[..., Any] | None = None, recursive: bool = True) -> Any:
        if fn is None:
            return functools.partial(wrap, recursive=recursive)
        told = tell(fn, recursive)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (told if _COMPILER in sys.modules else fn)(*args, **kwargs)

        return call

    module._disable_dynamo = wrap  # type: ignore[attr-defined]


class _Loads(Loader):
    """A module's own loader with something around it."""

    def __init__(self, real: Loader, around: _Around) -> None:
        self._real, self._around = real, around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with self._around(module):
            self._real.exec_module(module)


class _Lean(MetaPathFinder):
    """Finds two modules where they are, and has them loaded leaner."""

    _modules: Final[dict[str, _Around]] = {"opacus": _unsharded, "torch._compile": _uncompiled}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._modules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loads(spec.loader, self._modules[name])
        return spec


FINDERS: Final = (_Absent, _Lean)


# torch, Opacus and MONAI without what nothing here needs of them: most of what a start takes.
#
# MONAI looks for every optional package at its own import, and takes more than a second for two of
# them: matplotlib (its notebook plots) and scikit-learn (one metric). Opacus imports torch's
# sharded tensors and sharded training over several machines for a handful of type checks, and with
# them sympy: two seconds. torch loads its compiler with the first optimiser, to tell it what it
# must leave alone, and sympy to compare two numbers: three seconds. Whoever imports any of it for
# themselves gets it as ever.


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list):
        return tuple(one) == tuple(other)
    return bool(one == other)


# With sizes that are numbers, torch's questions about sizes that are symbols have plain answers.
_PLAIN: Final[dict[str, dict[str, Any]]] = {
    "torch.fx.experimental.symbolic_shapes": {
        "expect_true": bool,
        "guard_or_false": bool,
        "guard_or_true": bool,
        "guard_size_oblivious": bool,
        "statically_known_true": bool,
        "sym_and": lambda *given: all(given),
        "sym_or": lambda *given: any(given),
        "is_nested_int": lambda size: False,
        "has_guarding_hint": lambda size: True,
        "guarding_hint_or_throw": lambda size: size,
        "sym_eq": _equal,
    },
    "sympy": {"Basic": type("Basic", (), {})},
}


def prepare() -> None:
    """Leave out of these imports, whenever they come, what is not needed of them.

    MONAI also asks for the user's name, and would break in a container whose user has none.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())
    for kind in FINDERS:
        if not any(isinstance(finder, kind) for finder in sys.meta_path):
            sys.meta_path.insert(0, kind())


@contextmanager
def plain_shapes() -> Iterator[None]:
    """Within it, tensors on the ``meta`` device check their sizes as numbers, without sympy."""
    with stand_in(_PLAIN):
        yield
