"""Whether slices make a volume, as far as their headers tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client.data import reasons
from client.data.decode import Place, place_of
from client.data.quiet import quiet
from client.data.readers.dicom_stacks import Stack
from client.data.readers.dicom_volumes import geometry
from client.data.stored import open_dicom
from fedward.errors import DataError


@dataclass(frozen=True)
class Layout:
    """What headers tell of a stack of slices.

    Attributes
    ----------
    reason : str
        Why it makes no volume; "" if it does.
    tilt : float
        Degrees; 0 for an upright one.
    step : float
        mm between slices; 0 where headers do not tell.
    """

    reason: str = ""
    tilt: float = 0.0
    step: float = 0.0


def layout(stack: Stack) -> Layout:
    """Whether a stack of slices makes a volume, and how they lie.

    Two slices in one place are no reason yet: whether they are the same, only their pixels tell.
    """
    try:
        with quiet():
            places = _places(stack)
    except Exception:  # whoever reads the frames meets this again, and tells
        return Layout()
    alone = {tuple(np.round(p.position, 3)): p for p in places if p.position is not None}
    lying = [place for place in places if place.position is None]
    if not lying and len(alone) < 2 <= len(places):
        return Layout()
    try:
        found = geometry([*alone.values(), *lying], places[0].spacing)
        return Layout(tilt=found.tilt, step=found.step)
    except DataError as error:
        return Layout(reasons.reason_of(error))


def _places(stack: Stack) -> list[Place]:
    if all(header.place is not None for header in stack.headers):
        return [header.place for header in stack.headers if header.place is not None]
    return [place_of(open_dicom(path).header, frame) for path, frame in stack.frames]
