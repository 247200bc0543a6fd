"""Options of ``site.toml`` for labels, masks and patients: files, columns and word mappings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from fedward import rule_codes
from fedward.config_section import Place, Section, validate_config
from fedward.errors import ConfigError, DataError
from fedward.plan.image_filter import HOW, Patterns
from fedward.plan.schema import Task
from fedward_client.data import labels
from fedward_client.data.files import stem
from fedward_client.data.readers.dicom.kinds import IdentityRule, ImageOptions

# What the segments of a mask mean, as a site says it.

Labels = tuple[tuple[int, int], ...]

_YES: Final = frozenset({"1", "1.0", "yes", "true"})


@dataclass(frozen=True)
class MaskOptions:
    """How segments of a DICOM segmentation and regions of a structure set become classes.

    Attributes
    ----------
    segments : mapping
        Segment label or region name (any case), or number, to the name of a class; those without
        an entry take the class of their own name, if there is one.
    threshold : float
        Least share of its largest value at which a fractional segment counts, above 0, at most 1.
    background : tuple of str
        Labels (any case) that mean nothing; they do not count when a file's only segment is taken
        for the only class.
    readers : tuple of str
        Patterns for the name of who drew a file; those of others do not count. None: all do.
    several : str
        What becomes of series of which several readers drew one class: "leave-out" or "merge".
    resize : bool
        Whether a mask in a picture is resized to its image, where both have the same proportions.
    suffix : str
        What the name of a mask file ends in before its format, beyond its image's; "": nothing, or
        what all of them have in common.
    """

    segments: Mapping[str, str] = field(default_factory=dict)
    threshold: float = 0.5
    background: tuple[str, ...] = ("background",)
    readers: tuple[str, ...] = ()
    several: Literal["leave-out", "merge"] = "leave-out"
    resize: bool = False
    suffix: str = ""

    def labels(self, found: Sequence[tuple[int, str]], classes: Sequence[str]) -> Labels:
        """Pairs of a segment's number and its label, 1 being the first class.

        Parameters
        ----------
        found : sequence
            Number and name of each segment of a file.
        classes : sequence of str
            Of the task.

        Raises
        ------
        DataError
            "unknown class in mask": none of the segments is of a class.
        ConfigError
            `segments` names a class that the task does not have.
        """
        names = [plain(name) for name in classes]
        chosen = {name: place for place, name in reversed(list(enumerate(names, start=1)))}
        mapped = {plain(key): self._class(chosen, name) for key, name in self.segments.items()}
        matched = []
        for number, name in found:
            word = plain(name)
            label = mapped.get(word) or mapped.get(str(number)) or chosen.get(word)
            if label:
                matched.append((number, label))
        rest = [number for number, name in found if plain(name) not in map(plain, self.background)]
        if not matched and not mapped and len(rest) == len(names) == 1:
            matched = [(rest[0], 1)]
        if not matched:
            raise rule_codes.unusable(rule_codes.MASK_CLASS)
        return tuple(matched)

    def _class(self, chosen: Mapping[str, int], name: str) -> int:
        if plain(name) not in chosen:
            raise ConfigError(
                "a segment must be given a class of the task",
                value=name,
                fix="Name one of the classes",
                where="masks.segments",
            )
        return chosen[plain(name)]


def plain(text: str) -> str:
    """A name without case and space around it."""
    return text.strip().casefold()


@dataclass(frozen=True)
class ColumnOptions:
    """How a column of the table of labels serves as one of a plan's.

    Attributes
    ----------
    column : str
        Its name in the table; "": the same.
    words : mapping
        Word of the table (any case) to a value of the plan's.
    """

    column: str = ""
    words: Mapping[str, str] = field(default_factory=dict)

    def of(self, text: str) -> str:
        """What a cell says in the plan's words."""
        return {plain(word): to for word, to in self.words.items()}.get(plain(text), text)


@dataclass(frozen=True)
class BoxOptions:
    """Where boxes are.

    Attributes
    ----------
    source : str
        "table": a table or a COCO file; "yolo": a text file for each image, in ``labels/``;
        "masks": around what masks mark.
    file : Path or None
        The table; None: the first of :data:`BOX_TABLES` in the dataset.
    words : mapping
        Word for a class (any case) to the name of a class; others are names or numbers of classes.
    others : str
        What becomes of boxes of no class: "leave-out" leaves their images out, "ignore" the boxes.
    """

    source: Literal["table", "yolo", "masks"] = "table"
    file: Path | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    others: Literal["leave-out", "ignore"] = "leave-out"

    def class_of(self, word: str, task: Task) -> int | None:
        """The class that a word of a table means, from 0; None: the box does not count.

        Raises
        ------
        DataError
            "unknown class".
        """
        known = {plain(one): to for one, to in self.words.items()}
        try:
            return labels.class_index(known.get(plain(word), word), task)
        except DataError:
            if self.others == "ignore":
                return None
            raise rule_codes.unusable(rule_codes.UNKNOWN_CLASS) from None

    def table(self, root: Path) -> Path | None:
        """Where the table lies; None when there is none."""
        inside = (root / name for name in BOX_TABLES)
        return self.file or next((path for path in inside if path.is_file()), None)


BOX_TABLES: Final = ("boxes.csv", "boxes.xlsx", "boxes.json")
TABLES: Final = ("labels.csv", "labels.xlsx")
SEPARATORS: Final = re.compile(r"[|;]")


@dataclass(frozen=True)
class LabelOptions:
    """How a table is read.

    Attributes
    ----------
    file : Path or None
        The table; None: ``labels.csv`` or ``labels.xlsx`` in the dataset.
    sheet : str
        Of a workbook; "": its first.
    header : int
        The row of the column names, from 1.
    key, means : str
        The column of the keys, and what they are (lower case); "": found by name.
    column : str
        The column of the label.
    patient_column : str
        The column that names the patients, of this table or of ``patients.csv``; "": found by
        name.
    columns : mapping
        Column of 0 and 1 to the name of its class.
    words : mapping
        Word of the table (any case) to the name of a class; others are names or numbers of classes.
    none : tuple of str
        Multi-label: words (any case) for none of the classes.
    unlabelled : tuple of str
        Words (any case) that leave an image without a label.
    yes, no : tuple of str
        Words (any case; "" is an empty cell) of a class's own column beside 1 and 0, yes and no,
        true and false.
    beside : mapping
        A plan's column of what is known beside the image, to the column here.
    rows : str
        "agree": rows of one image must say the same; "add": multi-label, their classes add up.
    """

    file: Path | None = None
    sheet: str = ""
    header: int = 1
    key: str = ""
    means: str = ""
    column: str = "label"
    patient_column: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    none: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()
    beside: Mapping[str, ColumnOptions] = field(default_factory=dict)
    rows: Literal["agree", "add"] = "agree"

    def label_of_row(self, row: Mapping[str, str], task: Task) -> tuple[int, ...]:
        """The label of a table row, whose column names are in lower case.

        Raises
        ------
        DataError
            "no label", "unknown class" or "conflicting labels".
        """
        found = {name: text for name, text in row.items() if name != "label"}
        of_class = {low(name): low(to) for name, to in self.columns.items()}
        for name in [*map(low, task.classes), *of_class]:
            if name in row:
                found[of_class.get(name, name)] = self._flag(row[name])
        if (column := low(self.column)) in row:
            if self._is_one(row[column], self.unlabelled):
                raise rule_codes.unusable(rule_codes.NO_LABEL)
            if task.multi_label and self._is_one(row[column], self.none):
                return labels.flags(set(), task)
            found["label"] = self._named(row[column], task)
        return labels.label_of_row(found, task)

    def table(self, root: Path) -> Path | None:
        """Where the table lies; None when there is none."""
        inside = (root / name for name in TABLES)
        return self.file or next((path for path in inside if path.is_file()), None)

    def class_of_folder(self, name: str, task: Task) -> int:
        """The class that a folder of images is of.

        Raises
        ------
        DataError
            "no label" or "unknown class".
        """
        if not name or self._is_one(name, self.unlabelled):
            raise rule_codes.unusable(rule_codes.NO_LABEL)
        known = {plain(word): to for word, to in self.words.items()}
        return labels.class_index(known.get(plain(name), name), task)

    def _flag(self, text: str) -> str:
        if self._is_one(text, self.unlabelled):
            raise rule_codes.unusable(rule_codes.NO_LABEL)
        return "1" if self._is_one(text, self.yes) else "0" if self._is_one(text, self.no) else text

    @staticmethod
    def _is_one(text: str, words: tuple[str, ...]) -> bool:
        return plain(text) in map(plain, words)

    def _named(self, text: str, task: Task) -> str:
        known = {plain(word): name for word, name in self.words.items()}
        if plain(text) in known or not task.multi_label:
            return known.get(plain(text), text)
        return "|".join(known.get(plain(part), part) for part in SEPARATORS.split(text))


def low(text: str) -> str:
    """A column's name as tables are searched for it."""
    return text.strip().lower()


# Whose an image is when its patient id is missing or stands for nobody, as a site says it.

Rule = Literal["leave-out", "refuse", "study", "series"]
SharedRule = Literal["leave-out", "refuse", "study", "series", "keep"]
_OF: Final = {"study": "studyinstanceuid", "series": "seriesinstanceuid"}


@dataclass(frozen=True)
class ChannelOptions:
    """Where a channel of a dataset's images is.

    Attributes
    ----------
    plane : int
        Of the image's file, from 0.
    suffix, folder : str
        What the file of the channel ends in before its format, and a folder on the way to it; both
        "": all channels are in one file.
    missing : str
        Column of a table that says, with 1, yes or true, that an image lacks the channel, whatever
        its file holds in its place; "": no image does.
    """

    plane: int = 0
    missing: str = ""
    suffix: str = ""
    folder: str = ""

    @property
    def by_file(self) -> bool:
        """Whether it has files of its own."""
        return bool(self.suffix or self.folder)

    def place(self, path: Path) -> Path | None:
        """The case that a file is of, by its path within the dataset; None: of another channel."""
        name, parents = stem(path), list(path.parent.parts)
        if not name.endswith(self.suffix) or (self.folder and self.folder not in parents):
            return None
        if self.folder:
            parents.remove(self.folder)
        return Path(*parents, name.removesuffix(self.suffix))

    def lacking(self, cells: Mapping[str, str]) -> bool:
        """Whether a table says that an image lacks it; `cells` by name in lower case."""
        text = cells.get(self.missing.strip().casefold(), "")
        return bool(self.missing) and text.strip().casefold() in _YES


@dataclass(frozen=True)
class PatientOptions:
    """What missing and shared patient ids mean.

    Attributes
    ----------
    shared_ids : frozenset of str
        Ids without case that stand for nobody in particular.
    missing, shared : str
        What becomes of images without an id, and of those with a shared one: "leave-out" counts
        them; "refuse" does too, and no study may use the dataset; "study" and "series" take each
        study or series (in folders of pictures and NIfTI: each image) for a patient of its own;
        "keep" takes all with one id for one patient.
    folder : int
        Which folder on an image's path is its patient, from 1; 0: none. Pictures and NIfTI.
    """

    shared_ids: frozenset[str] = frozenset()
    missing: Rule = "leave-out"
    shared: SharedRule = "keep"
    folder: int = 0

    def nobody(self, patient_id: str) -> Literal["missing", "shared", ""]:
        """Whether an id stands for nobody, and why."""
        if not patient_id.strip():
            return "missing"
        return "shared" if patient_id.strip().casefold() in self.shared_ids else ""

    def patient(self, words: Mapping[str, str]) -> tuple[str, str]:
        """Issuer and id of an image's patient, as they are hashed and compared.

        Parameters
        ----------
        words : mapping
            Attributes of the file, their names in lower case.

        Raises
        ------
        DataError
            "no patient id" or "shared patient id": by the rule the image is left out.
        """
        issuer, patient_id = (
            # One id may be written in two ways where letters have accents.
            unicodedata.normalize("NFC", words.get(name, "").strip())
            for name in ("issuerofpatientid", "patientid")
        )
        nobody = self.nobody(patient_id)
        rule = {"": "keep", "missing": self.missing, "shared": self.shared}[nobody]
        if rule == "keep":
            return issuer, patient_id
        uid = words.get(_OF[rule], "").strip() if rule in _OF else ""
        if not uid:
            raise rule_codes.unusable(
                rule_codes.NO_PATIENT if nobody == "missing" else rule_codes.SHARED_PATIENT
            )
        # No id has a backslash (PS3.5, 6.2), so this one is nobody else's.
        return issuer, f"\\{rule}\\{uid}"

    @property
    def parts(self) -> tuple[str, ...]:
        """What DICOM files are read by, as text, to be hashed."""
        return (*sorted(self.shared_ids), self.missing, self.shared)

    @property
    def refused(self) -> frozenset[str]:
        """Reasons that no study may come across."""
        rules = {rule_codes.NO_PATIENT: self.missing, rule_codes.SHARED_PATIENT: self.shared}
        return frozenset(reason for reason, rule in rules.items() if rule == "refuse")


# What ``site.toml`` says of a dataset's patients, labels and masks.

Broken = Iterator[tuple[str, str, str]]  # key, rule and next step of what does not fit together


def _broken_words(key: str, words: Mapping[str, str], classes: Iterable[str]) -> Broken:
    """Of words that each lead to a class."""
    if {plain(name) for name in words.values()} - {plain(name) for name in classes}:
        yield key, "it must lead to one of `classes`", "Name one of them"
    if len({plain(word) for word in words}) != len(words):
        yield key, "a word must be listed once, in whatever case", "Remove one"


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
    folder: Annotated[int, BeforeValidator(validate_config)] = Field(
        default=0,
        ge=0,
        le=16,
        description="pictures and NIfTI: which folder on the way to an image is its patient, from "
        "1, below the dataset's folder or its `images/`; 0: none, a table names them",
    )

    def options(self) -> PatientOptions:
        """The same for a reader."""
        ids = frozenset(one.strip().casefold() for one in self.shared_ids)
        return PatientOptions(ids, self.missing, self.shared, self.folder)


class ImageSection(Section):
    """Which DICOM images belong to the dataset."""

    series_description: Patterns = Field(default=(), description=f"`SeriesDescription`: {HOW}")
    image_type: Patterns = Field(default=(), description="values of `ImageType`, likewise")
    body_part: Patterns = Field(default=(), description="`BodyPartExamined`, likewise")
    intent: Patterns = Field(
        default=(),
        description="`PresentationIntentType`, likewise. Of a study that has images for "
        "presentation, those for processing are left out in any case",
    )
    kernel: Patterns = Field(default=(), description="`ConvolutionKernel` (CT), likewise")
    keep: tuple[Literal["slide-labels", "captures"], ...] = Field(
        default=(),
        description="what is taken although it shows no patient: photographs of a slide's label, "
        "overview and thumbnail; screen captures, dose reports and scanned documents",
    )


class DeidentificationSection(Section):
    """What becomes of images that are not de-identified: `keep` takes them; `leave-out` counts
    them; `refuse` does too, and the dataset serves no study while there are any."""

    burned_in: IdentityRule = Field(default="keep", description="`BurnedInAnnotation` is YES")
    identity: IdentityRule = Field(
        default="keep", description="`PatientIdentityRemoved` is not YES"
    )
    visual_features: IdentityRule = Field(
        default="keep", description="`RecognizableVisualFeatures` is YES: a face, for example"
    )

    def options(self, images: ImageSection) -> ImageOptions:
        """The same for a reader, with the images that are selected."""
        patterns = images.model_dump(exclude={"keep"})
        return ImageOptions(patterns, frozenset(images.keep), **self.model_dump())


class LabelSection(Section):
    """How the table of labels is read."""

    file: Place | None = Field(
        default=None,
        description="the table, CSV or XLSX, inside the dataset or not; without it "
        "`labels.csv` or `labels.xlsx` in the dataset's folder",
    )
    sheet: MaybeWord = Field(default="", description="sheet of a workbook; none: its first")
    header: Annotated[int, BeforeValidator(validate_config)] = Field(
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

    def options(self, beside: Mapping[str, ColumnSection] | None = None) -> LabelOptions:
        """The same for a reader, with the columns that studies may read beside the images."""
        means = low(self.means) if self.means else ""
        values = self.model_dump(exclude={"means"})
        columns = {name: one.options() for name, one in (beside or {}).items()}
        return LabelOptions(**{**values, "means": means, "beside": columns})

    def broken(self, classes: tuple[str, ...], multi_label: bool) -> Broken:
        """Key, rule and next step of what does not fit together."""
        for key, given in (("words", self.words), ("columns", self.columns)):
            yield from _broken_words(f"labels.{key}", given, classes)
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


class BoxSection(Section):
    """Where the boxes of a detection are."""

    source: Literal["table", "yolo", "masks"] = Field(
        default="table",
        description="`table`: a table with a row for each box, or a COCO file; `yolo`: "
        "`labels/`, with a text file for each image; `masks`: `masks/`, a box around each "
        "connected part of what masks mark",
    )
    file: Place | None = Field(
        default=None,
        description="`table`: CSV, XLSX or COCO's JSON, inside the dataset or not; without it "
        "`boxes.csv`, `boxes.xlsx` or `boxes.json` in the dataset's folder",
    )
    words: dict[Word, str] = Field(
        default={},
        description="word for a class (any case) to the name of a class; others count by name or "
        "number",
    )
    others: Literal["leave-out", "ignore"] = Field(
        default="leave-out",
        description="boxes of none of the classes: `leave-out` leaves their images out and counts "
        "them; `ignore`: they count as background",
    )

    def options(self) -> BoxOptions:
        """The same for a reader."""
        return BoxOptions(**dict(self))

    def broken(self, classes: tuple[str, ...]) -> Broken:
        """Key, rule and next step of what does not fit together."""
        yield from _broken_words("boxes.words", self.words, classes)
        if self.file is not None and self.source != "table":
            yield "boxes.file", f"source `{self.source}` has no table", "Remove it"

    def placed(self, folder: Path) -> BoxSection:
        """With the table's path relative to no folder any more."""
        return self.model_copy(update={"file": folder / self.file}) if self.file else self


class ColumnSection(Section):
    """A column of the table of labels that studies may read beside the images; its values stay
    at the site."""

    column: MaybeWord = Field(
        default="", description="its name in the table of labels; none: that of the section"
    )
    unit: str = Field(
        default="",
        max_length=32,
        description="of its numbers; a study whose plan states another one is refused",
    )
    words: dict[MaybeWord, str] = Field(
        default={},
        description="word of the table (any case) to a value of the plan's; others count as they "
        "are",
    )

    def options(self) -> ColumnOptions:
        """The same for a reader."""
        return ColumnOptions(self.column, self.words)


class ChannelSection(Section):
    """One named channel of the dataset's images, such as a sequence of an MRI."""

    plane: int = Field(
        default=0, ge=0, le=15, description="of the image's file, from 0: the red one is 0"
    )
    suffix: MaybeWord = Field(
        default="",
        description="what the name of the channel's own file ends in before its format: with `_t1` "
        "`P7_t1.nii.gz` is a channel of the image `P7`",
    )
    folder: MaybeWord = Field(
        default="", description="or: the folder in which the channel's own files lie"
    )
    missing: MaybeWord = Field(
        default="",
        description="column of the table of labels or of `patients.csv` that says, with 1, yes or "
        "true, that an image lacks the channel, whatever its file holds there",
    )

    def options(self) -> ChannelOptions:
        """The same for a reader."""
        return ChannelOptions(**dict(self))


class MaskSection(Section):
    """What segments of DICOM segmentations and regions of structure sets mean, and what may be
    done to masks."""

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

    readers: Patterns = Field(
        default=(),
        description="whose masks count: patterns for `ContentCreatorName` (segmentations), "
        "`ReviewerName` or `OperatorsName` (structure sets), as for images; none: everybody's",
    )
    several: Literal["leave-out", "merge"] = Field(
        default="leave-out",
        description="series of which several of these readers drew the same class: leave them out, "
        "or merge what they drew",
    )
    resize: bool = Field(
        default=False,
        description="masks in pictures (PNG and the like) of another size than their image, but of "
        "its proportions, are resized to it by the nearest pixel; otherwise they are left out",
    )
    suffix: MaybeWord = Field(
        default="",
        description="what the name of a mask (picture or NIfTI) ends in before its format: with "
        "`_seg` `P7_seg.nii.gz` is of the image `P7`, and files that do not end so are left out; "
        "without it an ending that all masks share and that can be told apart is found",
    )

    def options(self) -> MaskOptions:
        """The same for a reader."""
        return MaskOptions(**dict(self))

    def broken(self, classes: tuple[str, ...]) -> Broken:
        """Key, rule and next step of what does not fit together."""
        yield from _broken_words("masks.segments", self.segments, classes)
        if {plain(word) for word in self.segments} & {plain(word) for word in self.background}:
            rule = "a segment must not be background and a class at once"
            yield "masks.segments", rule, "Remove it from one of them"
