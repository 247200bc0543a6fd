"""The study plan: what a coordinator writes and every site reads. Data, never code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from fedward.compression import METHODS
from fedward.networks import MODELS
from fedward.plan.image_filter import HOW, Patterns
from fedward.plan.messages import rule_error
from fedward.plan.versions import Since
from fedward.strategies import STRATEGIES, StrategySpec
from fedward.tasks.base import TaskSpec
from fedward.tasks.registry import LOSSES, METRICS, TASKS

# Rules that hold between sections of a plan; each says which keys, which rule and what to do.


def _broken(plan: Plan) -> Iterator[tuple[str, str]]:
    yield from _task_rules(plan)
    yield from _model_rules(plan)
    yield from _stage_rules(plan)
    yield from _keep_rules(plan)
    yield from _centering_rules(plan)
    yield from _table_rules(plan)
    yield from _strategy_rules(plan)
    yield from _compression_rules(plan)
    yield from _participation_rules(plan)


def _task_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    task, spec = plan.task, plan.task.spec
    if len(set(task.classes)) != len(task.classes):
        yield "task.classes", "class names must differ; rename one"
    for key, rule, fix in spec.rules(task.classes, task.multi_label):
        yield f"task.{key}", f"{rule}; {fix[0].lower()}{fix[1:]}"
    if len(plan.preprocessing.size) != task.dimensions:
        yield (
            "preprocessing.size",
            f"a {task.dimensions}D task needs {task.dimensions} side lengths; write that many",
        )
    if "any" in task.modality and len(task.modality) > 1:
        yield "task.modality", "`any` stands alone; list modalities, or only `any`"
    for key, names in (
        ("task.modality", task.modality),
        ("metrics.report", plan.metrics.report),
    ):
        if len(set(names)) != len(names):
            yield key, "its entries must differ; name each once"
    wrong = set(plan.metrics.report) - set(spec.metric_names)
    if wrong:
        yield "metrics.report", f"{task.kind} has no metric {', '.join(sorted(wrong))}; remove it"
    if "depth" in plan.preprocessing.augmentation.flip and task.dimensions == 2:
        yield "preprocessing.augmentation.flip", "a 2D task has no depth axis; remove `depth`"
    yield from _patch_rules(plan)
    kind = spec.name(task)
    if plan.training.loss not in spec.losses[kind]:
        yield (
            "training.loss",
            f"{kind} takes {' or '.join(sorted(spec.losses[kind]))}, not {plan.training.loss}; "
            "change it",
        )
    if plan.training.label_smoothing and plan.training.loss != "cross_entropy":
        yield "training.label_smoothing", "label_smoothing belongs to cross_entropy; remove it"
    weights = plan.training.class_weights
    if weights is not None and len(weights) != task.outputs:
        yield (
            "training.class_weights",
            f"the model has {task.outputs} outputs, but there are {len(weights)} weights; "
            "write one weight per output",
        )


def _patch_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    patch, task = plan.preprocessing.patch, plan.task
    if patch is None:
        return
    if not task.spec.dense:
        yield (
            "preprocessing.patch",
            f"a patch of an image need not show what {task.kind} is about; remove it",
        )
    if "depth" in patch.flips and task.dimensions == 2:
        yield "preprocessing.patch.flips", "a 2D task has no depth axis; remove `depth`"
    if len(set(patch.flips)) != len(patch.flips):
        yield "preprocessing.patch.flips", "its entries must differ; name each once"
    if plan.privacy.audit:
        yield "privacy.audit", "the audit attacks whole images, not patches; remove audit"


def _model_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    yield from MODELS[plan.model.name].broken(plan)
    taps = plan.model.taps
    if taps is not None and list(taps) != sorted(set(taps)):
        yield "model.taps", "taps must rise from block to block; sort them and name each once"


def _stage_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.stages and plan.training.rounds is not None:
        yield (
            "training.rounds",
            "stages carry rounds and learning rates; remove them from [training]",
        )
    if not plan.stages and plan.training.rounds is None:
        yield (
            "training.rounds",
            "a plan without [[stages]] needs rounds and learning_rate; add them",
        )
    warmup = plan.training.warmup_rounds
    if warmup and any(rounds <= warmup for rounds in _stage_rounds(plan)):
        yield (
            "training.warmup_rounds",
            "a stage must have more rounds than warmup_rounds; lower them",
        )
    if plan.training.gradient_clipping is not None and plan.privacy.on:
        yield (
            "training.gradient_clipping",
            "with privacy, privacy.clipping_norm bounds each patient's gradient; remove "
            "gradient_clipping",
        )
    if len({stage.name for stage in plan.stages}) != len(plan.stages):
        yield "stages", "stage names must differ; rename one"


def _keep_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    """Of which model the study delivers, and of when it ends."""
    training, rounds = plan.training, _stage_rounds(plan)
    if training.averaged_rounds is not None and rounds and training.averaged_rounds > rounds[-1]:
        yield (
            "training.averaged_rounds",
            f"the last stage has {rounds[-1]} rounds; lower averaged_rounds",
        )
    if training.keep == "averaged" and plan.strategy.averaging:
        yield (
            "strategy.averaging",
            "keep = averaged and averaging both average the rounds' models; keep one of them",
        )
    if training.keep != "last" and plan.personal is not None and plan.personal.keeps_layers:
        yield (
            "training.keep",
            f"with {plan.personal.method} a site's own layers are those of the last round; remove "
            "keep",
        )
    if training.keep == "best" or training.patience is not None:
        what = "keep = best" if training.keep == "best" else "patience"
        yield from _figure_rules(plan, f"{what} compares rounds")


def _stage_rounds(plan: Plan) -> list[int]:
    if plan.stages:
        return [stage.rounds for stage in plan.stages]
    return [] if plan.training.rounds is None else [plan.training.rounds]


def _centering_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    if not plan.model.feature_centering:
        if plan.privacy.centering_steps is not None:
            yield (
                "privacy.centering_steps",
                "centering_steps belong to model.feature_centering; set it, or remove them",
            )
        return
    spec = plan.strategy.spec
    if not plan.task.spec.pooled:
        yield (
            "model.feature_centering",
            f"feature_centering is for the one feature vector of an image, not for "
            f"{plan.task.kind}; remove it",
        )
    if plan.model.dropout:
        yield "model.dropout", "feature_centering needs features without dropout; remove dropout"
    if spec.kept or spec.received or spec.sent:
        yield (
            "model.feature_centering",
            f"the round that measures the mean has no place for what {spec.name} sends or keeps "
            "besides the model; choose another strategy, or remove feature_centering",
        )
    if any(stage.name == CENTERING for stage in plan.stages):
        yield "stages", f"the round that measures the mean is called {CENTERING}; rename the stage"


def _table_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.table is None:
        return
    if not plan.task.spec.pooled:
        yield (
            "table",
            f"a table joins the one feature vector of an image, which {plan.task.kind} has not; "
            "remove it",
        )


def _strategy_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    spec = plan.strategy.spec
    yield from spec.broken(plan.strategy.settings)
    if plan.privacy.on and not spec.private:
        yield (
            "strategy.name",
            f"the noise of an update does not cover what {spec.name} sends besides it; choose "
            "another strategy, or mechanism `none`",
        )
    if (spec.sgd or spec.plain_sgd) and plan.training.optimizer != "sgd":
        yield (
            "training.optimizer",
            f"{spec.name} works with the steps of SGD; choose sgd, or another strategy",
        )
    elif spec.plain_sgd and plan.training.momentum:
        yield (
            "training.momentum",
            f"{spec.name} needs SGD without momentum; set momentum to 0",
        )
    if spec.by_figures:
        yield from _figure_rules(plan, f"{spec.name} weighs sites")
    if plan.participation.sites < spec.minimum_sites:
        yield (
            "participation.sites",
            f"{spec.name} needs {spec.minimum_sites} sites; raise sites",
        )


def _figure_rules(plan: Plan, what: str) -> Iterator[tuple[str, str]]:
    """Of what goes by the plan's primary figure, in words: who does what."""
    primary, spec = plan.metrics.primary, plan.task.spec
    if not (plan.split.validation or plan.split.given):
        yield (
            "split.validation",
            f"{what} by their figures on validation patients; raise validation",
        )
    if plan.privacy.on and primary in spec.metric_names and spec.metric(primary).table is None:
        yield (
            "metrics.primary",
            f"{what} by {primary}, which no counts with noise give; choose another primary figure",
        )


def _compression_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    how, spec = plan.compression, plan.strategy.spec
    if how is None:
        return
    if spec.sent:
        yield (
            "compression.method",
            f"what {spec.name} sends besides an update must arrive as it is; choose another "
            "strategy, or remove [compression]",
        )
    if METHODS[how.method].sparse and spec.by_parameter:
        yield (
            "compression.method",
            f"{spec.name} compares single parameters, most of which {how.method} leaves out; "
            "choose another method, or another strategy",
        )


def _participation_rules(plan: Plan) -> Iterator[tuple[str, str]]:
    part, name, given = plan.participation, plan.strategy.name, plan.strategy.settings
    malicious = int(given.get("malicious", 0))
    if part.quorum is not None and part.quorum > part.sites:
        yield "participation.quorum", "quorum must not exceed sites; lower it"
    need = plan.strategy.spec.updates_needed(malicious)
    if part.needed < need:
        yield (
            "participation.quorum",
            f"{name} against {malicious} malicious sites needs {need} updates; raise quorum",
        )
    if given.get("keep", 1) > part.needed:
        yield (
            "strategy.settings.keep",
            f"keep must not exceed the {part.needed} updates of a quorum; lower it or raise quorum",
        )
    if (
        plan.privacy.on
        and plan.training.local_epochs is None
        and plan.privacy.sampling_rate is None
    ):
        yield (
            "privacy.sampling_rate",
            "with local_steps the cost of privacy depends on the sampling rate; give sampling_rate",
        )


FLIP_AXES = {"vertical": 0, "horizontal": 1, "depth": 2}
"""Spatial axis that each word for mirroring stands for."""
CENTERING = "feature-centering"
"""Name of the stage that measures the mean of the features."""
CENTERING_STEPS = 4
"""Private steps of that stage where a plan names none."""
FEATURE_MEAN = "feature_centering.mean"
"""The array that the first round of a plan with ``model.feature_centering`` measures."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Beyond this an optimiser's step is larger than what single precision holds.
LearningRate = Annotated[float, Field(gt=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Pattern = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.*?!\[\]-]+$")]
ColumnName = Annotated[str, Field(pattern=r"^[^\s|;,]{1}(?:[^|;,\r\n\t]{0,62}[^\s|;,]{1})?$")]
ClassName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _+/-]{0,63}$")]

if TYPE_CHECKING:
    ModelName = str
else:
    ModelName = Literal[tuple(MODELS)]


def _known_strategy(value: Any) -> Any:
    if not isinstance(value, str) or value not in STRATEGIES:
        *most, last = [repr(name) for name in STRATEGIES]
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(most)} or {last}"})
    return value


StrategyName = Annotated[
    str, BeforeValidator(_known_strategy), WithJsonSchema({"enum": list(STRATEGIES)})
]
if TYPE_CHECKING:
    TaskKind = str
    MetricName = str
    LossName = str
    CompressionMethod = str
    DownloadMethod = str
else:  # the registry is the one place that lists them; pydantic checks values against it
    TaskKind, MetricName, LossName, CompressionMethod = (
        Literal[*names] for names in (TASKS, METRICS, LOSSES, METHODS)
    )
    # A model without most of its numbers is none.
    DownloadMethod = Literal[*(name for name, one in METHODS.items() if not one.sparse)]
Modality = Literal["CR", "DX", "CT", "MR", "MG", "US", "PT", "OP", "OPT", "XC", "SM", "OT", "any"]


def _whole(value: Any) -> Any:
    # A literal compares by ==, for which True and 1.0 are 1; the plan's hash would tell them apart.
    if type(value) is not int:
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


class Section(BaseModel):
    """A table of the plan: unknown keys are refused, values are not coerced, nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if found := list(self._broken()):
            raise rule_error(found)
        return self

    def _broken(self) -> Iterator[tuple[str, str]]:
        """Rules between keys that are broken: key, and rule with the next step."""
        yield from ()


class Study(Section):
    """What the study is called and what it is for."""

    name: Name = Field(description="short name: lower case, digits, `.`, `_`, `-`")
    title: str = Field(default="", max_length=200, description="one line for people")
    intended_use: str = Field(
        default="", max_length=2000, description="what the model is for; goes into reports"
    )


class Task(Section):
    """What is to be learnt."""

    kind: TaskKind = Field(description="the task")
    dimensions: Annotated[Literal[2, 3], BeforeValidator(_whole)] = Field(
        default=2, description="2 for images, 3 for volumes"
    )
    classes: tuple[ClassName, ...] = Field(
        min_length=1,
        max_length=256,
        description="class names in label order. Classification: index 0 is label 0, the last of "
        "two is the positive one. Segmentation: foreground classes, label 0 is background. "
        "Detection: what boxes are around",
    )
    multi_label: bool = Field(
        default=False, description="classification: an image may carry several classes at once"
    )
    modality: tuple[Modality, ...] = Field(
        default=("any",),
        min_length=1,
        description="DICOM modalities that the study accepts; other images are left out",
    )

    @property
    def spec(self) -> TaskSpec:
        """What a task of this kind is."""
        return TASKS[self.kind]

    @property
    def outputs(self) -> int:
        """Channels that the model gives: one a class, and the background in segmentation."""
        return len(self.classes) + self.spec.background

    @property
    def has_masks(self) -> bool:
        """Whether the target of an image is a mask."""
        return self.spec.target == "masks"

    @property
    def has_labels(self) -> bool:
        """Whether the target of an image is a label."""
        return self.spec.target == "labels"

    @property
    def has_boxes(self) -> bool:
        """Whether the targets of an image are boxes."""
        return self.spec.target == "boxes"


class Images(Section):
    """Which DICOM images the study takes, by their headers; what is not DICOM is taken."""

    series_description: Patterns = Field(default=(), description=f"`SeriesDescription`: {HOW}")
    image_type: Patterns = Field(default=(), description="values of `ImageType`, likewise")
    body_part: Patterns = Field(default=(), description="`BodyPartExamined`, likewise")
    intent: Patterns = Field(
        default=(),
        description="`PresentationIntentType`, likewise: `FOR PRESENTATION` or `FOR PROCESSING`",
    )
    kernel: Patterns = Field(default=(), description="`ConvolutionKernel` (CT), likewise")


class Augmentation(Section):
    """Random changes of training images; each strength 0 means off."""

    flip: tuple[Literal["horizontal", "vertical", "depth"], ...] = Field(
        default=(), description="axes that may be mirrored, each with probability 1/2"
    )
    rotate: float = Field(default=0.0, ge=0, le=180, description="largest rotation, degrees")
    scale: float = Field(default=0.0, ge=0, lt=1, description="largest zoom in or out, fraction")
    shift: float = Field(default=0.0, ge=0, lt=1, description="largest shift, fraction of the side")
    contrast: float = Field(default=0.0, ge=0, lt=1, description="largest change of contrast")
    brightness: float = Field(
        default=0.0, ge=0, le=2, description="largest change of brightness, intensity units"
    )
    noise: float = Field(
        default=0.0, ge=0, le=2, description="standard deviation of added noise, intensity units"
    )
    gamma: Annotated[float, Since(2)] = Field(
        default=0.0,
        ge=0,
        le=2,
        description="largest change of gamma over the image's range: an exponent from 1 / (1 + "
        "gamma) to 1 + gamma",
    )
    blur: Annotated[float, Since(2)] = Field(
        default=0.0, ge=0, le=5, description="largest deviation of a Gaussian blur, pixels"
    )
    low_resolution: Annotated[float, Since(2)] = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="largest loss of resolution: the share of the pixels along a side that an "
        "image loses before it is enlarged again",
    )
    drop_channel: Annotated[float, Since(2)] = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="chance of each named channel to be zeros, as in an image that lacks it; one "
        "that the image has stays",
    )
    bias_field: Annotated[float, Since(2)] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="largest coefficient of a smooth field that brightness is multiplied with, as "
        "coils of an MRI scanner have it",
    )

    @property
    def active(self) -> bool:
        """Whether anything random is done at all."""
        return any(self.model_dump().values())


class Patch(Section):
    """Images keep their own size; the model's input is a patch of them, as large as `size`."""

    foreground: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.33,
        description="share of training patches that have a marked pixel in their middle, its class "
        "drawn first; the others lie anywhere",
    )
    per_image: int = Field(
        default=1,
        ge=1,
        le=64,
        description="patches of an image in a step; with privacy those of a patient are averaged "
        "before clipping, as several images are",
    )
    overlap: Annotated[float, Field(ge=0, le=0.9)] = Field(
        default=0.5,
        description="share of a side that neighbouring windows have in common where the model "
        "answers for a whole image; their answers are weighted by a Gaussian",
    )
    flips: tuple[Literal["horizontal", "vertical", "depth"], ...] = Field(
        default=(),
        description="axes along which each window is mirrored as well, in all combinations; the "
        "answers are averaged",
    )


class Channel(Section):
    """One of several images of a patient that make one input, such as a sequence of an MRI."""

    name: ColumnName = Field(description="what sites call it; a site says where it is")
    missing: Literal["leave-out", "drop"] = Field(
        default="leave-out",
        description="an image that lacks it: `leave-out` counts it; `drop` has zeros in its place, "
        "which is the mean of a channel with intensity `zscore`",
    )
    window: tuple[float, float] | None = Field(
        default=None,
        description="lowest and highest intensity kept of this channel, instead of those of the "
        "section",
    )


class Preprocessing(Section):
    """How an image becomes the model's input; the same at every site."""

    size: tuple[Annotated[int, Field(ge=8, le=1024)], ...] = Field(
        min_length=2,
        max_length=3,
        description="side lengths of the input, pixels (rows, columns[, slices])",
    )
    patch: Annotated[Patch | None, Since(2)] = Field(
        default=None,
        description="segmentation: train on random patches of `size`, and answer for whole images "
        "window by window; none: an image is brought to `size`",
    )
    spacing: tuple[Positive, ...] | None = Field(
        default=None,
        description="resample to this spacing (mm, one per axis), then centre crop or pad to "
        "`size`, without `patch`; without a spacing the image is resized to `size`, or with "
        "`patch` left as it is",
    )
    resize: Literal["stretch", "fit"] = Field(
        default="stretch", description="without spacing: stretch to `size`, or fit and pad"
    )
    channels: Annotated[int, BeforeValidator(_whole)] = Field(
        default=1,
        ge=1,
        le=16,
        description="1 (grey) or 3 (colour, or grey repeated); with `[[preprocessing.channel]]` as "
        "many as there are",
    )
    channel: Annotated[tuple[Channel, ...], Since(2)] = Field(
        default=(),
        max_length=16,
        description="named channels, `[[preprocessing.channel]]`, in the order in which the model "
        "takes them; each has its intensities scaled by itself. An image that names none is taken "
        "if it has as many planes",
    )
    window: tuple[float, float] | None = Field(
        default=None, description="lowest and highest intensity kept (HU for CT), mapped to 0 and 1"
    )
    percentiles: tuple[float, float] | None = Field(
        default=None, description="instead of a window: percentiles of each image mapped to 0 and 1"
    )
    intensity: Literal["unit", "zscore", "imagenet"] = Field(
        default="zscore",
        description="`unit`: 0 to 1; `zscore`: each image to mean 0 and deviation 1; `imagenet`: 0 "
        "to 1, then ImageNet's mean and deviation",
    )
    gantry_tilt: Literal["refuse", "correct"] = Field(
        default="refuse",
        description="volumes from a leaning gantry: leave them out, or set them upright by moving "
        "each slice (linear)",
    )
    augmentation: Augmentation = Field(
        default=Augmentation(), description="random changes in training"
    )

    def _broken(self) -> Iterator[tuple[str, str]]:
        if self.spacing is not None and len(self.spacing) != len(self.size):
            yield (
                "preprocessing.spacing",
                "spacing must have one entry per entry of size; make them equally long",
            )
        yield from self._broken_channels()
        if self.patch is not None and self.resize != "stretch":
            yield "preprocessing.resize", "with patches an image keeps its size; remove resize"
        if self.window is not None and self.percentiles is not None:
            yield ("preprocessing.window", "window and percentiles exclude each other; keep one")
        for name, pair in (("window", self.window), ("percentiles", self.percentiles)):
            if pair is not None and not pair[0] < pair[1]:
                yield (
                    f"preprocessing.{name}",
                    f"{name} must rise from low to high; swap its two values",
                )
        if self.percentiles and not (self.percentiles[0] >= 0 and self.percentiles[1] <= 100):
            yield (
                "preprocessing.percentiles",
                "percentiles must lie within 0 and 100; bring both into that range",
            )
        if self.intensity == "imagenet" and self.channels != 3:
            yield (
                "preprocessing.channels",
                "intensity `imagenet` needs three channels; set channels = 3",
            )

    def _broken_channels(self) -> Iterator[tuple[str, str]]:
        named = self.channel
        if named and len(named) != self.channels:
            yield (
                "preprocessing.channels",
                f"there are {len(named)} named channels; set channels = {len(named)}",
            )
        if not named and self.channels not in (1, 3):
            yield (
                "preprocessing.channels",
                "without [[preprocessing.channel]] it must be 1 or 3; name the channels",
            )
        if len({one.name for one in named}) != len(named):
            yield "preprocessing.channel", "names of channels must differ; rename one"
        for place, one in enumerate(named):
            if one.window is not None and not one.window[0] < one.window[1]:
                yield (
                    f"preprocessing.channel.{place}.window",
                    "window must rise from low to high; swap its two values",
                )
        if named and self.intensity == "imagenet":
            yield (
                "preprocessing.intensity",
                "imagenet is of colours, not of channels; choose zscore",
            )
        if self.augmentation.drop_channel and len(named) < 2:
            yield (
                "preprocessing.augmentation.drop_channel",
                "drop_channel is for two named channels or more; remove it",
            )


class Column(Section):
    """One column of the table beside the images."""

    name: ColumnName = Field(description="what the site's table of labels calls it, in any case")
    kind: Literal["number", "category"] = Field(
        description="`number`: the middle of `range` becomes 0, its ends −1 and 1; `category`: an "
        "input for each of `values`, 1 where it is the value and 0 elsewhere"
    )
    unit: str = Field(
        default="", max_length=32, description="of a `number`; a site whose unit differs is refused"
    )
    range: tuple[float, float] | None = Field(
        default=None,
        description="`number`: lowest and highest value; an image whose value lies outside is left "
        "out, and counted",
    )
    values: tuple[ColumnName, ...] = Field(
        default=(),
        max_length=256,
        description="`category`: what may stand there, in any case; an image with another value is "
        "left out, and counted",
    )
    missing: bool = Field(
        default=False,
        description="whether the value may be missing: then the column has one more input, which "
        "is 1 where it is missing, and the others are 0; without it the image is left out",
    )

    @property
    def width(self) -> int:
        """Inputs of the network that it becomes."""
        return (len(self.values) or 1) + self.missing

    def rules(self) -> Iterator[tuple[str, str]]:
        """Rules between its keys that are broken, as :meth:`Section._broken` tells them."""
        number = self.kind == "number"
        if number and self.range is None:
            yield "range", "a number needs a range; add it"
        if self.range is not None and not self.range[0] < self.range[1]:
            yield "range", "range must rise from low to high; swap its two values"
        if number and self.values:
            yield "values", "values belong to a category; remove them"
        if not number and len(self.values) < 2:
            yield "values", "a category needs two values or more; add them"
        if not number and self.range is not None:
            yield "range", "a range belongs to a number; remove it"
        if not number and self.unit:
            yield "unit", "a unit belongs to a number; remove it"
        if len({one.casefold() for one in self.values}) != len(self.values):
            yield "values", "values must differ, in whatever case; name each once"


class TableInput(Section):
    """A table beside the images: what is known of each, as a second input of the network.

    The head reads the pooled features of the image and the columns, in the order in which they
    stand here.
    """

    hidden: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="width of a layer with a ReLU before the last one, which lets columns and "
        "features act on each other; none: the last layer reads both",
    )
    column: tuple[Column, ...] = Field(
        min_length=1, max_length=64, description="the columns, `[[table.column]]`"
    )

    @property
    def width(self) -> int:
        """Inputs of the network that the columns become."""
        return sum(one.width for one in self.column)

    def _broken(self) -> Iterator[tuple[str, str]]:
        for place, column in enumerate(self.column):
            yield from ((f"table.column.{place}.{key}", rule) for key, rule in column.rules())
        if len({one.name.casefold() for one in self.column}) != len(self.column):
            yield "table.column", "names must differ, in whatever case; rename one"


class Split(Section):
    """How each site's patients are divided; by patient, never across."""

    validation: Fraction = Field(default=0.1, description="share of patients for validation")
    test: Fraction = Field(default=0.2, description="share of patients for the test")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the division")
    given: bool = Field(
        default=False,
        description="use the division that the data brings (npz files do), where it does",
    )

    def _broken(self) -> Iterator[tuple[str, str]]:
        if self.validation + self.test >= 1:
            yield (
                "split.test",
                "validation and test together must leave patients to train on; "
                "bring their sum below 1",
            )


class InitialWeights(Section):
    """Public weights to start from; read as tensors only, never unpickled into objects."""

    file: str = Field(
        min_length=1,
        description="path of a .safetensors or PyTorch weights file within the plan's folder, or "
        "`package:NAME/PATH` inside an installed Python package",
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file")


class Model(Section):
    """The network, by its name in the registry."""

    name: ModelName = Field(description="the architecture")
    channels: tuple[Annotated[int, Field(ge=4, le=2048)], ...] | None = Field(
        default=None,
        min_length=2,
        max_length=7,
        description="width of each level, where the architecture has a choice; none: its default",
    )
    taps: tuple[Annotated[int, Field(ge=0, le=15)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="efficientnet-lite0: blocks (0 to 15, ascending) whose pooled outputs the head "
        "reads; the network ends after the last of them; none: the usual head",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout, where it has some")
    deep_supervision: Annotated[bool, Since(2)] = Field(
        default=False,
        description="dynunet: in training the levels but the lowest two answer as well, and their "
        "losses count, each half as much as that of the level above (Lee et al., 2015, "
        "arXiv:1409.5185, as nnU-Net has it)",
    )
    feature_centering: Annotated[bool, Since(2)] = Field(
        default=False,
        description="classification: a first round measures the mean of the features that the last "
        "layer reads; the model subtracts it and brings the features to one length. For frozen "
        "public weights: with privacy it gains much",
    )
    initial_weights: InitialWeights | None = Field(default=None, description="public start weights")


class Training(Section):
    """Local fine-tuning between two exchanges."""

    rounds: int | None = Field(
        default=None, ge=1, le=10000, description="rounds of the study; leave out with `[[stages]]`"
    )
    learning_rate: LearningRate | None = Field(
        default=None, description="learning rate; leave out with `[[stages]]`"
    )
    local_epochs: int | None = Field(
        default=None, ge=1, le=1000, description="passes over the site's data in a round"
    )
    local_steps: int | None = Field(
        default=None, ge=1, le=100000, description="or: optimiser steps in a round"
    )
    batch_size: int = Field(
        default=32, ge=1, le=4096, description="images in a step (with privacy: see sampling_rate)"
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field(
        default="adamw", description="local optimiser"
    )
    momentum: Fraction = Field(default=0.0, description="momentum of `sgd`")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay")
    schedule: Annotated[Literal["constant", "cosine", "polynomial"], Since(2, "polynomial")] = (
        Field(
            default="cosine",
            description="learning rate over a stage's rounds; `polynomial`: falls as (1 − t)^0.9",
        )
    )
    warmup_rounds: Annotated[int, Since(2)] = Field(
        default=0,
        ge=0,
        le=1000,
        description="rounds at the beginning of a stage in which the learning rate rises linearly",
    )
    keep: Annotated[Literal["last", "best", "averaged"], Since(2)] = Field(
        default="last",
        description="the model that the study delivers: that of the `last` round; of the round "
        "with the `best` primary figure on all validation patients together, the earliest of "
        "equals; or the mean of those of the last `averaged_rounds` rounds (Izmailov et al., 2018, "
        "arXiv:1803.05407). It goes by figures that sites release anyway, and needs no further "
        "budget",
    )
    averaged_rounds: Annotated[int | None, Since(2)] = Field(
        default=None, ge=2, le=10000, description="keep `averaged`: how many rounds"
    )
    patience: Annotated[int | None, Since(2)] = Field(
        default=None,
        ge=1,
        le=10000,
        description="end the study after so many evaluations on validation patients in a row, in "
        "the last stage, whose primary figure is no better than the best before; sites are charged "
        "for the rounds that they trained. None: all rounds are trained",
    )
    gradient_clipping: Annotated[Positive | None, Since(2)] = Field(
        default=None,
        description="without privacy: largest L2 norm of a step's gradient of the loss",
    )
    loss: Annotated[LossName, Since(2, "focal_giou")] = Field(
        description="; ".join(
            f"{', '.join(f'`{name}`' for name in names)} ({task})"
            for spec in TASKS.values()
            for task, names in spec.losses.items()
        )
    )
    class_weights: tuple[Positive, ...] | None = Field(
        default=None,
        max_length=257,
        description="weight of each class in the loss (segmentation: background first)",
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="for `cross_entropy`")

    def _broken(self) -> Iterator[tuple[str, str]]:
        if (self.local_epochs is None) == (self.local_steps is None):
            yield (
                "training.local_epochs",
                "exactly one of local_epochs and local_steps must be given; write one of them",
            )
        if (self.rounds is None) != (self.learning_rate is None):
            yield (
                "training.rounds",
                "rounds and learning_rate go together; give both, or use [[stages]]",
            )
        if (self.keep == "averaged") != (self.averaged_rounds is not None):
            yield (
                "training.averaged_rounds",
                "keep = averaged and averaged_rounds go together; give both, or neither",
            )
        if self.keep == "averaged" and self.patience is not None:
            yield (
                "training.patience",
                "with patience nobody knows which rounds are the last ones; remove it, or keep the "
                "best",
            )
        if self.momentum and self.optimizer != "sgd":
            yield (
                "training.momentum",
                "momentum belongs to optimizer `sgd`; leave it out or change the optimiser",
            )


class Stage(Section):
    """One stage of multistage transfer learning."""

    name: Name = Field(description="name of the stage")
    rounds: int = Field(ge=1, le=10000, description="rounds of this stage")
    learning_rate: LearningRate = Field(description="learning rate of this stage")
    train: tuple[Pattern, ...] = Field(
        default=("*",),
        min_length=1,
        max_length=64,
        description="shell-style patterns over parameter names; what matches none stays frozen",
    )


class Strategy(Section):
    """How the server combines the updates."""

    name: StrategyName = Field(default="fedavg", description="the algorithm")
    settings: dict[str, float | int] = Field(
        default_factory=dict,
        max_length=16,
        description="its settings, as the table of strategies lists them",
    )
    weighting: Literal["patients", "images"] = Field(
        default="images", description="what a site's weight counts"
    )
    max_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.8,
        description="largest share of a round's weight that one site may have; 1: no cap",
    )
    max_norm_ratio: float = Field(
        default=10.0,
        ge=2,
        description="an update whose norm is larger than this many times the median of its round "
        "is refused; wider for a site of another size than the median site, by the ratio",
    )
    averaging: Fraction = Field(
        default=0.0,
        description="keep an exponential moving average of the global models with this decay and "
        "deliver it; needs no privacy budget, being post-processing",
    )

    @property
    def spec(self) -> StrategySpec:
        """What is known of the algorithm."""
        return STRATEGIES[self.name]

    @field_validator("settings")
    @classmethod
    def _one_way_to_write(
        cls, value: dict[str, float | int], info: ValidationInfo
    ) -> dict[str, float | int]:
        spec = STRATEGIES.get(info.data.get("name", ""))
        return value if spec is None else spec.normal(value)


class Compression(Section):
    """Updates of fewer bytes: how what a site sends is compressed."""

    method: CompressionMethod = Field(
        description="; ".join(f"`{name}`: {one.summary}" for name, one in METHODS.items())
    )
    download: DownloadMethod | None = Field(
        default=None,
        description="how the model travels down to the sites for training, which start from it as "
        "it arrives; none: as it is",
    )
    share: Annotated[float, Field(gt=0, le=0.5)] | None = Field(
        default=None, description="`top-k`: share of the parameters that is sent"
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest",
        description="`int8` to `int3`: to the nearest whole number, or up and down by chance so "
        "that the mean is right",
    )
    error_feedback: bool = Field(
        default=True,
        description="a site keeps what compression left out of an update and adds it to its next "
        "one (Karimireddy et al., 2019, arXiv:1901.09847)",
    )

    def _broken(self) -> Iterator[tuple[str, str]]:
        method = METHODS[self.method]
        if method.sparse and self.share is None:
            yield "compression.share", f"method `{self.method}` needs a share; add it"
        if self.share is not None and not method.sparse:
            yield "compression.share", f"share does not belong to `{self.method}`; remove it"
        if self.rounding != "nearest" and not method.rounds:
            yield (
                "compression.rounding",
                f"`{self.method}` rounds nothing by chance; remove rounding",
            )


class Personal(Section):
    """A model of its own for each site, beside the shared one; it never leaves the site."""

    method: Literal["fine-tuning", "ditto", "fedbn", "fedper", "fedrep"] | None = Field(
        default=None,
        description="`fine-tuning`: each site trains the delivered model on by itself "
        "(Yu et al., 2020, arXiv:2002.04758); `ditto`: a second model trains in each round and is "
        "held near the shared one (Li et al., 2021, arXiv:2012.04221); `fedbn`: normalisation "
        "layers stay at the site (Li et al., 2021, arXiv:2102.07623); `fedper`: the head stays at "
        "the site (Arivazhagan et al., 2019, arXiv:1912.00818); `fedrep`: so it does, and in each "
        "round it trains first by itself, then the rest (Collins et al., 2021, arXiv:2102.07078)",
    )
    local: tuple[Pattern, ...] = Field(
        default=(),
        max_length=64,
        description="`fedper`, `fedrep`: shell-style patterns over names of parameters; what they "
        "match stays at the site, in place of the head",
    )
    rounds: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="`fine-tuning`: local training of so many rounds after the last one",
    )
    learning_rate: LearningRate | None = Field(
        default=None, description="`fine-tuning`: its learning rate; none: the last stage's"
    )
    weight: Annotated[float, Field(ge=0, le=1e4)] | None = Field(
        default=None, description="`ditto`: λ, how strongly the own model is held near the shared"
    )
    alone: bool = Field(
        default=False,
        description="each site also trains a model on its own patients alone, one local training "
        "in each round, from the model of the first round; only its figures leave, so that the "
        "report says at which sites federation is better, and `choose` may take it",
    )
    choose: bool = Field(
        default=True,
        description="a site takes the shared model, or what it trained `alone`, where that is "
        "better than its own on its validation patients; with privacy it always takes its own, "
        "because no ε covers the choice",
    )

    @property
    def keeps_layers(self) -> bool:
        """Whether layers of the shared model stay at each site."""
        return self.method in ("fedbn", "fedper", "fedrep")

    def _broken(self) -> Iterator[tuple[str, str]]:
        if self.method is None and not self.alone:
            yield "personal.method", "[personal] needs a method, or alone = true; add one of them"
        needed = {"fine-tuning": "rounds", "ditto": "weight"}.get(self.method or "")
        if needed and getattr(self, needed) is None:
            yield f"personal.{needed}", f"method `{self.method}` needs {needed}; add it"
        if self.local and self.method not in ("fedper", "fedrep"):
            yield "personal.local", "local belongs to methods `fedper` and `fedrep`; remove it"
        owner = {"rounds": "fine-tuning", "learning_rate": "fine-tuning", "weight": "ditto"}
        for key, method in owner.items():
            if getattr(self, key) is not None and self.method != method:
                yield f"personal.{key}", f"{key} belongs to method `{method}`; remove it"


class Privacy(Section):
    """Differential privacy of each released update."""

    mechanism: Literal["dp-sgd", "none"] = Field(description="`dp-sgd`, or `none` in so many words")
    unit: Literal["patient"] = Field(default="patient", description="whose presence is hidden")
    epsilon: Annotated[float, Field(gt=0, le=100)] | None = Field(
        default=None, description="target ε over the whole study, per site"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="target δ")
    clipping_norm: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(
        default=None, description="L2 bound on what one patient adds to a step's gradient"
    )
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="chance of a patient to be in a step; none: batch_size over patients",
    )
    images_per_patient: int = Field(
        default=1, ge=1, le=64, description="images drawn from each sampled patient in a step"
    )
    centering_steps: Annotated[int | None, Since(2)] = Field(
        default=None,
        ge=1,
        le=1000,
        description="private steps that the first round of `model.feature_centering` takes, inside "
        f"the same ε; none: {CENTERING_STEPS}",
    )
    audit: bool = Field(
        default=False,
        description="simulations: attack the model and its updates at the end, and fail where that "
        "finds a lower bound above ε; between hospitals it changes nothing",
    )

    def _broken(self) -> Iterator[tuple[str, str]]:
        parts = {"epsilon": self.epsilon, "delta": self.delta, "clipping_norm": self.clipping_norm}
        if self.mechanism == "dp-sgd" and (missing := [k for k, v in parts.items() if v is None]):
            yield (
                f"privacy.{missing[0]}",
                f"mechanism `dp-sgd` needs {', '.join(missing)}; add them",
            )
        if self.mechanism == "none" and (
            given := [
                k
                for k, v in {
                    **parts,
                    "sampling_rate": self.sampling_rate,
                    "centering_steps": self.centering_steps,
                }.items()
                if v is not None
            ]
        ):
            yield (
                f"privacy.{given[0]}",
                f"mechanism `none` takes no {', '.join(given)}; remove them",
            )

    @property
    def on(self) -> bool:
        """Whether updates are made private."""
        return self.mechanism == "dp-sgd"


class Participation(Section):
    """Which sites a round needs and how long it waits for them."""

    sites: int = Field(
        default=2,
        ge=1,
        le=10000,
        description="sites needed to start; after its first round a study goes on with `quorum`",
    )
    quorum: int | None = Field(
        default=None,
        ge=1,
        description="updates that make a round count; none: half of `sites`, rounded up",
    )
    deadline: Positive = Field(default=3600.0, description="seconds that a round waits")
    retries: int = Field(
        default=1, ge=0, le=100, description="times a round without quorum is repeated"
    )
    minimum_patients: int = Field(default=2, ge=1, description="patients a site must bring")

    @property
    def needed(self) -> int:
        """Updates that make a round count."""
        return self.quorum if self.quorum is not None else (self.sites + 1) // 2


class Metrics(Section):
    """What is measured, and which figure leads."""

    report: tuple[MetricName, ...] = Field(min_length=1, description="figures in the report")
    primary: MetricName = Field(description="the figure that comparisons use; one of `report`")
    evaluate_every: int = Field(
        default=1, ge=1, description="rounds between two evaluations on validation patients"
    )
    epsilon: Annotated[float, Field(ge=0.001, le=100)] = Field(
        default=4.0,
        description="ε of the counts that a site's evaluations release over the whole study: for "
        "each test patient in all tests together (one, and one for each model of the sites' own), "
        "for each validation patient in all validations "
        "together. A budget of its own beside `privacy.epsilon`; a site whose policy lets exact "
        "counts out does not use it",
    )
    images_per_patient: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="images of a patient that count in an evaluation with noise, drawn at random "
        "where there are more; together they weigh as much as one patient. Raise it where "
        "patients have many images",
    )

    def _broken(self) -> Iterator[tuple[str, str]]:
        if self.primary not in self.report:
            yield ("metrics.primary", "primary must be one of the metrics in report; add it there")


class Plan(Section):
    """A whole study plan.

    Notes
    -----
    Use :func:`fedward.plan.load_plan` to read one: it turns every broken rule into a
    :class:`fedward.errors.PlanError` that names the key.
    """

    version: Annotated[Literal[1], BeforeValidator(_whole)] = Field(
        description="version of the plan format"
    )
    study: Study
    task: Task
    images: Annotated[Images, Since(2)] = Field(default=Images())
    preprocessing: Preprocessing
    table: Annotated[TableInput | None, Since(2)] = Field(
        default=None, description="what a table says of each image; none: the image alone"
    )
    split: Split = Field(default=Split())
    model: Model
    training: Training
    stages: tuple[Stage, ...] = Field(default=(), max_length=100)
    strategy: Strategy = Field(default=Strategy())
    personal: Annotated[Personal | None, Since(2)] = Field(
        default=None, description="a model of each site's own; none: only the shared one"
    )
    compression: Annotated[Compression | None, Since(2)] = Field(
        default=None, description="how updates are compressed; none: they travel as they are"
    )
    privacy: Privacy
    participation: Participation = Field(default=Participation())
    metrics: Metrics

    @model_validator(mode="before")
    @classmethod
    def _toml_arrays(cls, value: Any) -> Any:
        return _tuples(value)

    def _broken(self) -> Iterator[tuple[str, str]]:
        yield from _broken(self)

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """The stages; before them the round that measures the mean of the features, if any."""
        if not self.model.feature_centering:
            return self.training_stages
        first = Stage(name=CENTERING, rounds=1, learning_rate=1.0, train=(FEATURE_MEAN,))
        return (first, *self.training_stages)

    @property
    def training_stages(self) -> tuple[Stage, ...]:
        """The stages that train; a plan without any is one stage that trains everything."""
        if self.stages:
            return self.stages
        if self.training.rounds is None or self.training.learning_rate is None:
            raise ValueError("a plan without stages needs training.rounds")  # held by the rules
        return (
            Stage(
                name="all", rounds=self.training.rounds, learning_rate=self.training.learning_rate
            ),
        )

    @property
    def rounds(self) -> int:
        """Rounds over all stages."""
        return sum(stage.rounds for stage in self.schedule)

    @property
    def first_training_round(self) -> int:
        """1, or the round after the one that measures the mean of the features."""
        return 2 if self.model.feature_centering else 1

    def is_centering(self, round_: int) -> bool:
        """Whether a round measures the mean of the features, and trains nothing."""
        return self.model.feature_centering and round_ == 1

    def compression_of(self, round_: int) -> Compression | None:
        """How the updates of a round are compressed; none: they are not.

        The mean of the features travels as it is, and of a site's own model nothing does.
        """
        first = self.first_training_round
        return self.compression if first <= round_ <= self.rounds else None

    @property
    def keeps_state(self) -> bool:
        """Whether a site keeps arrays from round to round."""
        feedback = self.compression is not None and self.compression.error_feedback
        return bool(self.strategy.spec.kept) or self.personal is not None or feedback

    @property
    def own_round(self) -> int | None:
        """The round of the sites' own models, after the last one; none where there are none."""
        return self.rounds + 1 if self.personal is not None and self.personal.method else None

    @property
    def alone_round(self) -> int | None:
        """The round after that, of what each site trains alone; none where they do not."""
        alone = self.personal is not None and self.personal.alone
        return (self.own_round or self.rounds) + 1 if alone else None

    @property
    def last_round(self) -> int:
        """The last round of all, those included in which only the sites' own models count."""
        return self.alone_round or self.own_round or self.rounds

    @property
    def last_trained_round(self) -> int:
        """The last round that trains: for `fine-tuning` that of the sites' own models.

        Later ones are only tested. A site that trained in one would take steps that nobody counted.
        """
        own = self.own_round
        return own if own is not None and self.passes(own) else self.rounds

    @property
    def tests(self) -> tuple[int, ...]:
        """The rounds that are tested, in their order: 0 stands for the shared model."""
        return (0, *(one for one in (self.own_round, self.alone_round) if one is not None))

    def passes(self, round_: int) -> int:
        """How often a site does the local training of a round, for whichever model; 0: once."""
        if round_ < 1 or self.is_centering(round_):
            return 1
        personal = self.personal
        if round_ <= self.rounds:
            if personal is None:
                return 1
            return 1 + (personal.method in ("ditto", "fedrep")) + personal.alone
        return (personal.rounds or 0) if personal is not None and round_ == self.own_round else 0

    def passes_until(self, round_: int) -> int:
        """The same in all rounds up to one, it included."""
        own = self.passes(self.rounds + 1) if round_ > self.rounds else 0
        return self.passes(1) + (min(round_, self.rounds) - 1) * self.passes(self.rounds) + own

    def is_evaluated(self, round_: int, part: str) -> bool:
        """Whether the study evaluates in this round: validation in some, the test in round 0.

        The sites' own models are tested in the rounds after the last one. A site answers these
        evaluations and no other one.
        """
        if part == "test":
            return round_ in self.tests
        every = self.metrics.evaluate_every
        return 1 <= round_ <= self.rounds and (round_ % every == 0 or round_ == self.rounds)

    def evaluation_epsilon(self, part: str) -> float:
        """ε of one evaluation; those of one part share `metrics.epsilon` equally."""
        if part == "test":
            return self.metrics.epsilon / len(self.tests)
        return self.metrics.epsilon / math.ceil(self.rounds / self.metrics.evaluate_every)

    def stage_of(self, round_: int) -> tuple[Stage, int]:
        """The stage of a round (from 1), and the round's place in it (from 0)."""
        if self.rounds < round_ <= self.last_round:
            return self.schedule[-1], self.schedule[-1].rounds - 1
        place = round_ - 1
        for stage in self.schedule:
            if place < stage.rounds:
                return stage, place
            place -= stage.rounds
        raise ValueError(f"the plan has {self.rounds} rounds, there is no round {round_}")


def _tuples(value: Any) -> Any:
    # Strict mode would refuse TOML's arrays where a tuple stands and 1 where 1.0 is meant is fine.
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value
