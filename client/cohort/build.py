"""The samples that a study could use, and why the rest of a dataset is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from client.cohort.sources import files_of
from client.config import DatasetSection
from client.data import reasons
from client.data.read import DatasetSpec, read_dataset
from client.data.readers.dicom import label_table
from client.data.readers.dicom_headers import Listen, unheard
from client.data.readers.dicom_masks import SegmentedFrame, SegmentedSeries
from client.data.types import Dataset, LeftOut, Sample
from client.index.extract import Extractor
from client.index.store import Index
from client.secret import Pseudonyms
from fedward.errors import DataError

# Where the index keeps what a DICOM label table may be keyed by.
_COLUMNS: Final = {
    "sopinstanceuid": "instance",
    "seriesinstanceuid": "series",
    "studyinstanceuid": "study",
    "accessionnumber": "accession",
    "patientid": "patientid",
}


def usable(
    dataset: DatasetSection, index: Index, extract: Extractor, listen: Listen = unheard
) -> Dataset:
    """Read a dataset's tables and headers, without samples of files that cannot be decoded.

    Parameters
    ----------
    dataset : DatasetSection
        Where it lies and what its labels are for.
    index : Index
        Brought up to date before.
    extract : Extractor
        Which knows the names of files in the index.
    listen : callable, optional
        Hears how many headers are read, and of how many.

    Raises
    ------
    DataError
        The dataset has no table of labels, or a broken one.
    """
    found = _read(dataset, listen)
    able = _Able(index, extract)
    items = [able(sample) for sample in found.samples]
    kept = tuple(item for item in items if isinstance(item, Sample))
    left_out = tuple(item for item in items if isinstance(item, LeftOut))
    return Dataset(kept, found.left_out + left_out)


def check_patients(dataset: DatasetSection, found: Dataset) -> None:
    """Hold a dataset against the site's rules for missing and shared patient ids.

    Raises
    ------
    DataError
        There are such ids, and the rule is to refuse the dataset.
    """
    refused = dataset.patients.options().refused
    counts = Counter(item.reason for item in found.left_out if item.reason in refused)
    if counts:
        raise DataError(
            "the site refuses datasets with images whose patient is not known",
            value=", ".join(f"{reason}: {n}" for reason, n in sorted(counts.items())),
            fix="Give them ids, or choose another rule",
            where="patients.missing, patients.shared",
        )


@dataclass
class _Able:
    """Finds out whether the files of a sample can be decoded, by the index."""

    index: Index
    extract: Extractor
    bad: dict[Path, bool] = field(default_factory=dict)
    mended: dict[int, tuple[SegmentedSeries, SegmentedSeries]] = field(default_factory=dict)

    def __call__(self, sample: Sample) -> Sample | LeftOut | None:
        """The sample, without slices beside it that cannot be decoded; or why it is left out."""
        root = self.extract.root
        images = files_of(replace(sample, mask=None), root)
        good = [path for path in images if not self._is_bad(path)]
        if not good:
            return None  # the index counts the files
        name = good[0].relative_to(root).as_posix() if good[0] != root else good[0].name
        if len(good) < len(images):
            return LeftOut(reasons.INCOMPLETE, name)
        if isinstance(sample.mask, SegmentedFrame):
            sample = replace(sample, mask=replace(sample.mask, series=self._mend(sample.mask)))
        if any(map(self._is_bad, files_of(sample, root))):
            return LeftOut(reasons.NO_MASK, name)
        return sample

    def _mend(self, mask: SegmentedFrame) -> SegmentedSeries:
        series = mask.series
        if id(series) not in self.mended:  # one object for all its slices, as before
            frames = tuple(one for one in series.frames if not self._is_bad(one[0]))
            one = series if len(frames) == len(series.frames) else replace(series, frames=frames)
            self.mended[id(series)] = (series, one)
        return self.mended[id(series)][1]

    def _is_bad(self, path: Path) -> bool:
        if path not in self.bad:  # the slices of a segmented series share all their files
            self.bad[path] = bool(self.index.reason(self.extract.name(path)))
        return self.bad[path]


def why_unreadable(index: Index) -> Counter[str]:
    """By file: what the scan said of its pixels."""
    rows = index.connection.execute(
        "SELECT reason, count(*) FROM files WHERE reason != '' GROUP BY 1"
    )
    return Counter(dict(rows))


def why_left_out(
    dataset: DatasetSection, found: Dataset, index: Index, extract: Extractor
) -> Counter[str]:
    """By file: what the scan said of its pixels leads, then what the reader says of its use."""
    counts = why_unreadable(index)
    for item in found.left_out:
        # The name may be a table's key, and that may look like a path from the root of the disk.
        if PurePosixPath(item.name).is_absolute() or not index.reason(
            extract.name(extract.root / item.name)
        ):
            counts[item.reason] += 1
    if idle := _rows_without_image(dataset, index, extract):
        counts[reasons.NO_IMAGE] += idle
    return counts


def _rows_without_image(dataset: DatasetSection, index: Index, extract: Extractor) -> int:
    """Rows of a DICOM label table whose key no indexed image has; other readers tell themselves."""
    if extract.format != "dicom" or dataset.task == "segmentation":
        return 0
    rows = label_table(dataset.root, dataset.as_task(), dataset.labels.options())
    if rows is None:
        return 0
    column = _COLUMNS.get(rows.column)
    if column is None:
        return 0
    hashed = Pseudonyms(extract.secret)
    known = f"SELECT 1 FROM files WHERE {column} = ? LIMIT 1"
    return sum(
        index.connection.execute(known, (hashed(rows.column, key),)).fetchone() is None
        for key in rows.entries
    )


def _read(dataset: DatasetSection, listen: Listen) -> Dataset:
    spec = DatasetSpec(
        dataset.root,
        dataset.format,
        masks=dataset.masks.options(),
        patients=dataset.patients.options(),
        labels=dataset.labels.options(),
        listen=listen,
    )
    return read_dataset(spec, dataset.as_task(), empty=True)  # an empty one is worth a report too


def classes_of(dataset: DatasetSection, label: tuple[int, ...] | None) -> list[int]:
    """The classes that a label sets; none for a segmentation."""
    if label is None:
        return []
    return [k for k, flag in enumerate(label) if flag] if dataset.multi_label else list(label)


def modalities(samples: Sequence[Sample], index: Index, extract: Extractor) -> list[str]:
    """The modality of each sample's image by the index; "" where none is stated."""
    found = []
    for sample in samples:
        first = files_of(sample, extract.root)[0]
        row = index.connection.execute(
            "SELECT modality FROM files WHERE path = ?", (extract.name(first),)
        ).fetchone()
        found.append(str(row[0]) if row else "")
    return found
