"""What a study has cost each site's patients, as far as the aggregator can know: an upper bound.

A site charges a round before it trains, so a round has its price also where the update is late,
is lost on its way or is refused. Every round that was ordered from a site therefore counts, unless
the site says that its ledger holds no charge for it.
"""

from __future__ import annotations

from dataclasses import replace

from fedward.dp.accounting import Mechanism, calibrate, epsilon_composed, private_steps_in
from fedward.errors import PrivacyError
from fedward.plan.schema import Plan
from fedward.protocol import SiteFacts, TrainOutcome
from fedward_server.results import NO_BOUND, Arm, SitePrivacy

_UNKNOWN = Mechanism(0.0, 1.0, 0)  # who does not say how it was private was not


def charge(arm: Arm, outcome: TrainOutcome, delta: float | None) -> None:
    """Add the steps of an update that arrived, whether or not it counts; see :func:`settle`.

    A round costs once: asked again, a site gives the same update again. Where noise or sampling
    changed on the way, the worse of both stands for all steps, an upper bound.

    Parameters
    ----------
    arm : Arm
        Whose ``privacy`` gets them.
    outcome : TrainOutcome
        What the update was made of.
    delta : float or None
        The plan's δ; None: nothing is private.
    """
    if delta is not None:
        told = Mechanism(
            outcome.noise_multiplier or 0.0, outcome.sampling_rate or 1.0, outcome.steps
        )
        _add(arm, outcome.site, outcome.round, told, delta)


def charge_ordered(arm: Arm, plan: Plan, facts: SiteFacts, round_: int) -> None:
    """Count a round that a site was ordered to train, and whose update may never be seen.

    The steps and the noise are those that the plan gives for the site's training patients. A round
    that was counted already costs nothing more.
    """
    spent = arm.privacy.get(facts.site)
    if plan.privacy.delta is None or (spent is not None and spent.last_round >= round_):
        return
    try:
        whole = calibrate(plan, facts.train_patients)
        ordered = replace(whole, steps=private_steps_in(plan, whole.sampling_rate, round_))
    except PrivacyError:  # then it cannot have trained by this plan either
        ordered = _UNKNOWN
    _add(arm, facts.site, round_, ordered, plan.privacy.delta)


def _add(arm: Arm, site: str, round_: int, more: Mechanism, delta: float) -> None:
    noise, rate, steps = more.noise_multiplier, more.sampling_rate, more.steps
    before = arm.privacy.get(site)
    if before is not None:
        noise, rate = min(noise, before.noise_multiplier), max(rate, before.sampling_rate)
        steps = before.steps + (steps if round_ > before.last_round else 0)
    arm.privacy[site] = SitePrivacy(
        epsilon=before.epsilon if before else 0.0,
        delta=delta,
        noise_multiplier=noise,
        sampling_rate=rate,
        steps=steps,
        last_round=max(round_, before.last_round if before else 0),
    )


def settle(arm: Arm) -> None:
    """Work out each site's ε anew, also of those that sent nothing since.

    Once for several rounds: it takes a tenth of a second a site, for which no answer should wait.
    """
    for site, spent in arm.privacy.items():
        mechanism = Mechanism(spent.noise_multiplier, spent.sampling_rate, spent.steps)
        epsilon = _epsilon(mechanism, spent.delta)
        arm.privacy[site] = spent.model_copy(update={"epsilon": epsilon})


def carry_over(arm: Arm, told: Arm) -> None:
    """Keep what was told before a restart: an update may have come after the last checkpoint."""
    for site, spent in told.privacy.items():
        if site not in arm.privacy or arm.privacy[site].steps < spent.steps:
            arm.privacy[site] = spent


def _epsilon(mechanism: Mechanism, delta: float) -> float:
    if mechanism.noise_multiplier <= 0 or not 0 < mechanism.sampling_rate <= 1:
        return NO_BOUND
    try:
        return min(NO_BOUND, epsilon_composed([mechanism], delta))
    except PrivacyError:
        return NO_BOUND
