"""Decide whether a study meets the site's policy, before any image is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fedward.dp.accounting import default_delta
from fedward.errors import PolicyError
from fedward.plan.schema import Images, Plan
from fedward.rule_codes import FIX, RuleCode, Values
from fedward_client.policy.settings import Approval, Limits, PolicySection

if TYPE_CHECKING:
    from fedward_client.cohort.freeze import CohortFile, Item

_BYTES: Final = 4  # of a float32
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a frozen cohort from its record alone.

    Attributes
    ----------
    patients, images : int
        How many it has.
    per_class : mapping
        Patients of each class, by its name; empty where samples have masks instead of labels.
    per_image : bool
        Whether the images name no patients, and each counts as one.
    images_are_patients : bool
        Whether the site takes that for right.
    """

    patients: int
    images: int
    per_class: Mapping[str, int]
    per_image: bool = False
    images_are_patients: bool = False


@dataclass(frozen=True)
class StudyRequest:
    """What a coordinator asks for.

    Attributes
    ----------
    study : str
        The study's id.
    plan, plan_hash : Plan, str
        The plan and its SHA-256.
    coordinator : str
        SHA-256 of the coordinator's key, as 64 hexadecimal digits.
    parameters : int
        Of the plan's network (:func:`fedward.models.describe`).
    facts : DatasetFacts or None
        Of the frozen cohort that would serve it; None while there is none.
    sites : int or None
        How many sites the signed order says are asked; None where no round depends on it.
    evaluate_only : bool
        Whether the site is to train nothing, and only to evaluate the delivered model.
    """

    study: str
    plan: Plan
    plan_hash: str
    coordinator: str
    parameters: int
    facts: DatasetFacts | None
    sites: int | None = None
    evaluate_only: bool = False


@dataclass(frozen=True)
class Violation:
    """One broken limit.

    Attributes
    ----------
    key : str
        What it is about, in the words of the plan.
    code : RuleCode
        What must hold; one of :data:`fedward.rule_codes.RULES`.
    values : mapping
        What was asked for and what the site allows. The code declares what the coordinator may
        know: it may not know how few patients there are.
    """

    key: str
    code: RuleCode
    values: Values = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """What must hold, in words."""
        return self.code.rule(self.code.coarse(self.values))

    def words(self) -> str:
        """Key, value and limit for the coordinator."""
        return self.code.found(self.code.coarse(self.values))


@dataclass(frozen=True)
class Decision:
    """What the policy says of a study.

    Attributes
    ----------
    violations : tuple of Violation
        All of them, the gravest first.
    dataset : str
        The dataset that serves the study; "" when none does.
    limits : Limits
        What the study is held to.
    selects : bool
        Whether the plan chooses which images are counted, by their headers or by a table.
    """

    violations: tuple[Violation, ...]
    dataset: str
    limits: Limits
    selects: bool = False

    @property
    def allowed(self) -> bool:
        """Whether nothing is broken; a person may still have to approve."""
        return not self.violations

    @property
    def approval(self) -> Approval:
        """Whether a person has to approve: also within the policy where the plan selects images.

        Two plans whose patterns or ranges differ a little tell by their sizes how many patients
        lie between them. No ledger counts such answers, so a person sees each plan first.
        """
        return "manual" if self.selects else self.limits.approval

    def enforce(self) -> None:
        """Raise PolicyError for the first violation."""
        if self.violations:
            first = self.violations[0]
            raise PolicyError(first.code, values=first.values, fix=FIX)


def dataset_for(policy: PolicySection, study: str, plan: Plan) -> str:
    """The dataset that would serve a study, "" when none would."""
    rule = policy.rule_for(study, plan.study.name)
    return rule.dataset if rule else ""


def facts_of(cohort: CohortFile, images_are_patients: bool = False) -> DatasetFacts:
    """What a frozen cohort's record says of it, beside what its dataset's section says."""
    classes, people = cohort.task.classes, dict[str, set[str]]()
    for item in cohort.items:
        for index in _classes(item, cohort.task.multi_label):
            people.setdefault(classes[index], set()).add(item.patient)
    labelled = any(not (item.label is None and item.boxes is None) for item in cohort.items)
    per_class = {name: len(people.get(name, ())) for name in classes} if labelled else {}
    return DatasetFacts(
        cohort.patients, len(cohort.items), per_class, cohort.per_image, images_are_patients
    )


def _classes(item: Item, multi_label: bool) -> Iterator[int]:
    yield from {int(row[-1]) - 1 for row in item.boxes or ()}
    if item.label is not None:
        yield from (i for i, flag in enumerate(item.label) if flag) if multi_label else item.label


def decide(policy: PolicySection, request: StudyRequest) -> Decision:
    """Everything in which a study goes beyond the site's policy."""
    rule = policy.rule_for(request.study, request.plan.study.name)
    limits = policy.limits(rule) if rule else policy
    found = [
        *_whose(policy, request, known=rule is not None),
        *_model(policy, limits, request),
        *_own_models(limits, request),
        *_privacy(policy, limits, request),
        *_evaluation(limits, request.plan),
        *_others(limits, request.sites),
        *_people(limits, request),
    ]
    plan = request.plan
    selects = plan.images != Images() or plan.table is not None
    return Decision(tuple(found), rule.dataset if rule else "", limits, selects)


def _whose(policy: PolicySection, request: StudyRequest, *, known: bool) -> Iterator[Violation]:
    if not policy.accepts(request.coordinator):
        yield Violation("coordinator", RuleCode.COORDINATOR)
    if not known:
        yield Violation("study.name", RuleCode.STUDY)


def _model(policy: PolicySection, limits: Limits, request: StudyRequest) -> Iterator[Violation]:
    name, count = request.plan.model.name, request.parameters
    if name not in limits.models:
        yield Violation("model.name", RuleCode.MODEL, {"model": name})
    if count > (most := limits.max_parameters):
        yield Violation("model", RuleCode.PARAMETERS, {"asked": count, "limit": most})
    if request.evaluate_only:
        return  # no update leaves
    # A site counts what a strategy sends besides the update as well.
    sent = count * (1 + len(request.plan.strategy.spec.sent))
    if (upload := sent * _BYTES / _MIB) > (largest := policy.max_upload_mib):
        yield Violation("model", RuleCode.UPLOAD, {"asked": upload, "limit": largest})


def _own_models(limits: Limits, request: StudyRequest) -> Iterator[Violation]:
    trains = request.plan.personal is not None and not request.evaluate_only
    if trains and not limits.own_models:
        yield Violation("personal", RuleCode.OWN_MODELS)


def _privacy(policy: PolicySection, limits: Limits, request: StudyRequest) -> Iterator[Violation]:
    plan = request.plan
    if request.evaluate_only:
        return  # it is about updates
    if not plan.privacy.on:
        if limits.require_privacy:
            yield Violation("privacy.mechanism", RuleCode.PRIVATE)
        return
    epsilon, delta = plan.privacy.epsilon or 0.0, plan.privacy.delta or 0.0
    most_delta = limits.max_delta
    if most_delta is None:
        most_delta = default_delta(request.facts.patients if request.facts else 0)
    for key, code, value, limit in (
        ("privacy.epsilon", RuleCode.EPSILON, epsilon, limits.max_epsilon_per_study),
        ("privacy.epsilon", RuleCode.COHORT_EPSILON, epsilon, policy.max_epsilon_per_cohort),
        ("privacy.delta", RuleCode.DELTA, delta, most_delta),
    ):
        if value > limit:
            yield Violation(key, code, {"asked": value, "limit": limit})


def _evaluation(limits: Limits, plan: Plan) -> Iterator[Violation]:
    asked, most = plan.metrics.epsilon, limits.max_evaluation_epsilon
    if limits.counts == "private" and asked > most:
        values = {"asked": asked, "limit": most}
        yield Violation("metrics.epsilon", RuleCode.EVALUATION_EPSILON, values)


def _others(limits: Limits, sites: int | None) -> Iterator[Violation]:
    # Who tells no number asks this site alone, as far as it can know.
    if sites is not None and max(1, sites) < (least := limits.minimum_sites):
        values = {"asked": max(1, sites), "limit": least}
        yield Violation("participation.sites", RuleCode.SITES, values)


def _people(limits: Limits, request: StudyRequest) -> Iterator[Violation]:
    facts = request.facts
    if facts is None:
        yield Violation("cohort", RuleCode.COHORT)
        return
    if request.plan.privacy.on and facts.per_image and not facts.images_are_patients:
        yield Violation("patients", RuleCode.PATIENT_KEY)
    if facts.patients < (least := limits.minimum_patients):
        yield Violation("patients", RuleCode.PATIENTS, {"limit": least})
    for count in facts.per_class.values():
        if count < (least := limits.minimum_per_class):
            yield Violation("task.classes", RuleCode.PER_CLASS, {"limit": least})
