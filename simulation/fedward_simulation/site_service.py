"""A simulated hospital's service: the trainer's own, with a ledger in memory and a given policy."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedward.errors import BudgetError, ConfigError
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import Refusal, RoundOrder
from fedward.rule_codes import EXCEPTIONS, RuleCode
from fedward.tensors import Arrays
from fedward_client.config import load_config
from fedward_client.data.sample import PreparedSite
from fedward_client.egress.gate import Gate
from fedward_client.ledger import Ledger
from fedward_client.link.messages import TrainerMessage
from fedward_client.policy.decide import DatasetFacts, Decision, StudyRequest, dataset_for
from fedward_client.policy.settings import METRICS, Limits, PolicySection, StudyRule
from fedward_client.trainer.executor import Executor
from fedward_client.trainer.service import OrderService
from fedward_client.trainer.study_context import StudyContext
from fedward_client.training.trainer import Trainer
from fedward_simulation.options import Options

_T = TypeVar("_T")
_DATASET: Final = "simulated"
# The limits under which figures leave as they were counted.
_EXACT: Final = {
    "counts": "minimum-cells",
    "count_noise": 0.0,
    "minimum_count": 1,
    "rounding": 9,
    "metrics": METRICS,
}


class OpenPolicy(PolicySection):
    """A policy without limits, which a file cannot say."""

    def limits(self, rule: StudyRule) -> Limits:
        """The same for all studies."""
        return self


def open_policy() -> PolicySection:
    """Every study is allowed; figures leave as a hospital's with ``counts = "minimum-cells"``.

    Cells below the default `minimum_count` are merged or withheld, and there is no noise.
    """
    return OpenPolicy(
        studies=(StudyRule(match="*", dataset=_DATASET),),
        any_coordinator=True,
        approval="within-policy",
        require_privacy=False,
        minimum_per_class=0,
        counts="minimum-cells",
        count_noise=0.0,
    ).model_copy(
        update={
            "minimum_patients": 0,
            "max_parameters": sys.maxsize,
            "max_epsilon_per_study": math.inf,
            "max_epsilon_per_cohort": math.inf,
            "max_delta": 1.0,
            "max_evaluation_epsilon": math.inf,
            "max_evaluation_epsilon_per_cohort": math.inf,
            "max_upload_mib": math.inf,
        }
    )


def load_policy(path: Path) -> PolicySection:
    """The policy of a hospital's ``site.toml``, for a simulation.

    A simulation has no coordinator's key, no officer and no clock: whose study it is does not
    count, every study is approved, and there are no quiet hours.

    Raises
    ------
    ConfigError
        The file is missing or breaks a rule, or it has no policy.
    """
    config = load_config(path, datasets_here=False)
    if not config.policy.studies:
        raise ConfigError(
            "a policy must say which studies it serves",
            value=path.name,
            fix="Add [[policy.studies]] to the file",
            where="--policy",
        )
    return config.policy.model_copy(update={"any_coordinator": True, "coordinators": ()})


def policy_of(options: Options) -> PolicySection:
    """The hospitals' policy of a run.

    Raises
    ------
    ConfigError
        The options contradict each other, or the policy's file breaks a rule.
    """
    if options.private_counts and (options.exact or options.policy):
        other = "--exact" if options.exact else "--policy"
        raise ConfigError(
            "one option says how counts leave a hospital",
            value=f"--private-counts and {other}",
            fix="Keep one of them",
            where="--private-counts",
        )
    policy = open_policy() if options.policy is None else load_policy(options.policy)
    if options.private_counts:
        policy = policy.model_copy(update={"counts": "private"})
    return exact(policy) if options.exact else policy


def exact(policy: PolicySection) -> PolicySection:
    """The same policy with figures that leave as they were counted, for research."""
    rules = tuple(rule.model_copy(update=_EXACT) for rule in policy.studies)
    return policy.model_copy(update={**_EXACT, "studies": rules})


def limits_of(policy: PolicySection, plan: Plan) -> Limits:
    """What a policy holds a plan to."""
    rule = policy.rule_for("", plan.study.name)
    return policy.limits(rule) if rule else policy


def has_noise(limits: Limits) -> bool:
    """Whether figures leave with noise."""
    return limits.counts == "private" or limits.count_noise > 0


class SimulatedContexts:
    """What is known of the studies at a simulated hospital.

    Parameters
    ----------
    site : PreparedSite
        The hospital.
    policy : PolicySection
        Its policy.
    gate : type of Gate
        What everything that leaves passes through.
    """

    def __init__(self, site: PreparedSite, policy: PolicySection, gate: type[Gate] = Gate) -> None:
        self._site, self._gate, self.policy = site, gate, policy
        self._facts = facts_of_site(site)

    @property
    def site(self) -> str:
        """The site's name."""
        return self._site.name

    def of(self, study: str, plan: Plan) -> StudyContext:
        """What is known of a study here."""
        return StudyContext(
            study=study,
            plan=plan,
            plan_hash=plan_hash(plan),
            dataset=dataset_for(self.policy, study, plan),
            cohort=None,
            limits=limits_of(self.policy, plan),
            facts=self._facts,
        )

    def gate(self, case: StudyContext | None) -> Gate:
        """What everything that leaves passes through."""
        return self._gate(
            case.plan if case else None,
            case.limits if case else self.policy,
            site=self.site,
            facts=case.facts if case else None,
            max_upload_mib=self.policy.max_upload_mib,
        )


def facts_of_site(site: PreparedSite) -> DatasetFacts:
    """What a hospital's frozen cohort of these images would say of itself."""
    people, targets = site.patients, site.targets
    flags: list[NDArray[np.bool_]] = []  # masks name no class of an image
    if targets.ndim == 1 and targets.dtype != object:
        flags = [targets == k for k in np.unique(targets)]
    elif targets.ndim == 2:
        flags = list(targets.T > 0)
    return DatasetFacts(
        patients=len(np.unique(people)),
        images=len(site.images),
        per_class={str(k): len(np.unique(people[flag])) for k, flag in enumerate(flags)},
        per_image=site.images_are_patients,
        images_are_patients=site.images_are_patients,
    )


class MemoryUpdates:
    """The last released update of a study, in memory."""

    def __init__(self) -> None:
        self._last: tuple[str, int, bytes] = ("", 0, b"")

    def keep(self, study: str, round_: int, content: bytes) -> str:
        """Keep an update; gives its SHA-256."""
        self._last = study, round_, content
        return hashlib.sha256(content).hexdigest()

    def again(self, study: str, round_: int, digest: str) -> bytes:
        """The update that was released.

        Raises
        ------
        BudgetError
            It is kept no longer.
        """
        if self._last[:2] != (study, round_):
            raise BudgetError(
                RuleCode.UPDATE_KEPT, values={"round": round_}, fix="Order the next round"
            )
        return self._last[2]


class SimulatedTrainers:
    """A simulated hospital's trainer for one plan.

    Parameters
    ----------
    ledger : Ledger
        Learns who is at the hospital.
    make : callable
        Gives the trainer for a plan, which stays warm.
    forget : callable
        Forgets it.
    """

    def __init__(
        self, ledger: Ledger, make: Callable[[Plan], Trainer], forget: Callable[[Plan], None]
    ) -> None:
        self._ledger, self._make, self._forget = ledger, make, forget
        self._known = False

    def get(self, case: StudyContext) -> Trainer:
        """The study's trainer, as its last order left it."""
        trainer = self._make(case.plan)
        trainer.may_choose = case.limits.counts != "private"
        if not self._known:
            people = {str(one) for one in np.unique(trainer.site.patients)}
            self._ledger.register(trainer.site.cohort, case.dataset, people)
            self._known = True
        return trainer

    def use(self, case: StudyContext, act: Callable[[Trainer], _T]) -> _T:
        """Do something with it."""
        return act(self.get(case))

    def keep(
        self, case: StudyContext, order: RoundOrder, shared: Mapping[str, NDArray[Any]]
    ) -> None:
        """A simulation keeps the models itself."""

    def drop(self, case: StudyContext) -> None:
        """Forget what a round that broke off left in a trainer."""
        self._forget(case.plan)

    def end(self, study: str) -> None:
        """What a strategy keeps stands in the study's own checkpoint, and ends with it."""


class SimulatedService(OrderService):
    """Answers the orders of one plan at one simulated hospital.

    Each plan has a ledger of its own: the arms of a simulation are alternatives, of which a
    hospital would serve one.

    Parameters
    ----------
    contexts : SimulatedContexts
        The hospital.
    make, forget : callable
        See :class:`SimulatedTrainers`.

    Attributes
    ----------
    kept : dict
        What the plan's strategy keeps at the hospital from round to round; comes and goes with
        each order, as its process may end.
    """

    def __init__(
        self,
        contexts: SimulatedContexts,
        make: Callable[[Plan], Trainer],
        forget: Callable[[Plan], None],
    ) -> None:
        ledger = Ledger(None)
        self._trainers, self.kept = SimulatedTrainers(ledger, make, forget), Arrays()
        super().__init__(
            contexts, Executor(contexts, self._trainers, ledger, MemoryUpdates(), None)
        )

    def _carry_out(
        self, what: str, order: RoundOrder, case: StudyContext, packet: TrainerMessage
    ) -> TrainerMessage:
        if what == "describe" or not case.plan.keeps_state:
            return super()._carry_out(what, order, case, packet)
        state = self._trainers.get(case).state
        state.from_arrays(self.kept)
        made = super()._carry_out(what, order, case, packet)
        self.kept = state.to_arrays()
        return made

    def _coordinator(self, order: RoundOrder, what: str, packet: TrainerMessage) -> str:
        return ""  # a simulation's orders are not signed

    def _heard(self, request: StudyRequest, order: RoundOrder) -> None:
        """There is no audit log."""

    def _decided(self, order: RoundOrder, decision: Decision) -> None:
        """There is no audit log."""

    def _approved(self, request: StudyRequest, decision: Decision) -> None:
        """There is no officer: every study counts as approved."""

    def _refuse(self, error: BaseException, round_: int) -> Refusal:
        made = super()._refuse(error, round_)
        if made.code is not RuleCode.ERROR:
            return made
        # Nobody's secret here, and it helps whoever looks for the fault.
        name = type(error).__name__
        values = {"error": name if name in EXCEPTIONS else "Exception"}
        return made.model_copy(update={"code": RuleCode.UNEXPECTED, "values": values})
