"""The slices of each volume: a series, or one file, may hold several stacks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydicom.dataset import Dataset

from client.data.quiet import quiet
from client.data.readers.dicom_headers import Header
from client.data.stored import open_dicom

T = TypeVar("T")
Frames = tuple[tuple[Path, int], ...]


@dataclass(frozen=True)
class Stack:
    """Frames that belong together, and the headers of their files."""

    headers: tuple[Header, ...]
    frames: Frames


def single(header: Header) -> Stack:
    """One file with all its frames."""
    return Stack((header,), tuple((header.path, k) for k in range(header.frames)))


def stacks(headers: Sequence[Header]) -> list[Stack]:
    """Divide series by plane, size and spacing, and where places repeat by acquisition and time.

    A multi-frame file is a stack of its own, or several by what its functional groups say.
    """
    groups: dict[tuple[str, ...], list[Header]] = {}
    for header in headers:
        uid = header.keys["seriesinstanceuid"] or str(header.path)
        own = str(header.path) if header.frames > 1 else ""
        groups.setdefault((header.patient, uid, header.plane, own), []).append(header)
    return [stack for group in groups.values() for stack in _stacks(group)]


def _stacks(group: list[Header]) -> Iterator[Stack]:
    if group[0].frames > 1:
        for numbers in _of_file(group[0]):
            yield Stack((group[0],), tuple((group[0].path, k) for k in numbers))
        return
    # Some scanners number each slice as an acquisition, so it counts only where places repeat.
    for part in _takes(group, lambda one: one.position, lambda one: one.take):
        yield Stack(tuple(part), tuple((one.path, 0) for one in part))


def _takes(
    group: Sequence[T], place: Callable[[T], Hashable], take: Callable[[T], Hashable]
) -> list[list[T]]:
    places = [where for one in group if (where := place(one))]
    if len(set(places)) == len(places):
        return [list(group)]
    found: dict[Hashable, list[T]] = {}
    for one in group:
        found.setdefault(take(one), []).append(one)
    return list(found.values())


def _of_file(header: Header) -> list[list[int]]:
    """The frames of each stack of a multi-frame file (C.7.6.16.2.2, C.7.6.16.2.4)."""
    everything = list(range(header.frames))
    try:
        with quiet():
            whole = open_dicom(header.path).header
            shared = (whole.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
            groups = list(whole.get("PerFrameFunctionalGroupsSequence") or [])
            facts = [_facts(group, shared) for group in groups[: header.frames]]
    except Exception:  # whoever reads the frames meets this again, and tells
        return [everything]
    if len(facts) != header.frames:
        return [everything]
    planes: dict[Hashable, list[int]] = {}
    for k in everything:
        planes.setdefault(facts[k][0], []).append(k)
    return [
        take
        for plane in planes.values()
        for take in _takes(plane, lambda k: facts[k][1], lambda k: facts[k][2])
    ]


def _facts(group: Dataset, shared: Dataset) -> tuple[Hashable, Hashable, Hashable]:
    """Plane and stack, place, and time and echo of a frame."""

    def value(sequence: str, name: str) -> Any:
        for owner in (group, shared):
            items = owner.get(sequence) or []
            if len(items) and items[0].get(name) is not None:
                return items[0].get(name)
        return None

    content = "FrameContentSequence"
    turned = _rounded(value("PlaneOrientationSequence", "ImageOrientationPatient"))
    plane = (str(value(content, "StackID") or ""), turned)
    place = _rounded(value("PlanePositionSequence", "ImagePositionPatient"))
    # Acquisitions are not told apart by number: some scanners count each frame as one.
    time = str(value(content, "TemporalPositionIndex"))
    echo = str(value("MREchoSequence", "EffectiveEchoTime"))
    weight = str(value("MRDiffusionSequence", "DiffusionBValue"))
    return plane, place, (time, echo, weight)


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(round(float(v), 2) + 0.0 for v in values or ())
