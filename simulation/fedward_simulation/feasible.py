"""What a plan asks for beside its own rules: found without data, before hours are spent."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from fedward.errors import ModelError, PlanError
from fedward.models import WeightsReport, build_model, load_initial, shared_names
from fedward.plan.schema import Plan

_MANY = 10_000  # patients of a site to whom privacy comes cheap
_EASY = 1e5  # noise far below what is refused


def start_model(plan: Plan, seed: int, folder: Path | None) -> tuple[nn.Module, WeightsReport]:
    """The model that a study starts from, with what became of its public weights.

    Raises
    ------
    PlanError
        The model cannot take such images, a stage names parameters that it has not, or nothing
        of it would travel.
    WeightsError
        The weights' file is not there, or does not fit.
    """
    model = build_model(plan, seed)
    report = load_initial(model, plan, folder)
    round_ = 1
    for place, stage in enumerate(plan.schedule):
        try:
            shared_names(model, plan, round_)
        except ModelError as error:
            named = error.where.startswith("personal")
            where = error.where if named else f"stages.{place}.train"
            raise PlanError(error.rule, value=error.value, fix=error.fix, where=where) from None
        round_ += stage.rounds
    return model, report


def check_privacy(plan: Plan) -> None:
    """Whether some noise reaches the plan's ε.

    Without a `sampling_rate` of the plan each site's own counts; here it is that of a large site,
    where the target is within reach if it is anywhere.

    Raises
    ------
    PrivacyError
        None does.
    """
    if not plan.privacy.on or _is_easy(plan):
        return
    from fedward.dp.accounting import calibrate  # brings Opacus, which takes seconds

    calibrate(plan, _MANY)


def _is_easy(plan: Plan) -> bool:
    """By the Gaussian mechanism's bound, which holds whatever the sampling."""
    epsilon, delta = plan.privacy.epsilon, plan.privacy.delta
    if epsilon is None or delta is None:
        return True
    rate = plan.privacy.sampling_rate or min(1.0, plan.training.batch_size / _MANY)
    steps = plan.training.local_steps or math.ceil((plan.training.local_epochs or 1) / rate)
    steps = steps * plan.passes_until(plan.last_round) + (plan.privacy.centering_steps or 0)
    noise = math.sqrt(2 * math.log(1.25 / delta) * steps) / min(epsilon, 1.0)
    return noise < _EASY
