"""What the site's officer sees of a study: purpose, data, ε, limits, what leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from fedward.dp.accounting import default_delta
from fedward.errors import DataError, ModelError
from fedward.models import describe, most_traffic
from fedward.plan.explain import exchange, explain
from fedward.plan.load import canonical
from fedward.plan.schema import Plan
from fedward_client.cohort.freeze import load
from fedward_client.cohort.open import cohort_path
from fedward_client.config import SiteConfig
from fedward_client.ledger import Caps, Ledger
from fedward_client.policy.approvals import Approval
from fedward_client.policy.decide import DatasetFacts, facts_of
from fedward_client.policy.settings import Limits

# What the officer reads of a study in which the site trains nothing.
_EVALUATES: Final = (
    "counts of one evaluation of the finished model on test patients; nothing is trained here, and "
    "no update leaves"
)
_OF_TRAINING: Final = frozenset(
    {
        "own_models",
        "require_privacy",
        "max_epsilon_per_study",
        "max_epsilon_per_cohort",
        "max_delta",
        "minimum_sites",
    }
)


def study_card(approval: Approval, plan: Plan | None, config: SiteConfig, ledger: Ledger) -> Any:
    """The facts of a study, as one JSON object; only the approval's own where its plan is gone.

    Parameters
    ----------
    approval : Approval
        What was seen.
    plan : Plan or None
        The plan that it is about.
    config : SiteConfig
        The site; its policy holds the limits.
    ledger : Ledger
        What was spent.
    """
    card: dict[str, Any] = approval.model_dump()
    if plan is None:
        return card
    policy = config.policy
    rule = policy.rule_for(approval.study, plan.study.name)
    limits = policy.limits(rule) if rule else policy
    dataset = rule.dataset if rule else ""
    section = config.datasets.get(dataset)
    cohort, facts = "", None
    if section is not None:
        with suppress(DataError):  # told as a limit that is not kept
            frozen = load(cohort_path(config.site.state, dataset))
            cohort, facts = frozen.sha256, facts_of(frozen, section.images_are_patients)
    parameters = describe(plan).parameters
    return card | {
        "title": plan.study.title,
        "intended_use": plan.study.intended_use,
        "network": plan.model.name,
        "parameters": parameters,
        "dataset": dataset,
        "cohort": cohort,
        "patients": facts.patients if facts else 0,
        "per_image": bool(facts and facts.per_image),
        "rounds": plan.rounds,
        "privacy": _privacy(plan, config, ledger, cohort, approval.evaluate_only),
        "leaves": _EVALUATES
        if approval.evaluate_only
        else exchange(plan, parameters, _traffic(plan)),
        "limits": [
            one
            for one in _limits(plan, limits, config, facts, parameters)
            if not (approval.evaluate_only and one["limit"] in _OF_TRAINING)
        ],
    }


def in_full(card: dict[str, Any], plan: Plan | None) -> dict[str, Any]:
    """The same with the plan itself, and in words."""
    if plan is None:
        return card
    words = explain(plan, card.get("parameters"), _traffic(plan))
    return card | {"words": words, "plan": plan.model_dump(mode="json"), "text": canonical(plan)}


def _traffic(plan: Plan) -> tuple[int, int] | None:
    """Most bytes that leave and come in a round; none where the plan names what no network has."""
    try:
        return most_traffic(plan)
    except ModelError:
        return None


def _privacy(
    plan: Plan, config: SiteConfig, ledger: Ledger, cohort: str, evaluate_only: bool
) -> dict[str, Any]:
    """ε of training and of evaluations: asked, left now, and left at least after it."""
    policy = config.policy
    caps = Caps(policy.max_epsilon_per_study, policy.max_epsilon_per_cohort, policy.max_delta)
    known = cohort in {sha for sha, _, _ in ledger.cohorts()}
    left = ledger.standing(cohort, caps).left if known else caps.cohort
    spent = ledger.evaluations.epsilon_of_cohort(cohort) if known else 0.0
    evaluations = max(0.0, policy.max_evaluation_epsilon_per_cohort - spent)
    asked = 0.0 if evaluate_only else plan.privacy.epsilon
    tests = plan.evaluation_epsilon("test") if evaluate_only else plan.metrics.epsilon
    return {
        "epsilon": asked,
        "delta": plan.privacy.delta,
        "left": round(left, 4),
        "left_after": round(max(0.0, left - asked), 4) if asked is not None else None,
        "evaluation_epsilon": tests,
        "evaluation_left": round(evaluations, 4),
        "evaluation_left_after": round(max(0.0, evaluations - tests), 4),
    }


def _limits(
    plan: Plan,
    limits: Limits,
    config: SiteConfig,
    facts: DatasetFacts | None,
    parameters: int,
) -> Iterator[dict[str, Any]]:
    """Each limit of the policy that the study comes up against, with what it asks."""
    policy = config.policy

    def row(limit: str, asked: Any, allowed: Any) -> dict[str, Any]:
        return {"limit": limit, "asked": asked, "allowed": allowed}

    yield row("max_parameters", parameters, limits.max_parameters)
    if plan.personal is not None:
        kinds = (plan.personal.method, "alone" if plan.personal.alone else None)
        yield row("own_models", " and ".join(filter(None, kinds)), limits.own_models)
    if plan.privacy.on:
        yield row("max_epsilon_per_study", plan.privacy.epsilon, limits.max_epsilon_per_study)
        yield row("max_epsilon_per_cohort", plan.privacy.epsilon, policy.max_epsilon_per_cohort)
        most = limits.max_delta
        if most is None:
            most = default_delta(facts.patients if facts else 0)
        yield row("max_delta", plan.privacy.delta, most)
    else:
        yield row("require_privacy", "no privacy", limits.require_privacy)
    if limits.counts == "private":
        yield row("max_evaluation_epsilon", plan.metrics.epsilon, limits.max_evaluation_epsilon)
    yield row("minimum_patients", facts.patients if facts else 0, limits.minimum_patients)
    if facts and facts.per_class:
        yield row("minimum_per_class", min(facts.per_class.values()), limits.minimum_per_class)
    if limits.minimum_sites > 1:
        yield row("minimum_sites", plan.participation.sites, limits.minimum_sites)
