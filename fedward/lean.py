"""MONAI without what only its drawing needs, and for whatever user it starts.

MONAI looks for every optional package at its own import, and takes more than a second for two that
nothing here needs of it: matplotlib (its notebook plots) and scikit-learn (one metric). Whoever
imports them for themselves gets them as ever.
"""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Final

_UNNEEDED: Final = frozenset({"matplotlib", "sklearn"})


class _Absent(MetaPathFinder):
    """Says that a package is not there while MONAI is being imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name in _UNNEEDED and _begins(sys.modules.get("monai")):
            raise ModuleNotFoundError(f"{name} is left out of MONAI's start", name=name)


def _begins(module: ModuleType | None) -> bool:
    return module is not None and not hasattr(module, "__all__")


def prepare_monai() -> None:
    """Leave out of MONAI's import, whenever it comes, what is not needed of it.

    It also asks for the user's name, and would break in a container whose user has none.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())
    if not any(isinstance(finder, _Absent) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Absent())
