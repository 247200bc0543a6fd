"""Validation of count arrays from outside, and small helpers for metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.errors import ModelError, PlanError, ProtocolError
from fedward.rule_codes import RuleCode

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Above this a float64 no longer tells neighbouring whole numbers apart.
LARGEST = float(2**53)
_RESEND = "Send counts that this release has made"


def refuse(rule: str, value: object = None) -> ProtocolError:
    """The error for counts that are not what they should be."""
    return ProtocolError(rule, value=value, fix=_RESEND, where="counts", code=RuleCode.COUNTS)


def same_names(arrays: Mapping[str, NDArray[Any]], names: Iterable[str]) -> None:
    """Raise ProtocolError unless the arrays bear exactly these names."""
    if set(arrays) != set(names):
        raise refuse(f"the arrays must be {', '.join(sorted(names))}", len(arrays))


def numbers(name: str, array: object, shape: tuple[int | None, ...]) -> Floats:
    """A finite, non-negative float64 copy of an array of this shape (None: any length).

    Raises
    ------
    ProtocolError
        It is no array of numbers, has another shape, or holds a value that no count can have.
    """
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise refuse(f"`{name}` must be an array of numbers")
    if len(array.shape) != len(shape) or any(
        want is not None and have != want for have, want in zip(array.shape, shape, strict=True)
    ):
        wanted = " x ".join("any" if side is None else str(side) for side in shape)
        raise refuse(f"`{name}` must have the shape {wanted}", array.shape)
    if not np.isfinite(array).all() or (array < 0).any() or (array > LARGEST).any():
        raise refuse(f"`{name}` must be finite and not negative")
    return array.astype(np.float64)


def whole(name: str, array: object, shape: tuple[int | None, ...]) -> Ints:
    """Like :func:`numbers`, for whole numbers; int64."""
    values = numbers(name, array, shape)
    if (values != np.floor(values)).any():
        raise refuse(f"`{name}` must hold whole numbers")
    return values.astype(np.int64)


def agree(holds: bool, rule: str) -> None:
    """Raise ProtocolError when a relation between counts does not hold."""
    if not holds:
        raise refuse(rule)


def known(kind: str, names: Sequence[str], have: Iterable[str]) -> None:
    """Raise PlanError for a figure that these counts cannot give."""
    if unknown := sorted(set(names) - set(have)):
        raise PlanError(
            f"{kind} has no such metric",
            value=unknown[0],
            fix="Remove it from the plan",
            code=RuleCode.METRIC,
        )


def loss_sum(losses: NDArray[Any], n: int) -> Floats:
    """Summed loss and number of images, ``(2,)``.

    Raises
    ------
    ModelError
        There is not one finite loss of 0 or more for each of ``n`` images.
    """
    each = np.asarray(losses, dtype=np.float64)
    if each.shape != (n,) or not np.isfinite(each).all() or (each < 0).any():
        raise ModelError(RuleCode.LOSSES)
    return np.array([each.sum(), n], dtype=np.float64)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is defined; None when nothing is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def ratio(part: float, all_: float) -> float | None:
    """A share; None of nothing."""
    return float(part / all_) if all_ > 0 else None


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """The array, made read-only."""
    array.flags.writeable = False
    return array
