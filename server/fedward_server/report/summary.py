"""What a study found, and what its privacy means, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedward.plan.schema import Plan
from fedward_server.report.coverage import dominant, measured, missing_words, whom
from fedward_server.report.formatting import (
    counted,
    epsilon,
    figure,
    interval,
    listed,
    metric_name,
    percent,
    signed,
)
from fedward_server.report.stats import (
    Comparison,
    Estimate,
    against_alone,
    compare,
    compare_at_home,
    finite,
    of_kind,
    own,
    patient_by_patient,
    site_estimate,
    together,
    together_estimate,
    together_mean_estimate,
)
from fedward_server.results import Arm, StudyResults


def headline(results: StudyResults) -> str:
    """What the study found, in a few sentences.

    Compares the federated model on all test patients together with the mean of the hospitals alone
    and with pooled data, and on the hospitals' own patients with each hospital's own model, by the
    primary metric; then tells what privacy cost. A difference is one only where its interval
    leaves 0 out. What was not trained is not compared, and where hospitals gave no figure it says
    of how many the figures are.
    """
    federated = [arm for arm in of_kind(results, "federated") if arm.test]
    if not federated:
        told = [unmeasured(arm) for arm in of_kind(results, "federated") if arm.unmeasured]
        return told[0] if told else "No federated model was finished."
    lead = federated[0]
    found = measured(results, lead)
    if results.primary not in found:
        return " ".join(filter(None, _without_primary(results, lead, found)))
    sentences = [
        *_together(results, lead),
        missing_words(results, lead, results.primary),
        dominance(lead, results.primary),
        _at_home(results, lead),
        _better_off(results, lead),
        _left_out(results, lead),
        delivered(lead, results.primary),
        _private(results, lead, federated),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _together(results: StudyResults, lead: Arm) -> Iterator[str]:
    metric, name = results.primary, metric_name(results.primary)
    value, whose = together_estimate(lead, metric), whom(results, lead, metric)
    alone, below = (
        patient_by_patient(
            results,
            compare(value, together_mean_estimate(arms, metric), metric),
            lead,
            arms,
            own=False,
        )
        for arms in (of_kind(results, "alone"), _alike(of_kind(results, "pooled"), lead))
    )
    if alone is not None:
        yield _bought(alone, name, metric, whose, _with(lead))
    else:
        yield _reached(lead, metric, whose)
    if below is not None:
        yield _against_pooled(below, metric)


def _bought(pair: Comparison, name: str, metric: str, whose: str, at: str) -> str:
    both = f"{figure(pair.one, metric)} against {figure(pair.other, metric)}"
    if pair.interval is None:
        return (
            f"On {whose} the federated model{at} has {both} {name} of the hospitals alone on "
            f"average; these results hold no interval, so nothing follows from the difference."
        )
    limits = _limits(pair, metric)
    if not pair.apart:
        return (
            f"On {whose} the federated model{at} cannot be told apart from the hospitals alone on "
            f"average: {both} {name}, difference {signed(pair.gain, metric)} ({limits})."
        )
    verb = (
        f"bought {signed(pair.gain, metric)}"
        if pair.gain > 0
        else (f"cost {figure(-pair.gain, metric)}")
    )
    over = "over" if pair.gain > 0 else "against"
    return (
        f"Federation{at} {verb} {name} ({limits}) {over} the mean of the hospitals alone, {both}, "
        f"on {whose}."
    )


def _limits(pair: Comparison, metric: str) -> str:
    low, high = pair.interval or (0.0, 0.0)
    how = "paired " if pair.paired else ""
    return f"{how}95 % interval {signed(low, metric)} to {signed(high, metric)}"


def _reached(lead: Arm, metric: str, whose: str) -> str:
    name, value = metric_name(metric), together_estimate(lead, metric)
    homes = {site: one for site, one in own(lead, metric).items() if one is not None}
    told = ""
    if len(homes) > 1:
        low, high = min(homes, key=homes.__getitem__), max(homes, key=homes.__getitem__)
        told = (
            f"{figure(homes[low], metric)} ({low}) to {figure(homes[high], metric)} ({high}) "
            "at the hospitals"
        )
    if value is None:
        return f"The federated model{_with(lead)} reached {told or _homes(homes, metric)} {name}."
    own_ = f"; {told}" if told else ""
    return (
        f"The federated model{_with(lead)} reached {figure(value.value, metric)} {name}"
        f"{_of(value, metric)} on {whose}{own_}."
    )


def _homes(homes: Mapping[str, float], metric: str) -> str:
    return ", ".join(f"{figure(value, metric)} ({site})" for site, value in homes.items())


def _of(one: Estimate, metric: str) -> str:
    return f" (95 % interval {interval(one.interval, metric)})" if one.interval else ""


def _against_pooled(pair: Comparison, metric: str) -> str:
    value = figure(pair.other, metric)
    if pair.interval is None:
        return f"Pooled data have {value}; these results hold no interval."
    limits = _limits(pair, metric)
    if not pair.apart:
        return (
            f"It cannot be told apart from pooled data ({value}; difference "
            f"{signed(pair.gain, metric)}, {limits})."
        )
    word = "better" if pair.gain > 0 else "worse"
    return f"It is {figure(abs(pair.gain), metric)} {word} than pooled data ({value}; {limits})."


def _without_primary(results: StudyResults, lead: Arm, found: list[str]) -> Iterator[str]:
    """What can be said where no hospital gave the primary metric."""
    yield f"{_capital(metric_name(results.primary))} is known of no hospital's test patients."
    yield missing_words(results, lead, results.primary).replace("Not in it:", "Why:")
    if found:
        yield _reached(lead, found[0], whom(results, lead, found[0]))
        yield missing_words(results, lead, found[0])
    losses = [one for r in lead.rounds if (one := finite(r.train_loss)) is not None]
    if losses:
        yield (
            f"The training loss went from {losses[0]:.3f} to {losses[-1]:.3f} in "
            f"{counted(len(lead.rounds), 'round')}."
        )
    else:
        yield f"The model was trained for {counted(len(lead.rounds), 'round')}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def delivered(arm: Arm, metric: str) -> str:
    """Which round's model it is, where the plan chose, and why it ended; empty otherwise."""
    told = []
    name, done = metric_name(metric), len(arm.rounds)
    if arm.ended_early:
        told.append(
            f"Training ended after round {done}, because {name} on the validation patients had "
            "not become better for the plan's patience."
        )
    if arm.best_round is not None:
        value = arm.rounds[arm.best_round - 1].validation.get(metric)
        found = "" if value is None else f" ({figure(value, metric)})"
        told.append(
            f"The model is that of round {arm.best_round} of {done}, which has the best {name} on "
            f"the validation patients{found}."
        )
    return " ".join(told)


def unmeasured(arm: Arm) -> str:
    """That a finished model has no test figures, and why."""
    return f"Not measured on test patients, because {arm.unmeasured.rstrip('.')}."


def few_sites(arm: Arm, plan: Plan) -> str:
    """In how many rounds fewer sites took part than a study needs to start; empty: in none."""
    least = plan.participation.sites
    short = [one for one in arm.rounds if len(one.sites) < least]
    if not short:
        return ""
    return (
        f"In {len(short)} of {len(arm.rounds)} rounds fewer sites took part than the {least} of "
        "participation.sites."
    )


def dominance(arm: Arm, metric: str) -> str:
    """Whose figure the one on all test patients together mostly is; empty where it is nobody's."""
    found = dominant(arm, metric)
    if found is None:
        return ""
    site, share = found
    return (
        f"The {figure(together(arm, metric), metric)} on all together is mostly {site}, which says "
        f"that it has {percent(share)} of the test images."
    )


def _alike(pooled: list[Arm], lead: Arm) -> list[Arm]:
    """The pooled arm to measure against: one without privacy, or else one as private."""
    plain = [arm for arm in pooled if arm.epsilon is None]
    return (plain or [arm for arm in pooled if arm.epsilon == lead.epsilon])[:1]


def _with(arm: Arm) -> str:
    return f" at {epsilon(arm.epsilon)}" if arm.epsilon is not None else ""


def _at_home(results: StudyResults, lead: Arm) -> str:
    metric = results.primary
    alone = [arm for arm in of_kind(results, "alone") if arm.test]
    pair = compare_at_home(lead, alone, metric)
    pair = patient_by_patient(results, pair, lead, alone, own=True)
    if pair is None:
        return ""
    both = f"{figure(pair.one, metric)} against {figure(pair.other, metric)}"
    start = "On their own test patients the hospitals"
    if pair.interval is None:
        return f"{start} have {both} of their own models on average, without an interval."
    limits = _limits(pair, metric)
    if not pair.apart:
        return (
            f"{start} cannot tell it from their own models: {both} on average, difference "
            f"{signed(pair.gain, metric)} ({limits})."
        )
    verb = "gain" if pair.gain > 0 else "lose"
    return f"{start} {verb} {figure(abs(pair.gain), metric)} on average, {both} ({limits})."


def _better_off(results: StudyResults, lead: Arm) -> str:
    """How many hospitals are better off than alone, with the model that each of them gets."""
    found = against_alone(results, lead.personal or lead)
    if not found or any(pair.interval is None for pair in found.values()):
        return ""
    better = [site for site, pair in found.items() if pair.apart and pair.gain > 0]
    worse = [site for site, pair in found.items() if pair.apart and pair.gain < 0]
    whose = "the models of their own" if lead.personal else "the shared model"
    if not better and not worse:
        return f"With {whose} none of {len(found)} hospitals can be told apart from alone."
    level = len(found) - len(better) - len(worse)
    names = f" ({', '.join(worse)})" if worse else ""
    return (
        f"With {whose} {len(better)} of {len(found)} hospitals are better off than alone, "
        f"{level} level within chance, {len(worse)} worse{names}."
    )


def _left_out(results: StudyResults, lead: Arm) -> str:
    """What the model reaches at a hospital that took no part."""
    metric, told = results.primary, []
    for arm in of_kind(results, "left-out"):
        site = str(arm.site)
        without, with_it = site_estimate(arm, site, metric), site_estimate(lead, site, metric)
        if without is not None and with_it is not None:
            both = f"{figure(without.value, metric)} against {figure(with_it.value, metric)}"
            told.append(f"{site} {both}")
    if told:
        return (
            "At a hospital that takes no part, the model of the others has, against the model of "
            f"all: {', '.join(told)} {metric_name(metric)}."
        )
    return _unseen(results, lead)


def _unseen(results: StudyResults, lead: Arm) -> str:
    """What the model reaches at the hospitals that only evaluate, and why not at some."""
    metric, found = results.primary, lead.unseen
    if found is None:
        return ""
    values = {arm.site: site_estimate(arm, str(arm.site), metric) for arm in lead.left_out}
    told = [
        f"{figure(one.value, metric)}{_of(one, metric)} at {site}"
        for site, one in values.items()
        if one is not None
    ]
    why = {one.site: one.reason.rstrip(".") for one in found.not_measured}
    missing = [
        f"{site} ({why.get(site, f'no {metric_name(metric)} of its own patients')})"
        for site in results.evaluate_only
        if values.get(site) is None
    ]
    start = (
        f"Where no hospital took part in its training, the model reaches ({metric_name(metric)})"
    )
    sentences = [f"{start}: {', '.join(told)}."] if told else []
    if missing:
        sentences.append(f"Not known there: {', '.join(missing)}.")
    return " ".join(sentences)


def _private(results: StudyResults, lead: Arm, federated: list[Arm]) -> str:
    if lead.epsilon is not None:
        return ""
    metric, costs, plain = results.primary, [], together_estimate(lead, results.primary)
    for arm in federated:
        pair = compare(plain, together_estimate(arm, metric), metric)
        pair = patient_by_patient(results, pair, lead, [arm], own=False)
        if arm.epsilon is not None and pair is not None:
            low, high = pair.interval or (0.0, 0.0)
            limits = f" ({signed(low, metric)} to {signed(high, metric)})" if pair.interval else ""
            unclear = "" if pair.apart else ", which cannot be told from none"
            costs.append(f"{_cost(pair.gain, metric)} at {epsilon(arm.epsilon)}{limits}{unclear}")
    level = "Image" if per_image(results) else "Patient"
    return f"{level}-level differential privacy costs {'; '.join(costs)}." if costs else ""


def per_image(results: StudyResults) -> list[str]:
    """The sites whose images name no patients, so that each image counts as one."""
    return [site.site for site in results.sites if site.images_are_patients]


def patient_risk(results: StudyResults) -> str:
    """What it means that images name no patients; empty where all do."""
    sites = per_image(results)
    if not sites:
        return ""
    return (
        f"The images of {listed(sites)} name no patients, so each image counts as one: "
        "every count of patients there is one of images. If a person has several, that person may "
        "be in training and test, test figures are too good, and privacy holds for each image, not "
        "for each person."
    )


def _covered(results: StudyResults) -> str:
    patients = "for each single patient of the site, however many images that patient has"
    sites = per_image(results)
    if not sites:
        return patients
    images = "for each single image, which counts as a patient"
    if len(sites) == len(results.sites):
        return f"{images}: a person with several images is protected less"
    return f"{patients}; at {listed(sites)} {images}: a person with several is protected less"


def _cost(cost: float, metric: str) -> str:
    return figure(cost, metric) if cost >= 0 else signed(cost, metric)


def privacy_words(results: StudyResults) -> list[tuple[str, str]]:
    """What ε covers and what it does not, each point with its name."""
    private = [arm for arm in results.arms if arm.privacy or arm.epsilon is not None]
    if not private:
        return [
            (
                "None.",
                "These models were trained without differential privacy: nothing bounds what "
                "an update tells about a patient.",
            )
        ]
    said = [
        (
            "ε and δ cover the released updates:",
            "all model parameters that a site sends over all rounds of an arm, and every model "
            f"made from them; {_covered(results)}.",
        ),
        (
            "They do not cover",
            "evaluations, which are about validation and test patients"
            + _evaluated(results)
            + ", and the exact counts of patients, images and classes in this report. Each arm is "
            "a release of its own: on the same patients their ε add up.",
        ),
    ]
    if any(arm.kind == "federated" and arm.epsilon is None for arm in results.arms):
        said.append(
            (
                "For comparison only:",
                "the federated model without privacy; no ε covers its updates.",
            )
        )
    if results.engine in {"local", "ray"}:
        said.append(
            (
                "This is a simulation:",
                "its noise comes from the seed, so that the run can be repeated, and whoever knows "
                "the seed can take it off. A hospital draws its noise from its own system.",
            )
        )
    return said


def _evaluated(results: StudyResults) -> str:
    found = [arm.test.evaluation_epsilon for arm in of_kind(results, "federated") if arm.test]
    known = [epsilon for epsilon in found if epsilon is not None]
    if found and len(known) == len(found):
        return f" (their counts have noise and ε = {max(known):g} of their own)"
    return " (with exact counts, or noise without a bound)"
