"""How often each class occurs: by labels, or by what masks mark."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.cohort.build import classes_of
from client.config import DatasetSection
from client.data.readers.dicom_mask_files import MaskFile
from client.data.readers.dicom_masks import SegmentedFrame, SegmentedSeries, SegmentedVolume
from client.data.readers.dicom_nifti import PlacedNiftiMask
from client.data.readers.nifti import NiftiMask
from client.data.readers.pictures import PictureMask
from client.data.types import Sample
from client.index.extract import Extractor
from client.index.store import Index

Counts = dict[str, int]


@dataclass
class Balance:
    """Samples, patients, and marked pixels of each class.

    Attributes
    ----------
    images, patients : dict
        By class. Of a segmentation: those whose masks mark it; all slices of a series count for
        what its DICOM masks mark anywhere.
    pixels : dict
        Segmentation with label maps: pixels that each class has in all masks together; contours
        count as none.
    """

    images: Counts
    patients: Counts
    pixels: Counts


def balance(
    dataset: DatasetSection, samples: Sequence[Sample], index: Index, extract: Extractor
) -> Balance:
    """Count the classes of samples."""
    marks = _Marks(dataset, index, extract)
    images: Counter[int] = Counter()
    patients: dict[int, set[str]] = defaultdict(set)
    for sample in samples:
        of = classes_of(dataset, sample.label)
        for k in set(marks.classes(sample) if dataset.task == "segmentation" else of):
            images[k] += 1
            patients[k].add(sample.patient)
    names = list(enumerate(dataset.classes))
    pixels = {name: marks.pixels[k] for k, name in names} if marks.pixels else {}
    return Balance(
        {name: images[k] for k, name in names},
        {name: len(patients[k]) for k, name in names},
        pixels,
    )


@dataclass
class _Marks:
    """What masks mark, each file looked up once."""

    dataset: DatasetSection
    index: Index
    extract: Extractor
    pixels: Counter[int] = field(default_factory=Counter)
    of_series: dict[int, tuple[SegmentedSeries, frozenset[int]]] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)

    def classes(self, sample: Sample) -> frozenset[int]:
        """The classes that a sample's mask marks, 0 being the first."""
        match sample.mask:
            case SegmentedFrame() | SegmentedVolume() as mask:
                known = self.of_series.get(id(mask.series))
                if known is None:
                    found = frozenset(k for file in mask.series.files for k in self._of_file(file))
                    known = self.of_series[id(mask.series)] = (mask.series, found)
                return known[1]
            case NiftiMask() | PlacedNiftiMask() | PictureMask() as mask:
                return frozenset(self._of_map(mask.path))
            case _:
                return frozenset()

    def _of_file(self, file: MaskFile) -> Iterator[int]:
        labels = dict(file.labels)
        for number, count in self._marked(file.path).items():
            if number in labels and count:
                self._add(file.path, labels[number] - 1, count * (file.kind == "segmentation"))
                yield labels[number] - 1
        self.seen.add(file.path)

    def _of_map(self, path: Path) -> Iterator[int]:
        last = len(self.dataset.classes) - 1
        for value, count in self._marked(path).items():
            if last == 0 or value - 1 <= last:  # one class is all that is marked
                self._add(path, 0 if last == 0 else value - 1, count)
                yield 0 if last == 0 else value - 1
        self.seen.add(path)

    def _add(self, path: Path, label: int, count: int) -> None:
        if path not in self.seen and count:
            self.pixels[label] += count

    def _marked(self, path: Path) -> dict[int, int]:
        row = self.index.connection.execute(
            "SELECT marked FROM files WHERE path = ?", (self.extract.name(path),)
        ).fetchone()
        found = json.loads(row[0]) if row and row[0] else {}
        return {int(number): int(count) for number, count in found.items()}
