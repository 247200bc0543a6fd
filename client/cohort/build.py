"""The samples that a study could use, and why the rest of a dataset is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Final

from client.cohort.sources import files_of
from client.config import DatasetSection
from client.data import reasons
from client.data.read import DatasetSpec, read_dataset
from client.data.readers.dicom_headers import KEYS
from client.data.tables import read_table
from client.data.types import Dataset, Sample
from client.index.extract import Extractor
from client.index.store import Index
from client.secret import Pseudonyms
from fedward.errors import DataError

# Where the index keeps what a DICOM label table may be keyed by.
_COLUMNS: Final = {
    "sopinstanceuid": "instance", "seriesinstanceuid": "series", "studyinstanceuid": "study",
    "accessionnumber": "accession", "patientid": "patientid",
}  # fmt: skip


def usable(dataset: DatasetSection, index: Index, extract: Extractor) -> Dataset:
    """Read a dataset's tables and headers, without samples of files that cannot be decoded.

    Parameters
    ----------
    dataset : DatasetSection
        Where it lies and what its labels are for.
    index : Index
        Brought up to date before.
    extract : Extractor
        Which knows the names of files in the index.

    Raises
    ------
    DataError
        The dataset has no table of labels, or a broken one.
    """
    found = _read(dataset)

    @cache  # the slices of a segmented series share all their files
    def is_bad(path: Path) -> bool:
        return bool(index.reason(extract.name(path)))

    def fits(sample: Sample) -> bool:
        return not any(map(is_bad, files_of(sample, extract.root)))

    return Dataset(tuple(filter(fits, found.samples)), found.left_out)


def why_left_out(
    dataset: DatasetSection, found: Dataset, index: Index, extract: Extractor
) -> Counter[str]:
    """By file: what the scan said of its pixels leads, then what the reader says of its use."""
    sql = index.connection.execute
    counts = Counter(dict(sql("SELECT reason, count(*) FROM files WHERE reason != '' GROUP BY 1")))
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
    table = next(
        (p for n in ("csv", "xlsx") if (p := dataset.root / f"labels.{n}").is_file()), None
    )
    if extract.format != "dicom" or dataset.task == "segmentation" or table is None:
        return 0
    rows = read_table(table, KEYS, dataset.as_task())
    column = _COLUMNS.get(rows.column)
    if column is None:
        return 0
    hashed = Pseudonyms(extract.secret)
    known = f"SELECT 1 FROM files WHERE {column} = ? LIMIT 1"
    return sum(
        index.connection.execute(known, (hashed(rows.column, key),)).fetchone() is None
        for key in rows.entries
    )


def _read(dataset: DatasetSection) -> Dataset:
    try:
        spec = DatasetSpec(dataset.root, dataset.format, masks=dataset.masks.options())
        return read_dataset(spec, dataset.as_task())
    except DataError as error:
        if error.rule.startswith("the dataset must hold images"):
            return Dataset(())  # an empty dataset is worth a report too
        raise


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
