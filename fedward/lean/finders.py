"""What stands before Python's own search for modules."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

from fedward.lean.standins import stand_in

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
