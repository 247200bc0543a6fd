"""How each hospital takes and stores an image of the phantom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedward.tasks.base import Floats
from fedward_simulation.cohort.phantom import Anatomy, View, density

UNIT = 160.0  # mm of the phantom's unit of length


@dataclass(frozen=True)
class Scanner:
    """A scanner and the patients that come to it.

    Attributes
    ----------
    modality : str
        CR, DX or CT; CT stores HU, the others a grey value.
    bits : int
        Bits stored.
    photometric : str
        MONOCHROME1 stores bright as low.
    slope, intercept : float
        Stored value to modality value.
    rows, columns : int
        Size of an image, pixels.
    spacing : float
        mm between pixels; with the size it makes the field of view.
    noise : float
        Standard deviation, in densities (1 is water).
    blur : float
        Standard deviation, pixels.
    gamma : float
        Contrast curve of CR and DX.
    most_images : int
        Most images of a patient.
    prevalence : float
        Share of patients with the disease.
    compressed : bool
        Whether the files are RLE-compressed.
    """

    modality: Literal["CR", "DX", "CT"]
    bits: int
    photometric: Literal["MONOCHROME1", "MONOCHROME2"]
    slope: float
    intercept: float
    rows: int
    columns: int
    spacing: float
    noise: float
    blur: float
    gamma: float
    most_images: int
    prevalence: float
    compressed: bool = False

    @property
    def largest(self) -> int:
        """Largest value that fits the bits stored."""
        return int(2**self.bits - 1)

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Type of a stored pixel."""
        return np.uint8 if self.bits <= 8 else np.uint16


SCANNERS = (
    Scanner("CR", 10, "MONOCHROME2", 1, 0, 96, 96, 3.2, 0.05, 0.7, 1.0, 2, 0.2),
    Scanner("DX", 12, "MONOCHROME1", 1, 0, 104, 96, 3.05, 0.03, 0.4, 0.8, 1, 0.35),
    Scanner("CT", 16, "MONOCHROME2", 0.5, -1024, 96, 96, 3.4, 0.07, 0.9, 1.0, 4, 0.5),
    Scanner("CR", 8, "MONOCHROME2", 16, 100, 88, 92, 3.6, 0.04, 0.6, 1.35, 3, 0.65, True),
)


def take(
    anatomy: Anatomy, scanner: Scanner, random: np.random.Generator
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """One image of a patient, who stands a little differently each time.

    Returns
    -------
    pixels : NDArray
        ``(rows, columns)`` stored values, uint8 or uint16.
    mask : NDArray
        ``(rows, columns)`` uint8, 1 in the lungs.
    """
    clean, lungs = density(anatomy, _view(scanner, random))
    grain = ndimage.gaussian_filter(random.normal(0, 1, clean.shape), 0.5)
    grain *= scanner.noise / grain.std()
    seen = np.maximum(ndimage.gaussian_filter(clean, scanner.blur) + grain, 0)
    return _stored(seen, scanner), (lungs > 0.5).astype(np.uint8)


def _view(scanner: Scanner, random: np.random.Generator) -> View:
    turn, zoom = random.normal(0, np.radians(2.5)), random.normal(1, 0.03)
    x, y = random.normal(0, 0.035, 2)
    step = zoom * scanner.spacing / UNIT
    return View(_places(scanner.rows, step), _places(scanner.columns, step), turn, x, y)


def _places(n: int, step: float) -> Floats:
    return np.arange(n, dtype=np.float64) * step - (n - 1) / 2 * step


def _stored(seen: Floats, scanner: Scanner) -> NDArray[Any]:
    if scanner.modality == "CT":
        stored = (1000 * (seen - 1) - scanner.intercept) / scanner.slope
    else:
        # Attenuated light, turned so that dense is bright, as films are read.
        bright = (1 - np.exp(-1.1 * seen)) / (1 - np.exp(-1.1 * 1.7))
        stored = scanner.largest * np.clip(bright, 0, 1) ** scanner.gamma
    whole = np.clip(np.rint(stored), 0, scanner.largest)
    if scanner.photometric == "MONOCHROME1":
        whole = scanner.largest - whole
    return whole.astype(scanner.dtype)
