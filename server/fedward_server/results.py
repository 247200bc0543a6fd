"""What a study leaves behind: the schema of ``metrics.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedward.protocol import SiteFacts
from fedward_server.memorisation import Audit

if TYPE_CHECKING:
    from fedward.models import WeightsReport

# ε where there is no noise, or no accountant can follow what a site says of it.
NO_BOUND: Final = 1e9
Figures = dict[str, float | None]
Intervals = dict[str, tuple[float, float]]
ArmKind = Literal["federated", "personal", "alone", "left-out", "pooled"]


class Strict(BaseModel):
    """Base of the parts: nothing unknown inside."""

    model_config = ConfigDict(extra="forbid")


class Failure(Strict):
    """A site whose update did not count in a round, and why."""

    site: str
    reason: str
    kind: str = Field(
        default="", description="a refusal's kind (policy, budget, …), `invalid` or `silent`"
    )


class SiteRound(Strict):
    """One site in one round."""

    patients: int = Field(description="patients trained on")
    images: int = Field(description="images trained on")
    steps: int = Field(description="optimiser steps")
    loss: float | None = Field(
        default=None, description="mean training loss; not released by private training"
    )
    seconds: float = Field(description="wall seconds of training at the site")
    cpu_seconds: float = Field(default=0.0, description="CPU seconds of training at the site")
    epsilon: float | None = Field(default=None, description="ε spent so far at δ")
    share: float | None = Field(default=None, description="share of the round's weight, 0 to 1")
    pull: float | None = Field(
        default=None,
        description="what its update added to the round's step together with the others': the "
        "inner product of its weighted update with the sum of theirs; none where it was alone",
    )
    agreement: float | None = Field(
        default=None,
        description="cosine between its update and the others', each of these as of one length, -1 "
        "to 1",
    )
    validation: Figures = Field(
        default_factory=dict, description="figures on its validation patients"
    )


class Round(Strict):
    """One round of an arm."""

    round: int = Field(description="from 1")
    stage: str = Field(description="name of the stage in the plan")
    seconds: float = Field(description="wall seconds of the round")
    bytes_down: int = Field(default=0, description="bytes of tensors sent to the sites")
    bytes_up: int = Field(default=0, description="bytes of tensors that came back")
    train_loss: float | None = Field(default=None, description="mean loss, weighted by images")
    validation: Figures = Field(
        default_factory=dict, description="figures on all validation patients together"
    )
    sites: dict[str, SiteRound] = Field(default_factory=dict)
    failures: list[Failure] = Field(default_factory=list)


class SitePrivacy(Strict):
    """What one site's patients were promised, and what was spent."""

    epsilon: float = Field(
        description="ε at δ of all steps, worked out by the aggregator in rounds that are "
        "evaluated, and when the study ends or stands still; 1e9: without a bound"
    )
    delta: float
    noise_multiplier: float
    sampling_rate: float
    steps: int = Field(
        description="private steps of all rounds that the site was ordered to train, but for those "
        "that it says it did not charge"
    )
    last_round: int = Field(default=0, description="the last of those rounds")

    def spent(self, form: str) -> str:
        """ε for people, in a format of :func:`format`."""
        return "no bound" if self.epsilon >= NO_BOUND else format(self.epsilon, form)


class OperatingPoint(Strict):
    """How a classifier decides on one class."""

    name: str = Field(description="the class")
    threshold: float | None = Field(
        description="probability from which it is decided for; none: where it is the likeliest"
    )
    positives: float = Field(description="images with the class; private counts: about")
    negatives: float = Field(description="images without it")
    sensitivity: float | None = Field(default=None, description="none without positives")
    specificity: float | None = Field(default=None, description="none without negatives")
    sensitivity_interval: tuple[float, float] | None = Field(
        default=None, description="of 95 %, by patient"
    )
    specificity_interval: tuple[float, float] | None = Field(default=None, description="the same")


class Answers(Strict):
    """A classifier's answers in counts: what its curves are drawn from."""

    curves: dict[str, list[tuple[float, float, float]]] = Field(
        default_factory=dict,
        description="by class, thresholds from high to low: threshold, false positives, true "
        "positives; empty where scores were withheld",
    )
    confusion: list[list[float]] = Field(
        default_factory=list,
        description="rows: true class, columns: likeliest class; multi-label: empty",
    )
    calibration: list[tuple[float, float, float]] = Field(
        default_factory=list,
        description="bins of confidence: mean confidence, share of right answers, answers",
    )
    operating_points: list[OperatingPoint] = Field(default_factory=list)


class TestFigures(Strict):
    """Final test metrics of one arm."""

    __test__ = False
    per_site: dict[str, Figures] = Field(description="on each site's own test patients")
    pooled: Figures = Field(
        description="on the test patients of the sites in `contributors` together"
    )
    per_class: dict[str, dict[str, float | None]] = Field(
        default_factory=dict, description="segmentation: metric, class, figure on all together"
    )
    images: dict[str, int] = Field(default_factory=dict, description="test images per site")
    patients: dict[str, int] = Field(default_factory=dict, description="test patients per site")
    contributors: dict[str, list[str]] = Field(
        default_factory=dict,
        description="by metric, the sites that let its counts go; a site of `per_site` that is not "
        "in the list withheld them",
    )
    not_measured: list[Failure] = Field(
        default_factory=list, description="sites with test patients that sent no counts, and why"
    )
    intervals: Intervals = Field(
        default_factory=dict,
        description="95 % interval of each figure of `pooled`, over patients and with the noise of "
        "private counts; images of one patient are taken as alike",
    )
    site_intervals: dict[str, Intervals] = Field(
        default_factory=dict, description="the same for each site of `per_site`"
    )
    class_intervals: dict[str, Intervals] = Field(
        default_factory=dict, description="the same for the figures of `per_class`"
    )
    answers: Answers | None = Field(
        default=None, description="classification: of all sites that let them go"
    )
    site_answers: dict[str, Answers] = Field(
        default_factory=dict, description="the same for each site; shared models only"
    )
    evaluation_epsilon: float | None = Field(
        default=None,
        description="ε of the counts for each test patient of every site; none: there is no bound",
    )
    standard_errors: dict[str, float] = Field(
        default_factory=dict,
        description="standard deviation that the noise of private counts alone gives each figure "
        "of `pooled`; empty: exact counts",
    )
    site_standard_errors: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="the same for each site of `per_site`"
    )

    def of_site(self, site: str) -> TestFigures:
        """What is in it of one site's own patients."""
        return TestFigures(
            per_site={site: self.per_site[site]},
            pooled={},
            images={site: self.images[site]},
            patients={site: self.patients[site]},
            site_intervals={site: self.site_intervals.get(site, {})},
            site_standard_errors={site: self.site_standard_errors.get(site, {})},
            evaluation_epsilon=self.evaluation_epsilon,
        )


def left_out_name(site: str) -> str:
    """The name of the arm of a model that a site took no part in."""
    return f"without {site}"


class Arm(Strict):
    """One way to train the same model on the same patients."""

    name: str = Field(description="e.g. `federated`, `federated, ε = 8`, `alone: site-1`, `pooled`")
    kind: ArmKind
    site: str | None = Field(
        default=None,
        description="`alone`: whose data it saw; `left-out`: the site that took no part",
    )
    epsilon: float | None = Field(default=None, description="the plan's target ε; none: no privacy")
    delta: float | None = None
    rounds: list[Round] = Field(default_factory=list)
    best_round: int | None = Field(
        default=None,
        description="plans that keep the best: the round whose shared model is delivered; none: "
        "the last one, as no validation figure was released",
    )
    ended_early: bool = Field(
        default=False,
        description="plans with a patience: whether it ended the arm before the plan's last round",
    )
    test: TestFigures | None = Field(
        default=None, description="none while unfinished, and where nothing could be measured"
    )
    unmeasured: str = Field(
        default="", description="why a finished arm has no test figures; empty where it has some"
    )
    own: TestFigures | None = Field(
        default=None,
        description="plans with [personal]: the same of the model that each site has of its own, "
        "on its own test patients",
    )
    alone: TestFigures | None = Field(
        default=None,
        description="plans with `personal.alone`: the same of the model that each site trained "
        "alone in the meantime, on its own test patients",
    )
    unseen: TestFigures | None = Field(
        default=None,
        description="the delivered model at the sites that took no part in training and only "
        "evaluate it",
    )
    own_bytes_down: int = Field(
        default=0,
        description="bytes of tensors sent to the sites after the last round, for the training of "
        "models of their own; no tensors come back",
    )
    privacy: dict[str, SitePrivacy] = Field(default_factory=dict, description="per site")
    seconds: float = Field(default=0.0, description="wall seconds of the arm")

    @property
    def personal(self) -> Arm | None:
        """The sites' own models as an arm, for tables and comparisons; or none."""
        if self.own is None:
            return None
        return Arm(
            name=f"{self.name}, own models",
            kind="personal",
            epsilon=self.epsilon,
            delta=self.delta,
            test=self.own,
        )

    @property
    def lone(self) -> list[Arm]:
        """What each site trained alone as an arm of its own, for tables and comparisons."""
        if self.alone is None:
            return []
        found = self.alone
        return [
            Arm(
                name=f"alone: {site}",
                kind="alone",
                site=site,
                epsilon=self.epsilon,
                delta=self.delta,
                test=found.of_site(site),
            )
            for site in found.per_site
        ]

    @property
    def left_out(self) -> list[Arm]:
        """The model at each site that only evaluates as an arm of its own, for tables."""
        found = self.unseen or TestFigures(per_site={}, pooled={})
        return [
            Arm(
                name=left_out_name(site),
                kind="left-out",
                site=site,
                epsilon=self.epsilon,
                delta=self.delta,
                test=found.of_site(site),
            )
            for site in found.per_site
        ]

    @property
    def finished(self) -> bool:
        """Whether its model was tested, or is known not to be testable."""
        return self.test is not None or bool(self.unmeasured)


class Paired(Strict):
    """How two ways to train differ on the same test patients, patient by patient."""

    one: str = Field(description="name of an arm; `…, own models` of the sites' own models in it")
    others: list[str] = Field(description="the arms whose mean it is compared with")
    metric: str
    own: bool = Field(
        description="false: on all test patients together; true: mean over the hospitals, each on "
        "its own patients, against its own model"
    )
    site: str = Field(default="", description="on this hospital's own test patients alone")
    difference: float = Field(description="one minus the mean of the others")
    interval: tuple[float, float] = Field(
        description="95 % interval of the difference, by a jackknife over patients"
    )


class StudyResults(Strict):
    """Everything about one study; the content of ``metrics.json``."""

    schema_version: Literal[1] = 1
    study: str
    title: str = ""
    complete: bool = Field(
        default=False, description="false: interrupted, what was finished is here"
    )
    synthetic: bool = Field(default=False, description="the data say that they are synthetic")
    plan: dict[str, Any] = Field(description="the plan as it was run")
    plan_sha256: str
    seed: int
    engine: str
    device: str
    partition: str = ""
    figures: str = Field(
        default="",
        description="simulations: how counts left the federated arms' sites: `private`, "
        "`minimum-cells` (as a hospital's policy lets them go) or `exact`",
    )
    primary: str = Field(description="the metric that comparisons use")
    parameters: int = Field(description="parameters of the model")
    left_out: dict[str, int] = Field(
        default_factory=dict,
        description="files and rows left out that belong to no site: reason, count",
    )
    missing_classes: dict[str, list[str]] = Field(
        default_factory=dict, description="simulations: classes that a site has no image of"
    )
    weights_report: dict[str, int] = Field(
        default_factory=dict, description="initial weights: matched, reshaped_head, missing, unused"
    )
    named: list[str] = Field(
        default_factory=list,
        description="between hospitals: the sites that the study names for its training",
    )
    evaluate_only: list[str] = Field(
        default_factory=list,
        description="sites that take no part in training and evaluate the delivered model",
    )
    unchecked: list[str] = Field(
        default_factory=list,
        description="between hospitals: the sites whose stated size no enrolled size checked",
    )
    weights_names: dict[str, list[str]] = Field(
        default_factory=dict,
        description="initial weights: the model's arrays that are missing in the file, and those "
        "of a reshaped_head",
    )
    sites: list[SiteFacts] = Field(default_factory=list)
    arms: list[Arm] = Field(default_factory=list)
    paired: list[Paired] = Field(
        default_factory=list, description="simulations: differences between arms"
    )
    missing: list[str] = Field(
        default_factory=list,
        description="simulations that did not run to their end: the planned arms that have no test "
        "figures, and how far each came",
    )
    model_sha256: str = Field(
        default="", description="SHA-256 of `model.safetensors`; empty while there is none"
    )
    audit: Audit | None = Field(default=None, description="simulations: what attacks found")
    start_up_seconds: float = Field(default=0.0, description="from the command to the first round")
    seconds: float = Field(default=0.0, description="wall seconds of the whole run")
    versions: dict[str, str] = Field(default_factory=dict, description="fedward, torch, flwr, …")

    def take_weights(self, report: WeightsReport) -> None:
        """Write down what became of the public weights: all counts, and what stays fresh."""
        kinds = ("matched", "reshaped_head", "missing", "unused")
        self.weights_report = {kind: len(getattr(report, kind)) for kind in kinds}
        names = {"missing": report.missing, "reshaped_head": report.reshaped_head}
        self.weights_names = {kind: list(of) for kind, of in names.items() if of}

    def arm(self, kind: ArmKind) -> Arm | None:
        """The first arm of a kind, if there is one."""
        return next((arm for arm in self.arms if arm.kind == kind), None)
