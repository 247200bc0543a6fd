"""Which dataset serves a study, what is known of it unopened, and the gate it leaves through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedward.errors import DataError
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan
from fedward_client.audit.log import AuditLog
from fedward_client.cohort.freeze import CohortFile, load
from fedward_client.cohort.open import cohort_path
from fedward_client.config import SiteConfig
from fedward_client.egress.gate import Gate
from fedward_client.policy.decide import DatasetFacts, dataset_for, facts_of
from fedward_client.policy.settings import Limits, PolicySection


@dataclass(frozen=True)
class StudyContext:
    """A study at this site.

    Attributes
    ----------
    study : str
        Its id.
    plan, plan_hash : Plan, str
        What it wants.
    dataset : str
        What serves it; "" when nothing does.
    cohort : CohortFile or None
        The frozen cohort's record.
    limits : Limits
        What the policy holds it to.
    facts : DatasetFacts or None
        What the record says.
    """

    study: str
    plan: Plan
    plan_hash: str
    dataset: str
    cohort: CohortFile | None
    limits: Limits
    facts: DatasetFacts | None


class Contexts(Protocol):
    """The studies of a site, and the policy and gate that they are held to."""

    @property
    def site(self) -> str:
        """The site's name."""

    @property
    def policy(self) -> PolicySection:
        """The site's policy."""

    def of(self, study: str, plan: Plan) -> StudyContext:
        """What is known of a study here."""

    def gate(self, case: StudyContext | None) -> Gate:
        """What everything that leaves passes through."""


class StudyContexts:
    """The site's studies as far as they can be known without opening an image.

    Parameters
    ----------
    config : SiteConfig
        The site.
    audit : AuditLog
        For the gate.
    """

    def __init__(self, config: SiteConfig, audit: AuditLog) -> None:
        self._config, self._audit = config, audit
        self._pinned: dict[str, tuple[str, CohortFile]] = {}

    def use(self, config: SiteConfig) -> None:
        """Hold studies to another policy from the next order on."""
        self._config = config

    @property
    def site(self) -> str:
        """The site's name."""
        return self._config.site.name

    @property
    def policy(self) -> PolicySection:
        """The site's policy."""
        return self._config.policy

    @property
    def allow_unconfined_connector(self) -> bool:
        """Whether orders may come through a connector that can read images."""
        return self._config.trainer.allow_unconfined_connector

    def of(self, study: str, plan: Plan) -> StudyContext:
        """The case of a study; its cohort stays the one that it began with."""
        dataset = dataset_for(self.policy, study, plan)
        rule = self.policy.rule_for(study, plan.study.name)
        cohort = self._cohort(study, dataset)
        section = self._config.datasets.get(dataset)
        allowed = section is not None and section.images_are_patients
        return StudyContext(
            study=study,
            plan=plan,
            plan_hash=plan_hash(plan),
            dataset=dataset,
            cohort=cohort,
            limits=self.policy.limits(rule) if rule else self.policy,
            facts=facts_of(cohort, allowed) if cohort else None,
        )

    def pin(self, study: str, dataset: str, sha256: str) -> None:
        """Say with which cohort a study began, after a restart."""
        path = cohort_path(self._config.site.state, dataset, sha256)
        self._pinned[study] = (dataset, load(path))

    def gate(self, case: StudyContext | None) -> Gate:
        """What everything that leaves passes through."""
        return Gate(
            case.plan if case else None,
            case.limits if case else self.policy,
            site=self.site,
            facts=case.facts if case else None,
            max_upload_mib=self.policy.max_upload_mib,
            audit=self._audit,
            dataset=case.dataset if case and self.policy.tell_datasets else "",
        )

    def _cohort(self, study: str, dataset: str) -> CohortFile | None:
        known = self._pinned.get(study)
        if known is not None and known[0] == dataset:
            return known[1]
        if not dataset:
            return None
        try:
            found = load(cohort_path(self._config.site.state, dataset))
        except DataError:
            return None
        self._pinned[study] = (dataset, found)
        return found
