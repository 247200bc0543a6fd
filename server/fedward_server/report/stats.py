"""The figures that comparisons are made of, with their intervals, taken from a study's results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedward.tasks.intervals import Interval, difference, mean_of
from fedward.tasks.registry import METRICS
from fedward_server.results import Arm, Figures, StudyResults

LOWER_IS_BETTER = frozenset(name for name, spec in METRICS.items() if spec.better == "lower")
_ORDER = {"alone": 0, "federated": 1, "personal": 1, "left-out": 2, "pooled": 3}
# Of an arm of these kinds what counts are the figures at its site.
OF_ONE_SITE = ("alone", "left-out")


def finite(value: float | None) -> float | None:
    """The value, or none where it is not a finite number."""
    return value if value is not None and math.isfinite(value) else None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; none where there are none."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def ordered(arms: Sequence[Arm]) -> list[Arm]:
    """Alone, federated, pooled; within each without privacy first, then from loose to strict.

    After an arm whose sites have models of their own come those, as an arm of kind ``personal``.
    What sites trained alone beside an arm counts where no arm of its own was trained for it.
    """
    every = [one for arm in arms for one in (arm, arm.personal) if one is not None]
    if not any(arm.kind == "alone" for arm in arms):
        every += [lone for arm in arms[:1] for lone in arm.lone]
    every += [one for arm in arms[:1] for one in arm.left_out]
    return sorted(every, key=lambda arm: (_ORDER[arm.kind], _strictness(arm)))


def _strictness(arm: Arm) -> float:
    return -math.inf if arm.epsilon is None else -arm.epsilon


def of_kind(results: StudyResults, kind: str) -> list[Arm]:
    """The arms of a kind, in the order of :func:`ordered`."""
    return [arm for arm in ordered(results.arms) if arm.kind == kind]


def site_names(results: StudyResults) -> list[str]:
    """Every site of the training, those that never took part too; first as they said."""
    names = [*(facts.site for facts in results.sites), *results.named]
    for arm in results.arms:
        names.extend(arm.test.per_site if arm.test else ())
        names.extend(name for round_ in arm.rounds for name in round_.sites)
        names.extend(failure.site for round_ in arm.rounds for failure in round_.failures)
    return [name for name in dict.fromkeys(names) if name not in results.evaluate_only]


def together(arm: Arm, metric: str) -> float | None:
    """A metric on all test patients together."""
    return _figure(arm.test.pooled, metric) if arm.test else None


def at_site(arm: Arm, site: str, metric: str) -> float | None:
    """A metric on one site's own test patients."""
    return _figure(arm.test.per_site.get(site, {}), metric) if arm.test else None


def own(arm: Arm, metric: str) -> dict[str, float | None]:
    """A metric on the sites' own test patients; of a hospital alone or left out, on its own."""
    sites = arm.test.per_site if arm.test else {}
    names = [site for site in sites if arm.kind not in OF_ONE_SITE or site == arm.site]
    return {site: at_site(arm, site, metric) for site in names}


@dataclass(frozen=True)
class Contributed:
    """What a site added to the training of an arm.

    Attributes
    ----------
    share : float or None
        Its part of what all sites' updates added to each other's steps; all parts sum to 1, and one
        may be negative. None where together they added nothing.
    agreement : float
        Mean cosine of its updates with the others'.
    rounds : int
        In how many rounds others took part with it.
    """

    share: float | None
    agreement: float
    rounds: int


def contributed(arm: Arm) -> dict[str, Contributed]:
    """By site; a round without a site adds nothing to it."""
    pulls: dict[str, list[float]] = {}
    agreements: dict[str, list[float]] = {}
    for round_ in arm.rounds:
        for name, site in sorted(round_.sites.items()):
            if site.pull is not None and site.agreement is not None:
                pulls.setdefault(name, []).append(site.pull)
                agreements.setdefault(name, []).append(site.agreement)
    total = math.fsum(one for every in pulls.values() for one in every)
    return {
        name: Contributed(
            share=math.fsum(own) / total if total > 0 else None,
            agreement=mean(agreements[name]) or 0.0,
            rounds=len(own),
        )
        for name, own in pulls.items()
    }


@dataclass(frozen=True)
class Estimate:
    """A figure; its interval of 95 % where one is known."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Comparison:
    """By how much one figure is better than another.

    Attributes
    ----------
    one, other : float
        The figures.
    gain : float
        By how much the first is better; negative where it is worse.
    interval : tuple or None
        Of the gain, 95 %.
    paired : bool
        Whether it is patient by patient; otherwise the figures are taken as independent.
    """

    one: float
    other: float
    gain: float
    interval: Interval | None = None
    paired: bool = False

    @property
    def apart(self) -> bool:
        """Whether the two can be told apart: the interval of their difference leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def together_estimate(arm: Arm, metric: str) -> Estimate | None:
    """A metric on the test patients of all sites that gave it."""
    return _estimate(together(arm, metric), arm.test.intervals if arm.test else {}, metric)


def site_estimate(arm: Arm, site: str, metric: str) -> Estimate | None:
    """A metric on one site's own test patients."""
    intervals = arm.test.site_intervals.get(site, {}) if arm.test else {}
    return _estimate(at_site(arm, site, metric), intervals, metric)


def together_mean_estimate(arms: Sequence[Arm], metric: str) -> Estimate | None:
    """Mean over arms that were tested on the same patients."""
    return _mean([together_estimate(arm, metric) for arm in arms], independent=False)


def own_mean_estimate(arms: Sequence[Arm], metric: str) -> Estimate | None:
    """Mean over sites on their own test patients: of one shared model, or of hospitals alone."""
    found = [site_estimate(arm, site, metric) for arm in arms for site in own(arm, metric)]
    return _mean(found, independent=True)


def compare(one: Estimate | None, other: Estimate | None, metric: str) -> Comparison | None:
    """Two figures, taken as independent; none where one is missing."""
    if one is None or other is None:
        return None
    better, worse = (other, one) if metric in LOWER_IS_BETTER else (one, other)
    interval = None
    if better.interval and worse.interval:
        interval = difference((better.value, better.interval), (worse.value, worse.interval))[1]
    return Comparison(one.value, other.value, better.value - worse.value, interval)


def patient_by_patient(
    results: StudyResults,
    pair: Comparison | None,
    one: Arm,
    others: Sequence[Arm],
    *,
    own: bool,
    site: str = "",
) -> Comparison | None:
    """The comparison with its paired interval, where the results hold one."""
    names, metric = {arm.name for arm in others}, results.primary
    asked = (one.name, names, own, site, metric)
    for known in results.paired:
        told = (known.one, set(known.others), known.own, known.site, known.metric)
        if pair and told == asked:
            low, high = known.interval
            low, high = (-high, -low) if metric in LOWER_IS_BETTER else (low, high)
            return replace(pair, interval=(low, high), paired=True)
    return pair


def compare_at_home(shared: Arm, alone: Sequence[Arm], metric: str) -> Comparison | None:
    """A shared model with each hospital's own on that hospital's test patients, on average.

    Over those sites for which both figures are there; site by site, so that sites that differ
    make no interval wider.
    """
    pairs = [
        compare(site_estimate(shared, site, metric), site_estimate(arm, site, metric), metric)
        for arm in alone
        for site in own(arm, metric)
    ]
    found = [pair for pair in pairs if pair]
    if not found:
        return None
    one, other, gained = (
        math.fsum(getattr(pair, key) for pair in found) / len(found)
        for key in ("one", "other", "gain")
    )
    parts = [(pair.gain, pair.interval) for pair in found if pair.interval]
    interval = mean_of(parts, independent=True)[1] if len(parts) == len(found) else None
    return Comparison(one, other, gained, interval)


def against_alone(results: StudyResults, arm: Arm) -> dict[str, Comparison]:
    """By site, a model on the site's own test patients against the one that it trains alone."""
    metric, found = results.primary, {}
    for alone in of_kind(results, "alone"):
        site = str(alone.site)
        pair = compare(site_estimate(arm, site, metric), site_estimate(alone, site, metric), metric)
        pair = patient_by_patient(results, pair, arm, [alone], own=True, site=site)
        if pair is not None:
            found[site] = pair
    return found


def clear_best(estimates: Sequence[Estimate | None], metric: str) -> int | None:
    """The place of the figure that is better than every other by more than chance; or none."""
    there = [(place, one) for place, one in enumerate(estimates) if one is not None]
    if len(there) < 2:
        return None
    place, top = (min if metric in LOWER_IS_BETTER else max)(there, key=lambda one: one[1].value)
    others = (compare(top, one, metric) for at, one in there if at != place)
    return place if all(pair is not None and pair.apart for pair in others) else None


def _mean(found: Sequence[Estimate | None], *, independent: bool) -> Estimate | None:
    there = [one for one in found if one is not None]
    if not there:
        return None
    parts = [(one.value, one.interval) for one in there if one.interval]
    value = math.fsum(one.value for one in there) / len(there)
    whole = len(parts) == len(there)
    return Estimate(value, mean_of(parts, independent=independent)[1] if whole else None)


def _estimate(
    value: float | None, intervals: Mapping[str, Interval], metric: str
) -> Estimate | None:
    return None if value is None else Estimate(value, intervals.get(metric))


def gain(value: float | None, over: float | None, metric: str) -> float | None:
    """By how much a value is better than another; negative where it is worse."""
    if value is None or over is None:
        return None
    return over - value if metric in LOWER_IS_BETTER else value - over


def _figure(figures: Figures, metric: str) -> float | None:
    return finite(figures.get(metric))
