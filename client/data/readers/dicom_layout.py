"""Whether slices make a volume, as far as their headers tell."""

from __future__ import annotations

import numpy as np

from client.data import reasons
from client.data.decode import Place, place_of
from client.data.quiet import quiet
from client.data.readers.dicom_stacks import Stack
from client.data.readers.dicom_volumes import geometry
from client.data.stored import open_dicom
from fedward.errors import DataError


def layout(stack: Stack) -> tuple[str, float]:
    """The reason why a stack of slices makes no volume ("" if it does), and its tilt in degrees.

    Two slices in one place are no reason yet: whether they are the same, only their pixels tell.
    """
    try:
        with quiet():
            places = _places(stack)
    except Exception:  # whoever reads the frames meets this again, and tells
        return "", 0.0
    alone = {tuple(np.round(p.position, 3)): p for p in places if p.position is not None}
    lying = [place for place in places if place.position is None]
    if not lying and len(alone) < 2 <= len(places):
        return "", 0.0
    try:
        return "", geometry([*alone.values(), *lying], places[0].spacing).tilt
    except DataError as error:
        return reasons.reason_of(error), 0.0


def _places(stack: Stack) -> list[Place]:
    if all(header.place is not None for header in stack.headers):
        return [header.place for header in stack.headers if header.place is not None]
    return [place_of(open_dicom(path).header, frame) for path, frame in stack.frames]
