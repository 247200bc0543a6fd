"""Set-up of a process, before it imports Flower, torch and MONAI."""

from __future__ import annotations

import atexit
import functools
import gc
import getpass
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

NOT_LINUX: Final = (
    "error: Fedward runs on Linux (got {}). On Windows use WSL 2 (`wsl --install`, then install "
    "Fedward in it), on macOS a Linux container or virtual machine; simulations run there as well."
)
_COMPILER: Final = "torch._dynamo"


def prepare() -> None:
    """Set up this process; its ``main`` calls it before it imports Flower, torch and MONAI.

    Flower sends telemetry unless the environment says otherwise. MONAI asks for the user's name at
    its import and fails in a container whose user has none. torch loads its compiler for the first
    optimiser step, to exclude that step from compilation; ``docs/decisions.md`` has what this
    costs. Code that compiles still gets the compiler. At the end Python looks at every object once
    more for what nobody can reach, which takes a second where torch and MONAI are loaded, and all
    memory goes back then anyway.
    """
    if not sys.platform.startswith("linux"):
        sys.exit(NOT_LINUX.format(sys.platform))
    atexit.register(gc.freeze)
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())
    if "torch" not in sys.modules and not any(
        isinstance(finder, _CompileFinder) for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _CompileFinder())


class _CompileFinder(MetaPathFinder):
    """Changes ``torch._compile`` while torch is imported, and is gone afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of ``torch._compile``; other modules are found without this."""
        if name != "torch._compile":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _CompileLoader(spec.loader)
        return spec


class _CompileLoader(Loader):
    def __init__(self, real: Loader) -> None:
        self._real = real

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        defer_compiler(module)


def defer_compiler(module: ModuleType) -> None:
    """Let functions that torch excludes from compilation run as they are until torch compiles.

    Parameters
    ----------
    module : ModuleType
        ``torch._compile``; a release of torch that has no ``_disable_dynamo`` there is not changed.
    """
    disable = getattr(module, "_disable_dynamo", None)
    if disable is None:
        return

    def deferred(fn: Callable[..., Any] | None = None, recursive: bool = True) -> Any:
        if fn is None:
            return functools.partial(deferred, recursive=recursive)
        excluded = disable(fn, recursive)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (excluded if _COMPILER in sys.modules else fn)(*args, **kwargs)

        return call

    module._disable_dynamo = deferred  # type: ignore[attr-defined]
