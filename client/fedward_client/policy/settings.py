"""``[policy]`` of ``site.toml``: what studies may do at this hospital."""

from __future__ import annotations

from datetime import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from fedward.config_section import DatasetName, Section
from fedward.plan.messages import rule_error
from fedward.plan.schema import MetricName, ModelName
from fedward_client.policy.hours import QuietHours

Approval = Literal["manual", "within-policy"]
CountRelease = Literal["private", "minimum-cells"]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Pattern = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9*?\[\]!._-]+$")]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]

MODELS: tuple[ModelName, ...] = get_args(ModelName)
METRICS: tuple[MetricName, ...] = get_args(MetricName)


class Limits(Section):
    """What a study is held to; an entry of ``[[policy.studies]]`` may say otherwise."""

    approval: Approval = Field(
        default="manual",
        description="`manual`: each plan waits for `fedward-client approve`; `within-policy`: what "
        "keeps all limits goes ahead, unless the plan selects images by `[images]` or `[table]`",
    )
    models: tuple[ModelName, ...] = Field(default=MODELS, description="networks that may be used")
    max_parameters: int = Field(
        default=100_000_000, ge=1, description="largest number of parameters of a network"
    )
    minimum_patients: int = Field(
        default=20,
        ge=2,
        description="patients that the frozen cohort must have, and those whose images a plan "
        "takes",
    )
    minimum_sites: int = Field(
        default=1,
        ge=1,
        description="sites that a round of training must ask, this one included, as the "
        "coordinator signs it in each order; 1: also a study with this site alone",
    )
    minimum_per_class: int = Field(
        default=5, ge=0, description="patients that it must have of each class (classification)"
    )
    require_privacy: bool = Field(
        default=True, description="whether updates must be differentially private"
    )
    own_models: bool = Field(
        default=True,
        description="whether a study may have the site train models of its own, which stay here "
        "(`[personal]` of a plan, `alone` included)",
    )
    max_epsilon_per_study: Above = Field(
        default=8.0, description="largest ε of one study, at its own δ and at the site's"
    )
    max_delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="largest δ of a study; in `[policy]` also the δ at which caps are held. None: "
        "the largest power of ten that is at most 1 / (10 patients of the cohort), and at most "
        "1e-3",
    )
    metrics: tuple[MetricName, ...] = Field(
        default=METRICS, description="figures that may be worked out from what leaves"
    )
    counts: CountRelease = Field(
        default="private",
        description="how counts of evaluations leave: `private`, with noise that makes them "
        "differentially private for each patient; `minimum-cells`, exact figures in which cells "
        "below `minimum_count` are merged or withheld, with the noise of `count_noise` and no ε",
    )
    count_noise: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        allow_inf_nan=False,
        description="`minimum-cells`: scale of the Laplace noise for each table that an image "
        "enters, in images; 0: none",
    )
    max_evaluation_epsilon: Above = Field(
        default=8.0, description="largest ε of a study's evaluations (`metrics.epsilon`)"
    )
    rounding: int = Field(
        default=3, ge=0, le=9, description="digits after the point of sums that leave"
    )
    minimum_count: int = Field(
        default=5,
        ge=1,
        description="counts of a class with fewer images than this are withheld; of 0 they are not",
    )


class StudyRule(Section):
    """Which studies a dataset serves; the first entry that matches a study decides."""

    match: Pattern = Field(
        description="shell-style pattern over the study's id, and over the name in its plan"
    )
    dataset: DatasetName = Field(description="the dataset that serves it")
    approval: Approval | None = Field(default=None, description="instead of the policy's")
    models: tuple[ModelName, ...] | None = Field(default=None, description="the same")
    max_parameters: int | None = Field(default=None, ge=1, description="the same")
    minimum_patients: int | None = Field(default=None, ge=2, description="the same")
    minimum_sites: int | None = Field(default=None, ge=1, description="the same")
    minimum_per_class: int | None = Field(default=None, ge=0, description="the same")
    require_privacy: bool | None = Field(default=None, description="the same")
    own_models: bool | None = Field(default=None, description="the same")
    max_epsilon_per_study: Above | None = Field(default=None, description="the same")
    max_delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="the same"
    )
    metrics: tuple[MetricName, ...] | None = Field(default=None, description="the same")
    counts: CountRelease | None = Field(default=None, description="the same")
    count_noise: float | None = Field(
        default=None, ge=0, le=1000, allow_inf_nan=False, description="the same"
    )
    max_evaluation_epsilon: Above | None = Field(default=None, description="the same")
    rounding: int | None = Field(default=None, ge=0, le=9, description="the same")
    minimum_count: int | None = Field(default=None, ge=1, description="the same")

    def matches(self, study: str, name: str) -> bool:
        """Whether the entry is for a study of this id, with this name in its plan."""
        return any(fnmatchcase(word, self.match) for word in (study, name) if word)


class PolicySection(Limits):
    """What studies may do at this hospital. Without it no study is served."""

    studies: tuple[StudyRule, ...] = Field(
        default=(), description="which studies are served, and by which dataset; none: no study"
    )
    coordinators: tuple[Fingerprint, ...] = Field(
        default=(), description="SHA-256 of the keys of coordinators that are accepted"
    )
    any_coordinator: bool = Field(
        default=False, description="accept every coordinator, instead of a list"
    )
    max_epsilon_per_cohort: Above = Field(
        default=8.0,
        description="largest ε of all studies together on one patient, at the site's δ",
    )
    max_evaluation_epsilon_per_cohort: Above = Field(
        default=16.0,
        description="largest ε of the evaluations of all studies together on one cohort",
    )
    quiet_hours: tuple[str, ...] = Field(
        default=(), description='local times without training, such as "Mon-Fri 07:00-18:00"'
    )
    timezone: str = Field(
        default="",
        max_length=64,
        description="whose local times `quiet_hours` are, such as `Europe/Berlin`; none: the "
        "machine's, which in a container is usually UTC",
    )
    max_gpu_memory_gib: Above | None = Field(
        default=None, description="GPU memory that training may take; none: all"
    )
    max_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads that training may take, and processes that read images; none: all",
    )
    tell_datasets: bool = Field(
        default=False,
        description="tell coordinators the names of datasets; sizes are told for each study",
    )
    max_upload_mib: Above = Field(
        default=512.0, description="largest reply, MiB of tensors, as they are before compression"
    )

    @field_validator("quiet_hours")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            QuietHours.parse(one)
        return value

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            return value and ZoneInfo(value).key
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise rule_error(
                [("", "a time zone is one of IANA's, such as Europe/Berlin; mend its name")]
            ) from None

    @model_validator(mode="after")
    def _one_way(self) -> PolicySection:
        if self.any_coordinator and self.coordinators:
            rule = "coordinators and any_coordinator exclude each other; keep one"
            raise rule_error([("policy.any_coordinator", rule)])
        return self

    def local_time(self, now: datetime) -> datetime:
        """A time of this machine without a zone, as the clocks of `timezone` show it."""
        if not self.timezone:
            return now
        return now.astimezone(ZoneInfo(self.timezone)).replace(tzinfo=None)

    def accepts(self, coordinator: str) -> bool:
        """Whether the site serves this coordinator, named by its key's SHA-256."""
        return self.any_coordinator or coordinator in self.coordinators

    def rule_for(self, study: str, name: str) -> StudyRule | None:
        """The first entry for a study of this id, with this name in its plan."""
        return next((one for one in self.studies if one.matches(study, name)), None)

    def limits(self, rule: StudyRule) -> Limits:
        """The limits of a study under its entry."""
        own = rule.model_dump(exclude_none=True, exclude={"match", "dataset"})
        return Limits.model_validate(
            {name: own.get(name, getattr(self, name)) for name in Limits.model_fields}
        )
