"""Which slice of a stack a place belongs to: by the image that is named, or by the plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.data.decode import Place

Vector = NDArray[np.float64]
_NEAR: Final = 0.25  # of the distance of slices (of a pixel, for one slice) is the same plane
_BESIDE: Final = 0.75  # of that distance is too near to be the plane of a slice that is not here
_PARALLEL: Final = 0.999  # cosine of the normals of two planes that count as parallel
_ALIKE: Final = 3  # digits to which normals are compared
_ONE: Final = 1e-3  # mm between slices that count as in one place


@dataclass(frozen=True)
class Found:
    """The slices in whose plane something lies; `beside`: it lies so close to some, yet in none."""

    numbers: tuple[int, ...] = ()
    beside: bool = False


@dataclass(frozen=True)
class _Stack:
    """Parallel slices by their height along the normal."""

    normal: Vector
    heights: Vector
    numbers: NDArray[np.int64]
    step: float
    pixel: float

    @property
    def near(self) -> float:
        return _NEAR * (self.step or self.pixel)

    def find(self, height: float) -> Found:
        low, high = np.searchsorted(self.heights, [height - self.near, height + self.near])
        if low < high:
            return Found(tuple(int(k) for k in self.numbers[low:high]))
        reach = _BESIDE * (self.step or self.pixel)
        low, high = np.searchsorted(self.heights, [height - reach, height + reach])
        return Found(beside=bool(low < high))


class Slices:
    """Slices of a stack, ready to be asked for.

    Parameters
    ----------
    places : sequence of Place
        Where each slice lies.
    frames : sequence
        File and frame of each.
    """

    def __init__(self, places: Sequence[Place], frames: Sequence[tuple[Path, int]]) -> None:
        self.places, self.frames = tuple(places), tuple(frames)
        self._images: dict[tuple[str, int], list[int]] = {}
        self._frames: dict[str, int] = {}
        for number, (place, (_, frame)) in enumerate(zip(places, frames, strict=True)):
            self._images.setdefault((place.instance, frame), []).append(number)
            self._frames[place.instance] = self._frames.get(place.instance, 0) + 1

    def named(self, instance: str, frame: int | None) -> tuple[int, ...] | None:
        """The slices of an image; None when it has several and none is meant."""
        if frame is None:
            if self._frames.get(instance, 0) > 1:
                return None
            frame = 0
        return tuple(self._images.get((instance, frame), ()))

    def at(self, position: Vector, normal: Vector | None = None) -> Found:
        """The slices in whose plane a point lies; with a normal, only those parallel to it."""
        found: list[int] = []
        beside = parallel = False
        for stack in self.stacks:
            if normal is not None and abs(float(stack.normal @ normal)) < _PARALLEL:
                continue
            parallel = True
            one = stack.find(float(position @ stack.normal))
            found += one.numbers
            beside |= one.beside
        return Found(tuple(found), not found and (beside or not parallel))

    def away(self, number: int, points: Vector) -> float:
        """How far ``(N, 3)`` points lie from the plane of a slice, in parts of what is near."""
        stack = self._stack_of[number]
        height = self.places[number].position @ stack.normal  # type: ignore[operator]
        return float(np.abs(points @ stack.normal - height).max()) / stack.near

    def lies(self, number: int) -> bool:
        """Whether a slice tells where it lies."""
        return number in self._stack_of

    @cached_property
    def stacks(self) -> tuple[_Stack, ...]:
        """Parallel slices together."""
        groups: dict[tuple[float, ...], list[int]] = {}
        for number, place in enumerate(self.places):
            normal = normal_of(place)
            if normal is not None and place.position is not None:
                key = tuple(float(v) for v in np.round(normal, _ALIKE) + 0.0)
                groups.setdefault(key, []).append(number)
        return tuple(self._stack(numbers) for numbers in groups.values())

    def _stack(self, numbers: list[int]) -> _Stack:
        normal = normal_of(self.places[numbers[0]])
        positions = np.array([self.places[k].position for k in numbers])
        heights = positions @ normal
        order = np.argsort(heights, kind="stable")
        steps = np.diff(heights[order])
        step = float(steps[steps > _ONE].min(initial=np.inf))
        pixel = min(min(self.places[k].spacing) for k in numbers)
        return _Stack(
            np.asarray(normal),
            heights[order],
            np.array(numbers)[order],
            step if np.isfinite(step) else 0.0,
            pixel,
        )

    @cached_property
    def _stack_of(self) -> dict[int, _Stack]:
        return {int(number): stack for stack in self.stacks for number in stack.numbers}


def normal_of(place: Place) -> Vector | None:
    """The unit normal of a slice; None where it tells none, or impossible axes."""
    if place.orientation is None:
        return None
    normal = np.cross(place.orientation[0], place.orientation[1])
    lengths = [*np.linalg.norm(place.orientation, axis=1), np.linalg.norm(normal)]
    return normal if np.allclose(lengths, 1, atol=1e-2) else None
