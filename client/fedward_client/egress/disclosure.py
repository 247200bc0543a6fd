"""What of a site's counts may leave: whole groups of figures, and no small class."""

from __future__ import annotations

from fractions import Fraction

from fedward.errors import PolicyError
from fedward.plan.schema import Plan
from fedward.rule_codes import FIX, RuleCode
from fedward.tasks.base import Counts, Released
from fedward.tasks.private_counts import NoisyTables, noise_scale
from fedward_client.policy.settings import Limits


def noise_for(plan: Plan, limits: Limits, part: str) -> NoisyTables | None:
    """How the policy has an evaluation counted; None: exactly, in counts for :func:`release`.

    Raises
    ------
    PolicyError
        The policy lets out none of the plan's figures. This follows from plan and policy alone.
    """
    task, metrics = plan.task, plan.metrics
    private = limits.counts == "private"
    if not private and not limits.count_noise:
        return None
    spec, surface = task.spec, part == "test"
    parts = spec.parts_for(task, metrics.report, limits.metrics, surface=surface)
    if not parts:
        raise PolicyError(RuleCode.WITHHELD, fix=FIX)
    if private:
        unit = spec.unit * metrics.images_per_patient
        scale = noise_scale(task, parts, unit, plan.evaluation_epsilon(part))
        return NoisyTables(parts, scale, unit, metrics.images_per_patient)
    scale = Fraction(limits.count_noise) * spec.unit * spec.sensitivity(task, parts)
    least = limits.minimum_count * spec.unit
    return NoisyTables(parts, scale, spec.unit, by_patient=False, least=least)


def release(counts: Counts, limits: Limits) -> Released:
    """The counts as they may leave; see :meth:`fedward.tasks.base.Counts.release`."""
    return counts.release(limits.metrics, limits.minimum_count, limits.rounding)
