"""torch, Opacus and MONAI without what nothing here needs of them: most of what a start takes.

MONAI looks for every optional package at its own import, and takes more than a second for two of
them: matplotlib (its notebook plots) and scikit-learn (one metric). Opacus imports torch's sharded
tensors and sharded training over several machines for a handful of type checks, and with them
sympy: two seconds. torch loads its compiler with the first optimiser, to tell it what it must leave
alone, and sympy to compare two numbers: three seconds. Whoever imports any of it for themselves
gets it as ever.
"""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from fedward.lean.finders import FINDERS
from fedward.lean.standins import stand_in


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
