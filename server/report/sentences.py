"""What a study found, and what its privacy means, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from fedward.plan.schema import Plan
from server.report.numbers import dominant, gain, home_gain, of_kind, own, together, together_mean
from server.report.words import epsilon, figure, listed, metric_name, percent
from server.results import Arm, StudyResults


def headline(results: StudyResults) -> str:
    """What the study found, in one to four sentences.

    Compares the federated model on all test patients together with the mean of the hospitals alone
    and with pooled data, by the primary metric, then tells what privacy cost. What was not trained
    is not compared.
    """
    federated = [arm for arm in of_kind(results, "federated") if arm.test]
    if not federated:
        told = [unmeasured(arm) for arm in of_kind(results, "federated") if arm.unmeasured]
        return told[0] if told else "No federated model was finished."
    lead = federated[0]
    sentences = [
        _bought(results, lead),
        dominance(lead, results.primary),
        _at_home(results, lead),
        _private(results, lead, federated),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _bought(results: StudyResults, lead: Arm) -> str:
    metric, value = results.primary, together(lead, results.primary)
    name = metric_name(metric)
    alone = together_mean(of_kind(results, "alone"), metric)
    pooled = together_mean(_alike(of_kind(results, "pooled"), lead), metric)
    parts = list(_compared(metric, value, alone, pooled))
    if not parts:
        at_home = {site: one for site, one in own(lead, metric).items() if one is not None}
        reached = f"{figure(value, metric)} {name} on all test patients together"
        if len(at_home) > 1:
            low, high = min(at_home, key=at_home.__getitem__), max(at_home, key=at_home.__getitem__)
            reached = (
                f"{figure(at_home[low], metric)} ({low}) to {figure(at_home[high], metric)} "
                f"({high}) {name} at the hospitals, {figure(value, metric)} on all test patients "
                "together"
            )
        return f"The federated model{_with(lead)} reached {reached}."
    return f"Federation{_with(lead)} {parts[0]}{'; ' + parts[1] if parts[1:] else ''}."


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
    found = dominant(arm)
    if found is None:
        return ""
    site, share = found
    return (
        f"The {figure(together(arm, metric), metric)} on all together is mostly {site}, which says "
        f"that it has {percent(share)} of the test images."
    )


def _compared(
    metric: str, value: float | None, alone: float | None, pooled: float | None
) -> Iterator[str]:
    name, over = metric_name(metric), gain(value, alone, metric)
    if over is not None:
        verb = "bought +" if over >= 0 else "cost "
        against = "over" if over >= 0 else "against"
        yield (
            f"{verb}{figure(abs(over), metric)} {name} {against} the mean of the hospitals alone "
            f"({figure(value, metric)} against {figure(alone, metric)}, all test patients together)"
        )
    below = gain(pooled, value, metric)
    if below is not None:
        lead = "" if over is not None else f"reached {figure(value, metric)} {name}, "
        yield f"{lead}{_distance(below, metric)} pooled data"


def _distance(worse: float, metric: str) -> str:
    text = figure(abs(worse), metric)
    if float(text) == 0:
        return "level with"
    return f"{text} {'worse' if worse > 0 else 'better'} than"


def _alike(pooled: list[Arm], lead: Arm) -> list[Arm]:
    """The pooled arm to measure against: one without privacy, or else one as private."""
    plain = [arm for arm in pooled if arm.epsilon is None]
    return (plain or [arm for arm in pooled if arm.epsilon == lead.epsilon])[:1]


def _with(arm: Arm) -> str:
    return f" at {epsilon(arm.epsilon)}" if arm.epsilon is not None else ""


def _at_home(results: StudyResults, lead: Arm) -> str:
    alone = [arm for arm in of_kind(results, "alone") if arm.test]
    metric = results.primary
    over = home_gain(lead, alone, metric)
    if over is None:
        return ""
    verb = "gain" if over >= 0 else "lose"
    return (
        f"On their own test patients the hospitals {verb} {figure(abs(over), metric)} on average."
    )


def _private(results: StudyResults, lead: Arm, federated: list[Arm]) -> str:
    if lead.epsilon is not None:
        return ""
    metric, costs = results.primary, []
    for arm in federated[1:]:
        cost = gain(together(lead, metric), together(arm, metric), metric)
        if arm.epsilon is not None and cost is not None:
            sign = "" if cost >= 0 else "−"
            costs.append(f"{sign}{figure(abs(cost), metric)} at {epsilon(arm.epsilon)}")
    level = "Image" if per_image(results) else "Patient"
    return f"{level}-level differential privacy costs {listed(costs)}." if costs else ""


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
