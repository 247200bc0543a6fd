"""Freeze a cohort: a file with a content hash that names no person and no path."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from fedward import rule_codes
from fedward.errors import DataError, OutputError
from fedward.files import write_private
from fedward.plan.schema import Task
from fedward.rule_codes import RuleCode
from fedward_client.cohort.records import Record, Recorder, Series, Source, files_of
from fedward_client.config import DatasetSection
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.files import walk
from fedward_client.data.readers.dicom.headers import Listen, unheard
from fedward_client.data.readers.dicom.masks import SegmentedFrame, SegmentedSeries
from fedward_client.data.readers.dicom.reader import DicomVolume, label_table
from fedward_client.data.readers.dicom.series import Frames
from fedward_client.data.readers.registry import READERS, Format
from fedward_client.data.sample import BoxRows, Dataset, LeftOut, Sample, SplitName, unnamed
from fedward_client.index.extract import Extractor
from fedward_client.index.store import Index
from fedward_client.secret import Pseudonyms

# The samples that a study could use, and why the rest of a dataset is left out.

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
    return replace(found, samples=kept, left_out=found.left_out + left_out)


def check_patients(dataset: DatasetSection, found: Dataset) -> None:
    """Hold a dataset against the site's rules for patient ids and for de-identification.

    Raises
    ------
    DataError
        Images break one, and the rule is to refuse the dataset.
    """
    for refused, rule, fix, where in (
        (
            dataset.patients.options().refused,
            "the site refuses datasets with images whose patient is not known",
            "Give them ids, or choose another rule",
            "patients.missing, patients.shared",
        ),
        (
            dataset.image_options().refused,
            "the site refuses datasets with images that are not de-identified",
            "De-identify them, take them out, or choose another rule",
            "deidentification",
        ),
    ):
        counts = Counter(item.reason for item in found.left_out if item.reason in refused)
        if counts:
            told = ", ".join(f"{reason}: {n}" for reason, n in sorted(counts.items()))
            raise DataError(rule, value=told, fix=fix, where=where)


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
            return LeftOut(rule_codes.INCOMPLETE, name)
        if isinstance(sample.mask, SegmentedFrame):
            sample = replace(sample, mask=replace(sample.mask, series=self._mend(sample.mask)))
        if any(map(self._is_bad, files_of(sample, root))):
            return LeftOut(rule_codes.NO_MASK, name)
        if isinstance(sample.load, DicomVolume) and sample.load.repeated:
            if not all(self._same(frames) for frames in sample.load.repeated):
                return LeftOut(rule_codes.DUPLICATE_SLICES, name)
            sample = replace(sample, load=replace(sample.load, repeated=()))
        return sample

    def _same(self, frames: Frames) -> bool:
        """Whether files have the same pixels."""
        return len({self.index.pixels(self.extract.name(path)) for path, _ in frames}) == 1

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
        counts[rule_codes.NO_IMAGE] += idle
    return counts


def left_out_files(
    dataset: DatasetSection, index: Index, extract: Extractor
) -> list[dict[str, str]]:
    """Reason and name of each file or row that cannot serve, for the hospital's own eyes.

    Raises
    ------
    DataError
        The table of labels is broken.
    """
    root = extract.root
    names = {
        file.relative_to(root).as_posix() if file != root else file.name for file in walk(root)
    }
    unreadable = {name: index.reason(extract.name(root / name)) for name in names}
    found = {name: reason for name, reason in unreadable.items() if reason}
    try:
        others = usable(dataset, index, extract).left_out
    except DataError as error:
        if error.where not in (rule_codes.NO_TABLE, rule_codes.NO_MASKS):
            raise
        others = ()
    for item in others:
        found.setdefault(item.name, item.reason)
    return [{"reason": found[name], "name": name} for name in sorted(found)]


def _rows_without_image(dataset: DatasetSection, index: Index, extract: Extractor) -> int:
    """Rows of a DICOM label table whose key no indexed image has; other readers tell themselves."""
    if extract.format != "dicom" or not dataset.as_task().has_labels:
        return 0
    rows = label_table(dataset.root, dataset.as_task(), dataset.label_options())
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
    # An empty one is worth a report too.
    return read_dataset(spec_of(dataset, listen), dataset.as_task(), empty=True)


def spec_of(dataset: DatasetSection, listen: Listen = unheard) -> DatasetSpec:
    """A dataset of ``site.toml``, for a reader."""
    return DatasetSpec(
        dataset.root,
        dataset.format,
        masks=dataset.masks.options(),
        patients=dataset.patients.options(),
        labels=dataset.label_options(),
        boxes=dataset.boxes.options(),
        images=dataset.image_options(),
        channels=dataset.channel_options(),
        listen=listen,
    )


def classes_of(
    dataset: DatasetSection, label: tuple[int, ...] | None, boxes: BoxRows | None
) -> list[int]:
    """The classes that a label sets, or that boxes are of; none where masks mark them."""
    if label is None:
        return sorted({int(row[-1]) - 1 for row in boxes or ()})
    return [k for k, flag in enumerate(label) if flag] if dataset.multi_label else list(label)


def stated(samples: Sequence[Sample], index: Index, extract: Extractor) -> Counter[str]:
    """How many samples state of themselves what identifies a patient, by the index."""
    found: Counter[str] = Counter()
    for sample in samples:
        first = files_of(sample, extract.root)[0]
        row = index.connection.execute(
            "SELECT burned_in, identity_removed, visual_features FROM files "
            "WHERE path = ? AND format = 'dicom'",
            (extract.name(first),),
        ).fetchone() or ("", "YES", "")
        found[rule_codes.BURNED_IN] += row[0] == "YES"
        found[rule_codes.IDENTIFIED] += row[1] == "NO"
        found[rule_codes.RECOGNIZABLE] += row[2] == "YES"
    return +found


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
    tilted: bool = Field(default=False, description="whether the volume is of a leaning gantry")
    uneven: bool = Field(default=False, description="whether its slices are resampled to even ones")
    columns: dict[str, str] = Field(
        default={}, description="what the site lets studies read beside the image"
    )
    boxes: BoxRows | None = Field(
        default=None, description="of a detection: corners in pixels, and classes from 1"
    )
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
    for item in content["items"]:
        for name in ("tilted", "uneven", "columns"):
            if not item[name]:
                del item[name]
        if item["boxes"] is None:
            del item["boxes"]
        for source in (item["image"], item["mask"]):
            if source is not None and not source["parts"]:
                del source["parts"]
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
        Of :func:`fedward_client.cohort.freeze.usable`.

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
        _item(sample, place, recorder, extract.format, tuple(dataset.table))
        for place, sample in enumerate(found.samples)
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


def _item(
    sample: Sample, place: int, recorder: Recorder, format: Format, beside: Sequence[str]
) -> Item:
    # As the index hashes them: issuer and id apart.
    parts = sample.patient.split("\\", 1) if READERS[format].issuers else [sample.patient]
    return Item(
        patient=recorder.hashed("patient", *parts),
        label=sample.label,
        boxes=sample.boxes,
        split=sample.split,
        synthetic=sample.columns.get("synthetic", "").lower() in ("yes", "true", "1"),
        tilted=is_tilted(sample),
        uneven=is_uneven(sample),
        columns={name: sample.columns.get(name, "") for name in beside},
        image=recorder.source(sample.load, place),
        mask=recorder.source(sample.mask, place) if sample.mask is not None else None,
    )


def is_tilted(sample: Sample) -> bool:
    """Whether a sample is a volume of a leaning gantry, which most plans leave out."""
    return sample.columns.get("tilted") == "yes"


def is_uneven(sample: Sample) -> bool:
    """Whether a sample is a volume whose slices are unevenly apart, and are resampled."""
    return sample.columns.get("uneven") == "yes"


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
        raise DataError(RuleCode.COHORT_FILE, fix="Freeze the dataset again") from None
    return cohort


def counts(cohort: CohortFile, dataset: DatasetSection) -> dict[str, Any]:
    """What a cohort is made of, in numbers: safe to show."""
    by_class = Counter(
        k for item in cohort.items for k in classes_of(dataset, item.label, item.boxes)
    )
    names = () if dataset.masks_mark else cohort.task.classes
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
        "tilted": sum(item.tilted for item in cohort.items),
        "uneven": sum(item.uneven for item in cohort.items),
    }
