"""Polygon filling against the crossing number of each pixel by itself, and against areas."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedward.errors import DataError
from fedward_client.data.readers.dicom.rtstruct import fill


def by_angles(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Independently: in each pixel's centre, the angles under which the edges are seen sum up to
    whole turns; odd numbers of turns are inside (of one polygon; XOR over all)."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    inside = np.zeros(shape, bool)
    for polygon in polygons:
        seen = (polygon[:, 1, None, None] - columns) + 1j * (polygon[:, 0, None, None] - rows)
        turns = np.angle(np.roll(seen, -1, axis=0) / seen).sum(axis=0) / (2 * np.pi)
        inside ^= np.round(turns).astype(int) % 2 == 1
    return inside


@pytest.mark.parametrize("seed", range(40))
def test_random_polygons(seed):
    rng = np.random.default_rng(seed)
    # Crossing themselves and each other, some corners outside.
    polygons = [
        rng.uniform(-6, 36, (int(rng.integers(3, 40)), 2)) for _ in range(int(rng.integers(1, 4)))
    ]
    np.testing.assert_array_equal(fill(polygons, (29, 31)), by_angles(polygons, (29, 31)))


@pytest.mark.parametrize("radius", [40, 120.5, 400])
def test_the_area_of_a_circle(radius):
    angle = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
    circle = 500.3 + radius * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    area = fill([circle], (1000, 1000)).sum()
    # Pixels by their centres: the error grows slower than the boundary (circle problem of Gauss).
    assert abs(area - np.pi * radius**2) < 4 * radius ** (2 / 3)


def square(low: float, high: float) -> np.ndarray:
    return np.array([[low, low], [low, high], [high, high], [high, low]], float)


def test_centres_on_edges_belong_to_one_of_two_neighbours():
    left = np.array([[1, 1], [1, 4], [6, 4], [6, 1]], float)
    right = np.array([[1, 4], [1, 8], [6, 8], [6, 4]], float)
    one, other = fill([left], (9, 9)), fill([right], (9, 9))
    assert not (one & other).any()
    assert (one | other).sum() == 5 * 7 == fill([left, right], (9, 9)).sum()


def test_an_inner_contour_is_a_hole_as_is_one_by_a_keyhole():
    outer, inner = square(0.5, 19.5), square(5.5, 12.5)
    two = fill([outer, inner], (21, 21))
    assert two.sum() == 19 * 19 - 7 * 7
    assert not two[9, 9]
    assert two[3, 3]
    # In by a slanted line from a corner, round the hole, and back by the same line.
    keyhole = np.concatenate([outer, outer[:1], inner[::-1][[3, 0, 1, 2, 3]]])
    np.testing.assert_array_equal(fill([keyhole], (21, 21)), two)


def test_nothing_and_all():
    assert not fill([], (3, 4)).any()
    assert fill([square(-50, 50)], (3, 4)).all()
    assert not fill([np.zeros((5, 2))], (3, 4)).any()


def test_absurd_drawings_end_in_time():
    rng, began = np.random.default_rng(0), time.monotonic()
    zigzag = np.stack([np.tile([-5.0, 2000.0], 400_000), rng.uniform(0, 999, 800_000)], axis=1)
    with pytest.raises(DataError, match="too large"):
        fill([zigzag], (1000, 1000))
    fill([zigzag[:20_000]], (1000, 1000))
    assert time.monotonic() - began < 30
