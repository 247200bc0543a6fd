"""What ``site.toml`` says of a dataset's patients, labels and masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from client.data.label_options import LabelOptions, low
from client.data.mask_options import MaskOptions, plain
from client.data.patient_options import PatientOptions, Rule, SharedRule
from client.section import Place, Section, whole

Broken = Iterator[tuple[str, str, str]]  # key, rule and next step of what does not fit together
Word = Annotated[str, Field(min_length=1, max_length=64, pattern=r"\S")]
MaybeWord = Annotated[str, Field(max_length=64)]
Key = Literal[
    "PatientID",
    "AccessionNumber",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "file",
]
PatientId = Annotated[str, Field(min_length=1, max_length=64)]


class PatientSection(Section):
    """What patient ids mean."""

    shared_ids: tuple[PatientId, ...] = Field(
        default=("anon", "anonymous", "anonymized", "anonymised", "unknown", "none", "0"),
        description="ids (any case) that stand for nobody in particular",
    )
    missing: Rule = Field(
        default="leave-out",
        description="images that name no patient: `leave-out` counts them; `refuse` does too, "
        "and the dataset can neither be frozen nor checked while there are any; `study`, `series`: "
        "each is a patient of its own (pictures and NIfTI: each image is)",
    )
    shared: SharedRule = Field(
        default="leave-out",
        description="images with one of `shared_ids`: the same; `keep`: all with one id count "
        "as one patient",
    )

    def options(self) -> PatientOptions:
        """The same for a reader."""
        ids = frozenset(one.strip().casefold() for one in self.shared_ids)
        return PatientOptions(ids, self.missing, self.shared)


class LabelSection(Section):
    """How the table of labels is read."""

    file: Place | None = Field(
        default=None,
        description="the table, CSV or XLSX, inside the dataset or not; without it "
        "`labels.csv` or `labels.xlsx` in the dataset's folder",
    )
    sheet: MaybeWord = Field(default="", description="sheet of a workbook; none: its first")
    header: Annotated[int, BeforeValidator(whole)] = Field(
        default=1, ge=1, le=1000, description="row of the column names, from 1"
    )
    key: MaybeWord = Field(
        default="",
        description="column that tells which image a row is for; none: the first of "
        "`SOPInstanceUID`, `SeriesInstanceUID`, `StudyInstanceUID`, `AccessionNumber`, "
        "`PatientID`, `file` (pictures and NIfTI: `image`, `file`) that there is",
    )
    means: Key | None = Field(
        default=None, description="what that column holds, where its name does not say so"
    )
    column: Word = Field(default="label", description="column of the label")
    patient_column: MaybeWord = Field(
        default="",
        description="column that names the patients, here or in `patients.csv` (any "
        "task); none: `patient`, `patient_id`, `subject`, `case_id` and the like. DICOM files name "
        "theirs themselves",
    )
    columns: dict[Word, str] = Field(
        default={}, description="column of 0 and 1 to the name of its class, where it has another"
    )
    words: dict[Word, str] = Field(
        default={},
        description="word of the table (any case), or name of a folder of images, to "
        "the name of a class; others count by name or number",
    )
    none: tuple[MaybeWord, ...] = Field(
        default=(), description="`multi_label`: words for none of the classes"
    )
    unlabelled: tuple[MaybeWord, ...] = Field(
        default=(), description="words that leave an image without a label"
    )
    yes: tuple[MaybeWord, ...] = Field(
        default=(), description="words of a class's own column that mean 1 (beside 1, yes, true)"
    )
    no: tuple[MaybeWord, ...] = Field(
        default=(), description='words that mean 0 (beside 0, no, false); `""` is an empty cell'
    )
    rows: Literal["agree", "add"] = Field(
        default="agree",
        description="several rows for one image: `agree`: must say the same, else "
        "the image is left out; `add`: their classes add up (`multi_label`)",
    )

    def options(self) -> LabelOptions:
        """The same for a reader."""
        means = low(self.means) if self.means else ""
        values = self.model_dump(exclude={"means"})
        return LabelOptions(**{**values, "means": means})

    def broken(self, classes: tuple[str, ...], multi_label: bool) -> Broken:
        """Key, rule and next step of what does not fit together."""
        names = {plain(name) for name in classes}
        for key, given in (("words", self.words), ("columns", self.columns)):
            if {plain(name) for name in given.values()} - names:
                yield f"labels.{key}", "it must lead to one of `classes`", "Name one of them"
            if len({plain(word) for word in given}) != len(given):
                yield f"labels.{key}", "a word must be listed once, in whatever case", "Remove one"
        for pair in (
            (self.words, self.unlabelled),
            (self.yes, self.no),
            (self.words, self.none),
            (self.none, self.unlabelled),
            (self.yes, self.unlabelled),
            (self.no, self.unlabelled),
        ):
            if {plain(word) for word in pair[0]} & {plain(word) for word in pair[1]}:
                yield "labels", "a word must have one meaning", "Remove it from one of the lists"
        if (self.none or self.rows == "add") and not multi_label:
            key = "labels.none" if self.none else "labels.rows"
            yield key, "it belongs to multi_label", "Remove it, or set multi_label"
        if self.file is not None and self.file.suffix.lower() not in (
            ".csv",
            ".tsv",
            ".txt",
            ".xlsx",
            ".xlsm",
        ):
            yield "labels.file", "the table must be CSV or XLSX", "Save it as one of these"

    def placed(self, folder: Path) -> LabelSection:
        """With the table's path relative to no folder any more."""
        return self.model_copy(update={"file": folder / self.file}) if self.file else self


class MaskSection(Section):
    """What the segments of DICOM segmentations and the regions of structure sets mean."""

    segments: dict[Word, str] = Field(
        default={},
        description="segment label or region name (any case), or number in quotes, to "
        "the name of a class; the others take the class of their own name, if there is one",
    )
    threshold: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="least share of its largest value at which a fractional segment counts",
    )
    background: tuple[Word, ...] = Field(
        default=("background",),
        description="labels (any case) that mean nothing, so that a file whose only other segment "
        "is the dataset's only class needs no `segments`",
    )

    def options(self) -> MaskOptions:
        """The same for a reader."""
        return MaskOptions(self.segments, self.threshold, self.background)

    def broken(self, classes: tuple[str, ...]) -> Broken:
        """Key, rule and next step of what does not fit together."""
        words = [plain(word) for word in self.segments]
        if len(set(words)) != len(words):
            yield "masks.segments", "a segment must be listed once, in whatever case", "Remove one"
        if {plain(name) for name in self.segments.values()} - {plain(name) for name in classes}:
            yield "masks.segments", "a segment must be given one of `classes`", "Name one of them"
        if set(words) & {plain(word) for word in self.background}:
            rule = "a segment must not be background and a class at once"
            yield "masks.segments", rule, "Remove it from one of them"
