"""The facts of NIfTI volumes, pictures and npz archives, and of any decoded pixels."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from client.data import reasons
from client.index.facts import FileFacts

LARGEST: Final = 8 << 30  # bytes that the frames of one file may take when decoded


def nifti_facts(path: Path, facts: FileFacts) -> FileFacts:
    """Header and range of a NIfTI volume; slices are its frames.

    Raises
    ------
    Exception
        Whatever nibabel raises on a broken file.
    """
    image: Any = nib.load(path)
    shape, zooms = image.shape, tuple(float(z) for z in image.header.get_zooms()[:3])
    facts = replace(
        facts,
        rows=shape[0],
        columns=shape[1] if len(shape) > 1 else 1,
        frames=math.prod(shape[2:]),
        bits=image.get_data_dtype().itemsize * 8,
    )
    if 8 * math.prod(shape) > LARGEST:
        return replace(facts, reason=reasons.TOO_LARGE)
    return measured(facts, [(np.asanyarray(image.dataobj), zooms)])


def picture_facts(path: Path, facts: FileFacts) -> FileFacts:
    """Size and range of a PNG, JPEG, TIFF or BMP; never decoded when Pillow calls it a bomb.

    Raises
    ------
    Exception
        Whatever Pillow raises on a broken file.
    """
    try:
        with Pillow.open(path) as image:
            facts = replace(facts, rows=image.height, columns=image.width, frames=1)
            pixels = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    except Pillow.DecompressionBombError:
        return replace(facts, reason=reasons.TOO_LARGE)
    bits = 8 * pixels.dtype.itemsize
    return measured(replace(facts, bits=bits), [(pixels, (1.0, 1.0))])


def npz_facts(path: Path, facts: FileFacts) -> FileFacts:
    """Whether an archive opens and is not larger than it may be; its arrays are not looked at.

    Raises
    ------
    BadZipFile
        It is no archive, or is cut off.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    return replace(facts, reason=reasons.TOO_LARGE if size > LARGEST else "")


def measured(
    facts: FileFacts, parts: Iterable[tuple[NDArray[Any], tuple[float, ...]]]
) -> FileFacts:
    """The facts with range, spacing and hash of the decoded pixels.

    Parameters
    ----------
    facts : FileFacts
        What is known so far.
    parts : iterable of (NDArray, tuple of float)
        Frames and their spacing in mm; only one is held at a time.
    """
    digest, low, high = hashlib.sha256(), math.inf, -math.inf
    spacing: tuple[float, ...] = ()
    for place, (pixels, mm) in enumerate(parts):
        spacing = spacing if place else mm
        digest.update(repr((pixels.shape, pixels.dtype.str)).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        if pixels.size:
            ends = _ends(pixels)
            low, high = min(low, ends[0]), max(high, ends[1])
    known = low <= high
    return replace(
        facts,
        pixels=digest.hexdigest(),
        spacing=tuple(round(s, 4) for s in spacing),
        low=low if known else math.nan,
        high=high if known else math.nan,
    )


def _ends(pixels: NDArray[Any]) -> tuple[float, float]:
    """The lowest and the highest finite value; the other way round where there is none."""
    low, high = float(pixels.min()), float(pixels.max())
    if math.isfinite(low) and math.isfinite(high):  # one NaN would have made both NaN
        return low, high
    good = pixels[np.isfinite(pixels)]
    return (float(good.min()), float(good.max())) if good.size else (math.inf, -math.inf)
