"""The figures that comparisons are made of, taken from a study's results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from server.results import Arm, Figures, StudyResults
from strategies.robust import dominates

LOWER_IS_BETTER = frozenset({"ece", "hd95", "loss"})
_ORDER = {"alone": 0, "federated": 1, "pooled": 2}


def finite(value: float | None) -> float | None:
    """The value, or none where it is not a finite number."""
    return value if value is not None and math.isfinite(value) else None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; none where there are none."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def ordered(arms: Sequence[Arm]) -> list[Arm]:
    """Alone, federated, pooled; within each without privacy first, then from loose to strict."""
    return sorted(arms, key=lambda arm: (_ORDER[arm.kind], _strictness(arm)))


def _strictness(arm: Arm) -> float:
    return -math.inf if arm.epsilon is None else -arm.epsilon


def of_kind(results: StudyResults, kind: str) -> list[Arm]:
    """The arms of a kind, in the order of :func:`ordered`."""
    return [arm for arm in ordered(results.arms) if arm.kind == kind]


def site_names(results: StudyResults) -> list[str]:
    """Every site that the results speak of, those that never took part too; first as they said."""
    names = [*(facts.site for facts in results.sites), *results.named]
    for arm in results.arms:
        names.extend(arm.test.per_site if arm.test else ())
        names.extend(name for round_ in arm.rounds for name in round_.sites)
        names.extend(failure.site for round_ in arm.rounds for failure in round_.failures)
    return list(dict.fromkeys(names))


def together(arm: Arm, metric: str) -> float | None:
    """A metric on all test patients together."""
    return _figure(arm.test.pooled, metric) if arm.test else None


def at_site(arm: Arm, site: str, metric: str) -> float | None:
    """A metric on one site's own test patients."""
    return _figure(arm.test.per_site.get(site, {}), metric) if arm.test else None


def own(arm: Arm, metric: str) -> dict[str, float | None]:
    """A metric on the sites' own test patients; of a hospital alone, on its own only."""
    sites = arm.test.per_site if arm.test else {}
    names = [site for site in sites if arm.kind != "alone" or site == arm.site]
    return {site: at_site(arm, site, metric) for site in names}


def own_mean(arms: Sequence[Arm], metric: str) -> float | None:
    """Mean over sites on their own test patients: of one shared model, or of hospitals alone."""
    return mean(value for arm in arms for value in own(arm, metric).values())


def home_gain(shared: Arm, alone: Sequence[Arm], metric: str) -> float | None:
    """Mean gain of a shared model over each hospital's own, on that hospital's test patients.

    Over those sites for which both figures are there.
    """
    return mean(
        gain(at_site(shared, site, metric), value, metric)
        for arm in alone
        for site, value in own(arm, metric).items()
    )


def together_mean(arms: Sequence[Arm], metric: str) -> float | None:
    """Mean over arms on all test patients together."""
    return mean(together(arm, metric) for arm in arms)


def dominant(arm: Arm) -> tuple[str, float] | None:
    """The site that dominates the test images of several sites, and its share of them.

    The figures on all test patients together are mostly that site's.
    """
    images = arm.test.images if arm.test else {}
    total = sum(images.values())
    if not total:
        return None
    site = max(images, key=lambda name: images[name])
    share = images[site] / total
    return (site, share) if dominates(share, len(images)) else None


def best(values: Iterable[float | None], metric: str) -> float | None:
    """The best of the values; none where no value is there."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return min(there) if metric in LOWER_IS_BETTER else max(there)


def gain(value: float | None, over: float | None, metric: str) -> float | None:
    """By how much a value is better than another; negative where it is worse."""
    if value is None or over is None:
        return None
    return over - value if metric in LOWER_IS_BETTER else value - over


def _figure(figures: Figures, metric: str) -> float | None:
    return finite(figures.get(metric))
