"""Images of different sizes: on disk one after another, in use an array of arrays."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.plan.schema import Preprocessing
from fedward_client.data.cache import FlatRows

MARKED: Final = 256
"""Marked pixels of each class that an image's patches may be centred on."""


@dataclass(frozen=True)
class Volumes:
    """What is known of images that keep their own size, beside their pixels.

    Attributes
    ----------
    truth : NDArray
        ``(N,)`` objects, each the ``(*S)`` uint8 mask on the grid of the image's file.
    sides : NDArray
        ``(N, D)`` int64, sides of each image without the border that pads it to a patch.
    marked : NDArray
        ``(N, K, MARKED, D)`` int32, see :func:`marked_pixels`.
    """

    truth: NDArray[Any]
    sides: NDArray[np.int64]
    marked: NDArray[np.int32]


def marked_pixels(mask: NDArray[np.uint8], classes: int) -> NDArray[np.int32]:
    """Places of pixels of each class, ``(K, MARKED, D)``, evenly over its pixels; -1 without any.

    With them a step finds a class in a volume without reading it.
    """
    found = np.full((classes, MARKED, mask.ndim), -1, np.int32)
    for k in range(classes):
        there = np.flatnonzero(mask == k + 1)
        if len(there):
            some = there[np.linspace(0, len(there) - 1, MARKED).round().astype(np.int64)]
            found[k] = np.stack(np.unravel_index(some, mask.shape), axis=1)
    return found


def corners(
    volumes: Volumes,
    index: int,
    shape: tuple[int, ...],
    prep: Preprocessing,
    draw: NDArray[np.float64],
) -> tuple[slice, ...]:
    """Where a random patch of an image lies.

    Parameters
    ----------
    index : int
        The image.
    shape : tuple of int
        Its sides; none is shorter than the patch's.
    prep : Preprocessing
        Size of a patch, and share of foreground.
    draw : NDArray
        ``(3 + D,)`` numbers in [0, 1). All are drawn for each patch, used or not, so that what
        others meet does not depend on this image.
    """
    free = [n - t for n, t in zip(shape, prep.size, strict=True)]
    starts = [int(u * (room + 1)) for u, room in zip(draw[3:], free, strict=True)]
    there = np.flatnonzero(volumes.marked[index][:, 0, 0] >= 0)
    if prep.patch is not None and draw[0] < prep.patch.foreground and len(there):
        middle = volumes.marked[index][there[int(draw[1] * len(there))], int(draw[2] * MARKED)]
        starts = [
            min(max(int(m) - t // 2, 0), room)
            for m, t, room in zip(middle, prep.size, free, strict=True)
        ]
    return tuple(slice(a, a + t) for a, t in zip(starts, prep.size, strict=True))


def joined(parts: Sequence[Volumes]) -> Volumes | None:
    """The volumes of several sites as those of one; None without any."""
    if not parts:
        return None
    return Volumes(
        truth=np.concatenate([one.truth for one in parts]),
        sides=np.concatenate([one.sides for one in parts]),
        marked=np.concatenate([one.marked for one in parts]),
    )


def as_objects(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Arrays of any shapes as ``(N,)`` objects."""
    each = list(arrays)
    made = np.empty(len(each), object)
    # One by one: numpy would make one array of arrays of one shape.
    for place, one in enumerate(each):
        made[place] = one
    return made


def apart(flat: NDArray[Any], shapes: NDArray[np.int64]) -> NDArray[Any]:
    """Views of arrays that lie one after another in `flat`, as ``(N,)`` objects."""
    ends = np.cumsum(shapes.prod(axis=1))
    starts = ends - shapes.prod(axis=1)
    cuts = zip(starts, ends, shapes, strict=True)
    return as_objects(flat[a:b].reshape(shape) for a, b, shape in cuts)


def let_go(*arrays: NDArray[Any]) -> None:
    """Give back the memory in which pages of memory maps lie; the system may keep them.

    Without it, what a site has read of its volumes would count as this process's until its end.
    """
    maps = {}
    for array in arrays:
        for part in array if array.dtype == object else (array,):
            while isinstance(part, np.ndarray):
                part = part.base
            if isinstance(part, mmap.mmap):
                maps[id(part)] = part
    for one in maps.values():
        one.madvise(mmap.MADV_DONTNEED)


def file_of(array: NDArray[Any]) -> Path | None:
    """The file that an array, or an array of arrays, is a memory map of."""
    part = array[0] if array.dtype == object and len(array) else array
    name = part.filename if isinstance(part, np.memmap) else None
    return None if name is None else Path(name)


def save(path: Path, array: NDArray[Any]) -> None:
    """Write an array, or ``(N,)`` arrays of different sizes."""
    if array.dtype != object:
        np.save(path, array, allow_pickle=False)
        return
    with closing(FlatRows(path)) as rows:
        for one in array:
            rows.append(one)
        rows.finish()
    np.save(_shapes_of(path), np.array([one.shape for one in array], np.int64), allow_pickle=False)


def load(path: Path) -> NDArray[Any]:
    """What :func:`save` wrote, as memory maps."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if not _shapes_of(path).exists():
        return array
    return apart(array, np.load(_shapes_of(path), allow_pickle=False))


def _shapes_of(path: Path) -> Path:
    return path.with_suffix(".shapes.npy")
