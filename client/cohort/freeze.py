"""A cohort with a content hash, kept as a file that names no person and no path."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from client.cohort.build import check_patients, classes_of
from client.cohort.private import write_private
from client.cohort.sources import Record, Recorder, Series, Source, files_of
from client.config import DatasetSection
from client.data.types import Dataset, Format, Sample, SplitName, unnamed
from client.index.extract import Extractor
from client.index.store import Index
from client.secret import Pseudonyms
from fedward.errors import DataError, OutputError
from fedward.plan.schema import Task


class FileRecord(Record):
    """A file as it was frozen; the last three tell cheaply whether to look at it again."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int
    modified: int
    changed: int


class Item(Record):
    """One sample."""

    patient: str = Field(min_length=1, description="keyed hash of the patient")
    label: tuple[int, ...] | None
    split: SplitName | None
    synthetic: bool
    image: Source
    mask: Source | None


class CohortFile(Record):
    """What ``state/cohorts/NAME-HASH12.json`` holds."""

    version: Literal[1]
    dataset: str
    format: Format
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the content, see content_hash")
    task: Task
    files: dict[str, FileRecord]
    series: tuple[Series, ...]
    items: tuple[Item, ...] = Field(min_length=1)
    images_are_patients: bool | None = Field(
        default=None, description="whether the data name no patients; none: of an older release"
    )

    @property
    def name(self) -> str:
        """The cohort's name: the dataset's and the start of the hash."""
        return f"{self.dataset}-{self.sha256[:12]}"

    @property
    def patients(self) -> int:
        """How many patients it has."""
        return len({item.patient for item in self.items})

    @property
    def per_image(self) -> bool:
        """Whether an image counts as a patient; of an older record it is assumed where it may be.

        DICOM files always name their patient; else no patient has two images if none is named.
        """
        if self.images_are_patients is not None:
            return self.images_are_patients
        return self.format != "dicom" and self.patients == len(self.items)


def content_hash(cohort: CohortFile) -> str:
    """SHA-256 of canonical JSON: task, bytes of the files, samples; not where or when they lay."""
    content: dict[str, Any] = cohort.model_dump(mode="json", exclude={"dataset", "sha256"})
    if not cohort.images_are_patients:  # so that cohorts of older releases keep their hash
        del content["images_are_patients"]
    content["files"] = {name: record.sha256 for name, record in cohort.files.items()}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def make_cohort(
    name: str, dataset: DatasetSection, found: Dataset, index: Index, extract: Extractor
) -> CohortFile:
    """Describe a dataset's usable samples.

    Parameters
    ----------
    name : str
        The dataset.
    found : Dataset
        Of :func:`client.cohort.build.usable`.

    Raises
    ------
    DataError
        There is no sample, a file is not in the index, or the site's rule for patient ids refuses
        the dataset.
    """
    check_patients(dataset, found)
    if not found.samples:
        raise DataError(
            "a cohort must have images",
            value="none",
            where=name,
            fix="See the report for what was left out and why",
        )
    hashed = Pseudonyms(extract.secret)
    recorder = Recorder(extract.name, extract.root, hashed)
    items = [
        _item(sample, place, recorder, extract.format) for place, sample in enumerate(found.samples)
    ]
    paths = sorted({path for s in found.samples for path in files_of(s, extract.root)})
    cohort = CohortFile(
        version=1,
        dataset=name,
        format=extract.format,
        sha256="0" * 64,
        task=dataset.as_task(),
        files={extract.name(p): _record(index, extract, p) for p in paths},
        series=recorder.all_series(),
        items=tuple(items),
        images_are_patients=unnamed(found.samples) > 0,
    )
    return cohort.model_copy(update={"sha256": content_hash(cohort)})


def _item(sample: Sample, place: int, recorder: Recorder, format: Format) -> Item:
    # As the index hashes them: issuer and id apart.
    parts = sample.patient.split("\\", 1) if format == "dicom" else [sample.patient]
    return Item(
        patient=recorder.hashed("patient", *parts),
        label=sample.label,
        split=sample.split,
        synthetic=sample.columns.get("synthetic", "").lower() in ("yes", "true", "1"),
        image=recorder.source(sample.load, place),
        mask=recorder.source(sample.mask, place) if sample.mask is not None else None,
    )


def _record(index: Index, extract: Extractor, path: Path) -> FileRecord:
    row = index.connection.execute(
        "SELECT digest, size, modified, changed FROM files WHERE path = ? AND reason = ''",
        (extract.name(path),),
    ).fetchone()
    if row is None or not row[0]:
        raise DataError("a dataset must hold still while it is frozen", fix="Freeze it again")
    return FileRecord(sha256=row[0], size=row[1], modified=row[2], changed=row[3])


def cohorts_folder(state: Path) -> Path:
    """Where a site's cohorts lie; made when it is missing.

    Raises
    ------
    OutputError
        It cannot be made.
    """
    folder = state / "cohorts"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        raise OutputError(
            "the state folder must be writable",
            fix="Give it to the user that runs this",
            where="site.state",
        ) from None
    return folder


def save(cohort: CohortFile, state: Path, *, modified: int | None = None) -> Path:
    """Write a cohort; the same content replaces its own file."""
    path = cohorts_folder(state) / f"{cohort.name}.json"
    text = json.dumps(cohort.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    write_private(path, text.encode(), modified=modified)
    return path


def load(path: Path) -> CohortFile:
    """Read a cohort back.

    Raises
    ------
    DataError
        The file is damaged, of another version, or its content is not what its hash says.
    """
    try:
        cohort = CohortFile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        cohort = None
    if cohort is None or content_hash(cohort) != cohort.sha256:
        raise DataError(
            "a cohort file must be whole and unchanged", fix="Freeze the dataset again"
        ) from None
    return cohort


def counts(cohort: CohortFile, dataset: DatasetSection) -> dict[str, Any]:
    """What a cohort is made of, in numbers: safe to show."""
    by_class = Counter(k for item in cohort.items for k in classes_of(dataset, item.label))
    names = cohort.task.classes if cohort.task.kind == "classification" else ()
    return {
        "dataset": cohort.dataset,
        "cohort": cohort.name,
        "sha256": cohort.sha256,
        "patients": cohort.patients,
        "images": len(cohort.items),
        "files": len(cohort.files),
        "bytes": sum(record.size for record in cohort.files.values()),
        "images_by_class": {name: by_class[k] for k, name in enumerate(names)},
        "images_are_patients": cohort.per_image,
    }
