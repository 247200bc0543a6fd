"""A chest-like phantom seen from the front: body, lungs, ribs, heart, vessels and opacities.

Lengths are in units of 160 mm, the origin in the middle of the chest, x to the image's right and
y down. Densities are in units of water: 0 is air, 1 soft tissue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedward.tasks.base import Floats

LUNG, TISSUE, BONE = 0.28, 1.0, 0.18
_RIBS_APART = 0.21
_SIDES = (-1.0, 1.0)


class Blob(NamedTuple):
    """A soft spot of more density: centre, radius and peak."""

    x: float
    y: float
    radius: float
    peak: float


@dataclass(frozen=True)
class View:
    """The pixels of an image, in the phantom's lengths.

    Attributes
    ----------
    down, right : NDArray
        ``(rows,)`` and ``(columns,)`` places along the image's sides.
    turn : float
        How far the phantom is turned, radians.
    x, y : float
        The phantom's point in the middle of the image.
    """

    down: Floats
    right: Floats
    turn: float = 0.0
    x: float = 0.0
    y: float = 0.0

    def points(self) -> tuple[Floats, Floats]:
        """The phantom's x and y at each pixel, both ``(rows, columns)``."""
        v, u = np.meshgrid(self.down, self.right, indexing="ij")
        c, s = np.cos(self.turn), np.sin(self.turn)
        return c * u - s * v + self.x, s * u + c * v + self.y

    def spots(self, spots: tuple[Blob, ...]) -> Floats:
        """The summed density of spots at each pixel, ``(rows, columns)``."""
        x, y, radius, peak = np.array(spots).reshape(-1, 4).T
        c, s = np.cos(self.turn), np.sin(self.turn)
        # A round spot is a product along any two axes, so along the image's own.
        u, v = c * (x - self.x) + s * (y - self.y), c * (y - self.y) - s * (x - self.x)
        along = [
            np.exp(-(((side[:, None] - centre) / radius) ** 2) / 2)
            for side, centre in ((self.down, v), (self.right, u))
        ]
        # Not `@`: threads of the linear algebra cost more than they bring at this size.
        total: Floats = np.einsum("rk,ck->rc", along[0] * peak, along[1])
        return total


@dataclass(frozen=True)
class Anatomy:
    """One patient.

    Attributes
    ----------
    body : float
        Half the width of the trunk.
    lungs : tuple of (float, float, float, float)
        For either side: centre x, centre y, half width, half height.
    domes : tuple of float
        Height of the diaphragm on either side.
    heart : tuple of (float, float, float)
        Centre x, centre y, half width.
    ribs : float
        Offset of the ribs.
    waves : NDArray
        ``(n, 4)`` wave numbers, phase and height of the uneven tissue in front of the lungs.
    vessels : tuple of Blob
        Chains of small spots that run outwards from the hila.
    opacities : tuple of Blob
        The disease; empty in a patient without it.
    """

    body: float
    lungs: tuple[tuple[float, float, float, float], ...]
    domes: tuple[float, ...]
    heart: tuple[float, float, float]
    ribs: float
    waves: Floats
    vessels: tuple[Blob, ...]
    opacities: tuple[Blob, ...]


def draw_anatomy(random: np.random.Generator, diseased: bool) -> Anatomy:
    """Draw a patient; with the same state of `random`, disease only adds opacities."""
    height, width = random.normal(0.62, 0.035), random.normal(0.30, 0.018)
    lungs = tuple(
        (
            side * random.normal(0.42, 0.012),
            random.normal(-0.05, 0.02),
            width * random.normal(1, 0.03),
            height * random.normal(1, 0.02),
        )
        for side in _SIDES
    )
    heart = (random.normal(0.1, 0.02), random.normal(0.24, 0.03), random.normal(0.27, 0.025))
    return Anatomy(
        body=random.normal(0.88, 0.03),
        lungs=lungs,
        domes=tuple(random.normal(0.48, 0.03) - 0.03 * (side < 0) for side in _SIDES),
        heart=heart,
        ribs=random.uniform(0, _RIBS_APART),
        waves=_waves(random),
        vessels=tuple(spot for lung in lungs for _ in range(5) for spot in _vessel(random, lung)),
        opacities=_opacities(random, lungs) if diseased else (),
    )


def _waves(random: np.random.Generator, n: int = 8) -> Floats:
    numbers = random.normal(0, 5, (n, 2))
    phases, heights = random.uniform(0, 2 * np.pi, n), random.normal(0, 0.02, n)
    return np.column_stack([numbers, phases, heights])


def _vessel(random: np.random.Generator, lung: tuple[float, float, float, float]) -> list[Blob]:
    x, y, width, height = lung
    start = np.array([x - np.sign(x) * 0.8 * width, y + 0.1])
    angle = random.uniform(-1.2, 1.2)
    step = np.array([np.sign(x) * np.cos(angle), np.sin(angle) * height / width / 2]) * 0.055
    size = random.uniform(0.6, 1.2)
    return [
        Blob(*(start + k * step).tolist(), 0.03 * 0.85**k, size * 0.2 * 0.85**k)  # type: ignore[call-arg]
        for k in range(1, 8)
    ]


def _opacities(
    random: np.random.Generator, lungs: tuple[tuple[float, float, float, float], ...]
) -> tuple[Blob, ...]:
    spots: list[Blob] = []
    # Now and then hardly visible, so that no model finds every patient.
    mild = random.random() < 0.15
    severity = 0.2 if mild else random.uniform(0.9, 1.7)
    for _ in range(random.integers(2, 5)):
        x, y, width, height = lungs[random.integers(2)]
        turn, far = random.uniform(0, 2 * np.pi), np.sqrt(random.uniform(0, 0.6))
        cx, cy = x + far * width * np.cos(turn), y + far * height * np.sin(turn) * 0.8
        for _ in range(random.integers(2, 5)):
            dx, dy = random.normal(0, 0.05, 2)
            radius, peak = random.uniform(0.06, 0.12), severity * random.uniform(0.12, 0.26)
            spots.append(Blob(cx + dx, cy + dy, radius, peak))
    return tuple(spots)


def lung_shape(anatomy: Anatomy, x: Floats, y: Floats) -> Floats:
    """How much of each point is lung and not heart or diaphragm, 0 to 1; the shape of `x`."""
    shape = np.zeros_like(x)
    for (cx, cy, width, height), dome in zip(anatomy.lungs, anatomy.domes, strict=True):
        v = (y - cy) / height
        u = (x - cx) / (width * (1 + 0.22 * v))
        oval = _edge(1 - (u**2 + np.abs(v) ** 2.4), 9)
        above = _edge(dome + 0.1 * u**2 - y, 45)
        shape = np.maximum(shape, oval * above)
    lungs: Floats = shape * (1 - _heart(anatomy, x, y))
    return lungs


def density(anatomy: Anatomy, view: View) -> tuple[Floats, Floats]:
    """What a perfect scanner sees: density, and how much of it is lung, ``(rows, columns)``."""
    x, y = view.points()
    lungs = lung_shape(anatomy, x, y)
    trunk = _edge(1 - ((x / anatomy.body) ** 4 + (np.abs(y - 0.25) / 1.35) ** 4), 12)
    waves = sum(h * np.sin(a * x + b * y + p) for a, b, p, h in anatomy.waves.tolist())
    tissue = TISSUE + 0.16 * np.exp(-((x / 0.09) ** 2)) + 0.1 * _heart(anatomy, x, y)
    tissue = tissue - 0.12 * np.exp(-((x / 0.05) ** 2 + ((y + 0.75) / 0.3) ** 2))
    inside = LUNG + view.spots(anatomy.vessels + anatomy.opacities)
    whole = lungs * inside + (1 - lungs) * tissue + waves + _ribs(anatomy, x, y)
    return trunk * whole, lungs


def _edge(depth: Floats, steep: float) -> Floats:
    """1 well inside, 0 well outside, 1/2 on the border."""
    soft: Floats = 0.5 * (1 + np.tanh(0.5 * steep * depth))
    return soft


def _heart(anatomy: Anatomy, x: Floats, y: Floats) -> Floats:
    cx, cy, width = anatomy.heart
    return _edge(1 - (((x - cx) / width) ** 2 + ((y - cy) / (width * 1.05)) ** 2), 8)


def _ribs(anatomy: Anatomy, x: Floats, y: Floats) -> Floats:
    cage = _edge(1 - ((x / 0.82) ** 2 + np.abs((y + 0.02) / 0.8) ** 3), 14)
    place = (y - anatomy.ribs + 0.5 * (np.abs(x) - 0.15) ** 2 - 0.25 * np.abs(x)) / _RIBS_APART
    bone = np.exp(-((np.sin(np.pi * place) / 0.38) ** 2))
    aside = _edge(np.abs(x) - 0.12, 40)
    return BONE * cage * aside * bone
