"""What may be said outside a hospital: codes of broken rules, and reasons to leave an image out."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, unique
from functools import lru_cache
from string import Formatter
from typing import Any, Final, get_args

from fedward.errors import DataError

NOT_READABLE: Final = "not readable"
NOT_DICOM: Final = "not DICOM"
NO_PIXELS: Final = "no pixel data"
OTHER_MODALITY: Final = "other modality"
NO_PATIENT: Final = "no patient id"
SHARED_PATIENT: Final = "shared patient id"
NO_LABEL: Final = "no label"
UNKNOWN_CLASS: Final = "unknown class"
CONFLICTING: Final = "conflicting labels"
NO_MASK: Final = "no mask"
AMBIGUOUS: Final = "ambiguous name of mask"
SEVERAL_READERS: Final = "masks of several readers"
NO_IMAGE: Final = "no image"
DUPLICATE: Final = "duplicate"
WRONG_SHAPE: Final = "shape does not fit the task"
MASK_SHAPE: Final = "shape of mask differs"
MASK_POSITION: Final = "position of mask differs"
MASK_CLASS: Final = "unknown class in mask"
NO_CONTOURS: Final = "no closed contour"
INCOMPLETE: Final = "slices missing"
UNEVEN: Final = "slices uneven"
DUPLICATE_SLICES: Final = "duplicate slices"
SCOUT: Final = "scout or localizer"
MOSAIC: Final = "mosaic of slices"
TILTED: Final = "gantry tilt"
SLIDE_LABEL: Final = "slide label or overview"
CAPTURE: Final = "screen capture or report"
FOR_PROCESSING: Final = "for processing"
NOT_SELECTED: Final = "not selected"
BURNED_IN: Final = "text burnt in"
IDENTIFIED: Final = "identity not removed"
RECOGNIZABLE: Final = "recognizable features"
TOO_LARGE: Final = "too large"
CHANGED: Final = "changed while read"
NOT_PERMITTED: Final = "not permitted"
NOT_A_FILE: Final = "not a file"
LINKED: Final = "linked folder"
HIDDEN: Final = "hidden"
DECODER_FAILED: Final = "decoder failed"
OTHER_FORMAT: Final = "other format"
CHANNEL_SHAPE: Final = "channels of different size"
CHANNEL_POSITION: Final = "channels of different places"
CHANNEL_MISSING: Final = "channel missing"
VALUE_MISSING: Final = "value missing in table"
VALUE_RANGE: Final = "value outside the plan's range"
VALUE_UNKNOWN: Final = "unknown value in table"
BOX_OUTSIDE: Final = "box outside its image"
BOX_AREA: Final = "box without area"
BOX_NUMBERS: Final = "box is not numbers"
MANY_BOXES: Final = "too many boxes"

REASONS: Final = frozenset(
    {
        NOT_READABLE,
        NOT_DICOM,
        NO_PIXELS,
        OTHER_MODALITY,
        NO_PATIENT,
        SHARED_PATIENT,
        NO_LABEL,
        UNKNOWN_CLASS,
        CONFLICTING,
        NO_MASK,
        AMBIGUOUS,
        SEVERAL_READERS,
        NO_IMAGE,
        DUPLICATE,
        WRONG_SHAPE,
        MASK_SHAPE,
        MASK_POSITION,
        MASK_CLASS,
        NO_CONTOURS,
        INCOMPLETE,
        UNEVEN,
        DUPLICATE_SLICES,
        SCOUT,
        MOSAIC,
        TILTED,
        SLIDE_LABEL,
        CAPTURE,
        FOR_PROCESSING,
        NOT_SELECTED,
        BURNED_IN,
        IDENTIFIED,
        RECOGNIZABLE,
        TOO_LARGE,
        CHANGED,
        NOT_PERMITTED,
        NOT_A_FILE,
        LINKED,
        HIDDEN,
        DECODER_FAILED,
        OTHER_FORMAT,
        CHANNEL_SHAPE,
        CHANNEL_POSITION,
        CHANNEL_MISSING,
        VALUE_MISSING,
        VALUE_RANGE,
        VALUE_UNKNOWN,
        BOX_OUTSIDE,
        BOX_AREA,
        BOX_NUMBERS,
        MANY_BOXES,
    }
)

# Where an error says that a dataset has no table of labels, or no masks, at all.
NO_TABLE: Final = "labels"
NO_MASKS: Final = "masks"


def unusable(reason: str) -> DataError:
    """The error with which a sample's ``load`` or ``mask`` says that the image is left out."""
    return DataError(RuleCode.IMAGE, values={"reason": reason}, fix="Mend the file or take it out")


def reason_of(error: BaseException) -> str:
    """The fixed reason behind an error: its own, or "not readable" for anything else.

    A process that ran out of the memory that it may take met something "too large".
    """
    if isinstance(error, DataError) and error.rule in REASONS:
        return error.rule
    if isinstance(error, MemoryError):
        return TOO_LARGE
    return NOT_READABLE


# The codes of the rules that a refusal may name.

FIX: Final = "Change the plan, or ask the site's security officer"

Value = int | float | str | tuple[str, ...]
Values = Mapping[str, Value]

_DIGITS: Final = 4  # significant ones: cannot hold a date, a record number or an exact size
_MOST: Final = 1e12
_MODES: Final = ("validation", "test", "train")
_AMOUNTS: Final = ("patients", "images", "images of a class", "counts", "left out", "seconds")


def _figure(value: float) -> float:
    return float(f"{min(max(float(value), -_MOST), _MOST):.{_DIGITS}g}")


def _count(value: float) -> int:
    return int(_figure(value))


def _size(value: float) -> str:
    return f"{value / 1e6:.4g} million" if value >= 10_000 else str(round(value))


@dataclass(frozen=True)
class _Kind:
    """A type of value: which words or numbers it takes, and how it is written in a text."""

    type: type
    words: Callable[[], Collection[str]] = tuple
    cut: Callable[[float], float] = _figure
    show: Callable[[Any], str] = str

    def holds(self, value: object) -> bool:
        if type(value) is not self.type:
            return False
        if isinstance(value, int | float):
            return abs(value) <= _MOST and self.cut(value) == value
        return {value} <= set(self.words()) if isinstance(value, str) else self._row(value)

    def _row(self, value: object) -> bool:
        row = value if isinstance(value, tuple) else ()
        plain = all(type(word) is str for word in row)
        return plain and len(set(row)) == len(row) and set(row) <= set(self.words())


@lru_cache(maxsize=1)
def _plan_keys() -> frozenset[str]:
    """Every key of a plan, ``section.key``; "plan" for the whole."""
    from fedward.plan.schema import Plan, Section

    def keys(model: type[Section], prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield f"{prefix}{name}"
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from keys(inner, f"{prefix}{name}.")

    return frozenset({"plan", *keys(Plan)})


def plan_key(where: str) -> str:
    """The key of the schema that a place in a plan belongs to; "plan" where there is none."""
    while where and where not in _plan_keys():
        where = where.rpartition(".")[0]
    return where or "plan"


def _models() -> Collection[str]:
    from fedward.plan.schema import ModelName

    return get_args(ModelName)


def _tasks() -> Collection[str]:
    from fedward.plan.schema import Task

    return get_args(Task.model_fields["kind"].annotation)


@lru_cache(maxsize=1)
def _fields() -> frozenset[str]:
    """Keys of the records; "record" for a whole one."""
    from fedward import protocol

    kinds = (getattr(protocol, name) for name in RECORDS)
    return frozenset({"record", *(key for kind in kinds for key in kind.model_fields)})


EXCEPTIONS: Final = frozenset(
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
)
RECORDS: Final = ("RoundOrder", "SiteFacts", "TrainOutcome", "EvaluateOutcome", "Refusal")
_KINDS: Final = {
    "count": _Kind(int, cut=_count),
    "figure": _Kind(float, show=lambda value: f"{value:.4g}"),
    "size": _Kind(float, show=_size),
    "model": _Kind(str, _models),
    "task": _Kind(str, _tasks),
    "part": _Kind(str, lambda: _MODES),
    "key": _Kind(str, _plan_keys),
    "record": _Kind(str, lambda: RECORDS),
    "field": _Kind(str, _fields),
    "amount": _Kind(str, lambda: _AMOUNTS),
    "exception": _Kind(str, lambda: EXCEPTIONS),
    "reason": _Kind(str, lambda: REASONS),
    "reasons": _Kind(tuple, lambda: REASONS, show=lambda row: ", ".join(row) or "no images"),
}


@unique
class RuleCode(Enum):
    """A rule that something at a site broke: all that a refusal says, beside typed values.

    A member declares its text and what was found, as its readers see them. ``{name:kind}`` declares
    a value, by name and kind; a refusal carries exactly the values that its code declares. Numbers
    are cut to four significant digits. Words are those of closed lists that this release holds: no
    text of a plan, a file or an error is among them.
    """

    def __init__(self, text: str, found: str = "") -> None:
        self.text, self._found = text, found
        parts = Formatter().parse(f"{text} {found}")
        self.kinds: dict[str, str] = {name: kind or "" for _, name, kind, _ in parts if name}

    # general
    POLICY = ("the site's policy does not allow it",)
    BUDGET = ("the study must stay within the site's privacy budget",)
    PRIVACY = ("the site cannot reach the privacy that the plan asks for",)
    DATA = ("the site's data must be able to serve the plan",)
    PROTOCOL = ("a message must be a known, valid record",)
    BUSY = ("the site must be free to work",)
    ERROR = ("an unexpected error stopped the site",)
    UNEXPECTED = ("an unexpected error stopped the site", "{error:exception}")

    # the policy
    COORDINATOR = ("the coordinator must be one that the site accepts", "coordinator")
    STUDY = ("the study must be one that the site serves", "study.name")
    MODEL = ("the network must be one that the site allows", "model.name {model:model}")
    PARAMETERS = (
        "the network must not have more parameters than the site allows",
        "model {asked:size} (limit {limit:size})",
    )
    UPLOAD = (
        "an update must not be larger than the site allows",
        "model {asked:figure} MiB (limit {limit:figure} MiB)",
    )
    OWN_MODELS = ("a study must not have the site train models of its own", "personal")
    PRIVATE = ("updates must be differentially private", "privacy.mechanism none")
    EPSILON = (
        "ε must not be above what the site allows a study",
        "privacy.epsilon {asked:figure} (limit {limit:figure})",
    )
    COHORT_EPSILON = (
        "ε must not be above what the site allows all studies together",
        "privacy.epsilon {asked:figure} (limit {limit:figure})",
    )
    EVALUATION_EPSILON = (
        "ε of evaluations must not be above what the site allows",
        "metrics.epsilon {asked:figure} (limit {limit:figure})",
    )
    DELTA = (
        "δ must not be above what the site allows",
        "privacy.delta {asked:figure} (limit {limit:figure})",
    )
    COHORT = ("the site must have a frozen cohort for the study", "cohort")
    PATIENTS = (
        "the site must have as many patients as its policy asks for",
        "patients (limit {limit:figure})",
    )
    PER_CLASS = (
        "the site must have as many patients of each class as its policy asks for",
        "task.classes (limit {limit:figure})",
    )
    PATIENT_KEY = (
        "a private study must have images that name their patients, or a site that takes each "
        "image for a patient",
        "patients",
    )
    SITES = (
        "a round must ask as many sites as the site's policy asks for",
        "participation.sites {asked:count} (limit {limit:count})",
    )
    PENDING = ("the study must be approved at the site; it waits for that",)
    DENIED = ("the study must be approved at the site; it was denied",)
    PAUSED = ("the site must not be paused",)
    QUIET = ("the site must be outside its quiet hours",)
    WITHHELD = ("what the site counts must be enough, and allowed, to leave it",)
    NETWORKED = ("the trainer must have no network before it opens a dataset",)
    CONNECTOR = ("the connector must not be able to read images while an order is carried out",)

    # the trainer
    STOPPED = ("the site must stay up until the order is carried out",)
    GIVEN_UP = ("the order must not be given up by who sent it",)
    STOPS_TRAINER = ("an order must not stop the trainer, and this one did before",)
    UNWRITTEN = ("the audit log must be writable",)
    AUDIT_WHOLE = ("the audit log must be whole",)
    MEMORY = ("the device must have memory for one image",)
    DEVICE = ("the device must exist on this machine",)
    PROCESSES = ("this machine must let a process be started that reads images",)

    # orders and messages
    ORDER = ("a message must carry an order",)
    RECORD = ("a {record:record} record must be valid", "{field:field}")
    SIGNED = ("an order must be signed by its coordinator",)
    SIGNED_MODEL = ("an order must come with the task and the model that its coordinator signed",)
    PLAN_JSON = ("a plan on the wire must be canonical JSON",)
    PLAN_OBJECT = ("a plan on the wire must be an object",)
    PLAN_NUMBER = ("a number in a plan must fit into 64 bits",)
    PLAN_DEPTH = ("a plan is at most a few tables deep",)
    SCHEMA = ("the plan must be one that the site's release can read",)
    SCHEMA_NEEDED = (
        "the plan must not need a newer schema than this release knows",
        "{needed:count}, known: {known:count}",
    )
    PLAN_KEY = ("a plan must keep the rules of its keys", "{key:key}")
    ROUNDS = ("the plan has rounds 1 to {rounds:count}", "{round:count}")
    EVALUATE_ONLY = ("a site that only evaluates answers the test of the shared model alone",)
    EVALUATED_ROUNDS = ("a study is evaluated in the rounds that its plan names", "{round:count}")
    PACKET = ("a packet on the trainer's socket must be whole",)
    TENSORS = ("packed arrays must be in the safetensors format with their names",)
    FROZEN_ARRAYS = ("a site must hold the frozen arrays that an order names",)
    ANSWER_KIND = ("an answer must be of a known kind",)
    TRAINER_GONE = ("the trainer must be there and answer",)
    CONNECTOR_ERROR = ("an unexpected error stopped the connector",)

    # the ledger
    STUDY_BUDGET = ("a study must stay within its privacy budget", "policy.max_epsilon_per_study")
    COHORT_BUDGET = (
        "a cohort must stay within its privacy budget",
        "policy.max_epsilon_per_cohort",
    )
    EVALUATION_BUDGET = (
        "evaluations must stay within the site's budget for them",
        "policy.max_evaluation_epsilon_per_cohort",
    )
    STUDY_PLAN = ("a study keeps the plan that it began with",)
    STUDY_COHORT = ("a study keeps the cohort that it began with",)
    STUDY_PLAN_AND_COHORT = ("a study keeps the plan and the cohort that it began with",)
    CHARGE_SPENT = ("a round's charge was spent when the trainer stopped",)
    CHARGE_COMMITTED = ("a charge is committed once",)
    ROUND_BUSY = ("a round is trained once",)
    ROUND_IN_TURN = ("a private round is trained in its turn", "{round:count} after {last:count}")
    ROUND_STAYS_PRIVATE = ("a private round stays private", "{round:count}")
    UPDATE_KEPT = (
        "an update that was released can be given again while it is kept",
        "{round:count}",
    )
    EVALUATED_ONCE = ("a round of a study is evaluated once, with one model", "{round:count}")
    EVALUATION_TRIES = ("an evaluation is tried a few times only", "{attempts:count}")
    EVALUATION_ANSWERED = ("an evaluation is answered once",)
    ANSWER_KEPT = ("an answer that was given can be given again while it is kept",)
    COHORT_PATIENTS = ("a cohort that is charged has patients",)
    COHORT_KEEPS_PATIENTS = ("a cohort keeps the patients that it was registered with",)
    LEDGER_WRITABLE = ("the privacy ledger must be writable",)
    LEDGER_WHOLE = ("the privacy ledger must be whole",)

    # the cohort and its images
    COHORT_FROZEN = ("a cohort must be frozen before it is used",)
    COHORT_CHANGED = ("a frozen cohort must not have changed",)
    COHORT_STILL = ("a frozen cohort must hold still while it is read",)
    COHORT_FILE = ("a cohort file must be whole and unchanged",)
    COHORT_TASK = ("a cohort must have the plan's task",)
    COHORT_CLASSES = ("a cohort must have the plan's classes",)
    COHORT_SELECTED = ("a cohort must have images that the plan selects", "images")
    DEIDENTIFIED = ("images must be de-identified as the site asks", "datasets")
    COHORT_MODALITY = ("a cohort must have images of the plan's modalities", "task.modality")
    MASK_PLACE = ("a frozen mask must be held against its image's place",)
    PLAN_PATIENTS = ("the plan wants at least {least:count} patients of a site",)
    DATASET = ("the dataset must exist",)
    DATASET_FORMAT = ("the format of the dataset must be one of npz, folders, nifti, dicom",)
    DATASET_IMAGES = (
        "the dataset must hold images that the {task:task} task can use",
        "{reasons:reasons}",
    )
    ARCHIVE = ("an npz dataset must be a readable archive of plain arrays",)
    IMAGE = ("{reason:reason}",)
    IMAGES = ("a site must have images",)
    IMAGES_USABLE = ("a site must have images that can be used", "{reasons:reasons}")
    CACHE_KEPT = ("a prepared dataset must stay in its cache",)
    CACHE_WRITABLE = ("the cache of prepared images must be writable",)
    CACHE_ROOM = ("prepared images must have room in the cache", "cache_gib")
    STATE_WRITABLE = ("the folder of the state must be writable",)
    TRAINING_PATIENTS = (
        "a site must have patients to train on",
        "{patients:count} patients, none for training",
    )
    TWO_PATIENTS = ("a site must have at least two patients to divide", "1 patient")
    STRATEGY_RECEIVED = ("a model must come with the arrays that its strategy declares",)
    STRATEGY_ARRAYS = ("a strategy keeps and sends the arrays that it declares",)
    STATE_MISSING = ("a site must hold the state that a round starts from", "round {round:count}")
    NOT_ALONE = ("what a site trains alone must begin with the study's first round",)
    STATE_ROOM = ("what a strategy keeps at a site must have room",)
    NO_TRAINING_PATIENTS = ("a site needs training patients", "{patients:count}")
    PART_PATIENTS = ("a site needs {part:part} patients to be measured",)

    # privacy
    TRAINED_ONCE = ("a private round is trained once", "{round:count}")
    NEEDS_DELTA = ("a private plan needs delta",)
    NEEDS_PATIENTS = ("private training needs patients", "{patients:count}")
    NEEDS_PRIVACY = ("a plan without privacy has no noise to calibrate",)
    COST = (
        "the cost of a study must be within what can be accounted",
        "privacy: noise {noise:figure}, {steps:count} steps at rate {rate:figure}, "
        "delta {delta:figure}",
    )
    COSTS = ("the cost of studies must be within what can be accounted", "privacy")
    TARGET = (
        "the target must be reachable with finite noise",
        "privacy: epsilon {epsilon:figure}, delta {delta:figure}, "
        "{steps:count} steps at rate {rate:figure}",
    )
    BOOKKEEPING = ("book-keeping takes convolutions, linear layers and group norms",)

    # models
    ARRAYS_COVER = ("the arrays must cover the whole model", "{missing:count} missing")
    ARRAYS_KNOWN = ("the model has no such array",)
    ARRAYS_SHAPE = ("the arrays must have the model's shapes",)
    ARRAYS_FLOAT32 = ("arrays must be float32",)
    ARRAYS_FINITE = ("arrays must be finite",)
    MODEL_COMPRESSED = ("a model must be compressed as its plan says",)
    ARRAYS_FLOATING = ("every exchanged tensor must be of floating point",)
    PARAMETER_KNOWN = ("the model has no such parameter",)
    PATTERN = (
        "every pattern must match a parameter of the model",
        "stages.train, pattern {pattern:count}",
    )
    NOTHING_OWN = ("a model of each site's own needs arrays that stay at the site", "personal")
    NOTHING_SHARED = ("each stage must train arrays that travel", "personal.method")
    MODEL_SIZE = ("{model:model} cannot take images of this size", "preprocessing.size")
    FEATURE_CENTERING = (
        "feature_centering needs a chain of layers that ends in a linear one",
        "model.feature_centering",
    )
    TABLE_HEAD = ("a table needs a chain of layers that ends in a linear one", "table")
    TABLE_COLUMN = (
        "the table of labels must have the plan's columns",
        "table, column {column:count}",
    )
    TABLE_UNIT = ("a column must have the plan's unit", "table, column {column:count}")

    # measuring
    PROBABILITIES = ("probabilities must lie in 0 to 1",)
    PROBABILITY_SHAPE = ("probabilities must be images x classes",)
    TARGET_FLAGS = ("multi-label targets must be a 0 or 1 for each class",)
    TARGET_INDEX = ("targets must be one class index for each image",)
    TARGET_RANGE = ("class indices must lie in 0 to {last:count}",)
    LOSSES = ("losses must be one finite number, 0 or more, for each image",)
    MASKS = ("masks must be uint8 label maps with labels 0 to {classes:count}",)
    PREDICTED_MASKS = ("predicted masks must be uint8 and of the truth's shape",)
    PREDICTED_LABELS = ("predicted labels must lie in 0 to {classes:count}",)
    SPACING = ("spacing must be one positive number of mm for each image and axis",)
    COUNTS = ("counts must be whole, and agree with each other",)
    METRIC = ("the task must have the metrics that the plan reports", "metrics.report")

    # the gate
    UPDATE_ARRAYS = ("an update must hold exactly the arrays that train, in their order",)
    UPDATE_SHAPES = ("an update's arrays must have the model's shapes and dtypes",)
    UPDATE_FINITE = ("an update must be finite",)
    UPDATE_PLAIN = ("what is sent must be plain arrays of numbers",)
    UPDATE_COMPRESSED = ("an update must be compressed as its plan says",)
    UPDATE_STEPS = ("an update must take the plan's steps",)
    UPDATE_COST = ("an update without privacy must not state its cost",)
    UPDATE_ACCOUNTABLE = ("what an update cost must be accountable",)
    UPDATE_MECHANISM = ("a private update must come from the mechanism that its plan asks for",)
    UPDATE_EPSILON = ("a private update must state what it cost",)
    REPLY_RECORD = ("a reply must be a valid record",)
    REPLY_SITE = ("a reply must be of this site",)
    REPLY_ROUND = ("a reply must be for the round that was asked",)
    REPLY_MOST = ("a reply must not tell of more {what:amount} than there are",)
    REPLY_POSSIBLE = ("a reply must tell of a possible {what:amount}",)
    REPLY_PLAN = ("without a plan only a refusal can leave",)
    REPLY_COHORT = ("without a frozen cohort only a refusal can leave",)
    COUNTS_EXACT = ("exact counts must not pass as noisy ones",)
    COUNTS_TASK = ("counts must be those of the plan's task",)
    COUNTS_NOISE = ("counts must have the noise that plan and policy ask for",)
    COUNTS_TABLES = ("counts must be the tables that plan and policy name",)
    COUNTS_IMAGES = ("counts must be of the images that the outcome tells of",)
    COUNTS_CLASSES = ("a count of classes must be of the plan's classes",)

    @property
    def wire(self) -> str:
        """Its name in a record."""
        return self.name.lower().replace("_", "-")

    @classmethod
    def from_wire(cls, name: str) -> RuleCode | None:
        """The code of a name; None for one that this release does not know."""
        return _BY_WIRE.get(name)

    def coarse(self, values: Values) -> dict[str, Value]:
        """The values as they may leave.

        Raises
        ------
        ValueError
            They are not those that the code declares.
        """
        return self.checked({name: self._cut(name, value) for name, value in values.items()})

    def _cut(self, name: str, value: Value) -> Value:
        if name not in self.kinds or not isinstance(value, int | float):
            return value
        return _KINDS[self.kinds[name]].cut(value)

    def checked(self, values: Values) -> dict[str, Value]:
        """The values, unless one is missing, too many, of another type, too exact or unknown.

        Raises
        ------
        ValueError
            Names no value.
        """
        if values.keys() != self.kinds.keys():
            raise ValueError("a rule code must come with the values that it declares")
        if not all(_KINDS[kind].holds(values[name]) for name, kind in self.kinds.items()):
            raise ValueError("a value of a rule code must be one that its kind takes")
        return dict(values)

    def rule(self, values: Values) -> str:
        """What must hold, as a sentence without its full stop."""
        return self._filled(self.text, values)

    def found(self, values: Values) -> str:
        """What was found instead; "" where that is not told."""
        return self._filled(self._found, values)

    def _filled(self, template: str, values: Values) -> str:
        shown = {name: _KINDS[kind].show(values[name]) for name, kind in self.kinds.items()}
        return "".join(
            text + (shown[name] if name else "") for text, name, *_ in Formatter().parse(template)
        )


_BY_WIRE: Final = {code.wire: code for code in RuleCode}


def render(code: RuleCode, values: Values) -> str:
    """What a reader of a code is shown: the rule, and what was found in brackets."""
    found = code.found(values)
    return f"{code.rule(values)} (got {found})" if found else code.rule(values)


# What a kind of refusal says where the error has no code, or values that may not leave.
GENERAL: Final = {
    "policy": RuleCode.POLICY,
    "pending": RuleCode.PENDING,
    "paused": RuleCode.PAUSED,
    "budget": RuleCode.BUDGET,
    "privacy": RuleCode.PRIVACY,
    "data": RuleCode.DATA,
    "protocol": RuleCode.PROTOCOL,
    "busy": RuleCode.BUSY,
    "error": RuleCode.ERROR,
    "arrays": RuleCode.FROZEN_ARRAYS,
    "schema": RuleCode.SCHEMA,
}

# Those of the policy; each is on the policy's page.
RULES: Final = (
    RuleCode.COORDINATOR,
    RuleCode.STUDY,
    RuleCode.MODEL,
    RuleCode.PARAMETERS,
    RuleCode.UPLOAD,
    RuleCode.OWN_MODELS,
    RuleCode.PRIVATE,
    RuleCode.EPSILON,
    RuleCode.COHORT_EPSILON,
    RuleCode.DELTA,
    RuleCode.COHORT,
    RuleCode.PATIENTS,
    RuleCode.PER_CLASS,
    RuleCode.SITES,
    RuleCode.PENDING,
    RuleCode.DENIED,
    RuleCode.PAUSED,
    RuleCode.QUIET,
    RuleCode.WITHHELD,
    RuleCode.NETWORKED,
    RuleCode.EVALUATION_EPSILON,
    RuleCode.CONNECTOR,
    RuleCode.PATIENT_KEY,
)
