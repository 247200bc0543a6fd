"""What a study has cost each site's patients: the private steps behind what left the site."""

from __future__ import annotations

from fedward.errors import PrivacyError
from fedward.privacy import Mechanism, epsilon_composed
from fedward.protocol import TrainOutcome
from server.results import NO_BOUND, Arm, SitePrivacy


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
    if delta is None:
        return
    # Who does not say how it was private was not.
    noise, rate = outcome.noise_multiplier or 0.0, outcome.sampling_rate or 1.0
    before, steps = arm.privacy.get(outcome.site), outcome.steps
    if before is not None:
        if before.last_round >= outcome.round:
            return
        noise, rate = min(noise, before.noise_multiplier), max(rate, before.sampling_rate)
        steps += before.steps
    arm.privacy[outcome.site] = SitePrivacy(
        epsilon=before.epsilon if before else 0.0, delta=delta, noise_multiplier=noise,
        sampling_rate=rate, steps=steps, last_round=outcome.round,
    )  # fmt: skip


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
