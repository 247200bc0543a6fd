"""A model card: what a model is, what it was made of, and what it is not for.

After Mitchell et al., 2019, Model Cards for Model Reporting (arXiv:1810.03993).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from fedward.plan.explain import column_words
from fedward.plan.schema import Plan
from fedward.printable import printable
from fedward_server.report.coverage import contributing, missing_words, whom
from fedward_server.report.stats import Estimate, site_estimate, together_estimate
from fedward_server.report.summary import delivered, dominance, patient_risk, per_image, unmeasured
from fedward_server.results import Arm, StudyResults


def model_card(study: str, plan: Plan, results: StudyResults) -> str:
    """The card in Markdown.

    Parameters
    ----------
    study : str
        The study's id.
    plan : Plan
        What was done.
    results : StudyResults
        What came of it.
    """
    arm = results.arms[0]
    parts = (
        _head(study, plan, results),
        _data(results, arm),
        _privacy(plan, arm, results),
        _figures(plan, arm, results),
        _use(plan, results),
    )
    return printable("\n".join(line for part in parts for line in (*part, "")))


def _head(study: str, plan: Plan, results: StudyResults) -> Iterator[str]:
    state = "finished" if results.complete else "not finished"
    yield f"# {plan.study.title or plan.study.name}"
    yield ""
    if results.synthetic:
        yield "**Trained on synthetic images: of no use for patients.**"
        yield ""
    yield f"- Study: `{study}` ({state}), {len(results.arms[0].rounds)} of {plan.rounds} rounds"
    if told := delivered(results.arms[0], results.primary):
        yield f"- {told}"
    yield f"- Plan: SHA-256 `{results.plan_sha256}`"
    yield f"- Task: {plan.task.kind}, {plan.task.dimensions}D, {', '.join(plan.task.classes)}"
    if plan.preprocessing.channel:
        yield f"- Channels: {', '.join(one.name for one in plan.preprocessing.channel)}"
    if plan.table is not None:
        columns = "; ".join(map(column_words, plan.table.column))
        yield f"- Reads beside the image: {columns}"
    yield f"- Network: {plan.model.name}, {results.parameters:,} parameters"
    if results.model_sha256:
        yield f"- Model file: SHA-256 `{results.model_sha256}`"
    # Of what ran the study, whoever writes the card.
    release = results.versions.get("fedward", "(release not known)")
    yield f"- Made with: Fedward {release}, " + ", ".join(
        f"{name} {number}" for name, number in sorted(results.versions.items()) if name != "fedward"
    )


def _data(results: StudyResults, arm: Arm) -> Iterator[str]:
    yield "## What it was made of"
    yield ""
    yield "| site | patients | training | validation | test | rounds it took part in |"
    yield "|---|---|---|---|---|---|"
    for site in results.sites:
        taken = f"{sum(site.site in one.sites for one in arm.rounds)} of {len(arm.rounds)}"
        if site.site in results.evaluate_only:
            taken = "none, it only evaluates"
        yield (
            f"| {site.site} | {site.patients} | {site.train_patients} | "
            f"{site.validation_patients} | {site.test_patients} | {taken} |"
        )
    for name in sorted(set(results.named) - {site.site for site in results.sites}):
        yield f"| {name} | – | – | – | – | 0 of {len(arm.rounds)} |"
    if risk := patient_risk(results):
        yield ""
        yield f"**High risk.** {risk}"
    if results.unchecked:
        yield ""
        yield f"Sizes as the sites state them, not checked: {', '.join(results.unchecked)}."


def _privacy(plan: Plan, arm: Arm, results: StudyResults) -> Iterator[str]:
    yield "## Privacy"
    yield ""
    if not plan.privacy.on:
        yield "None: updates of this study were not differentially private."
        return
    whom = "patients"
    if sites := per_image(results):
        everywhere = len(sites) == len(results.sites)
        at = "" if everywhere else f"patients, at {', '.join(sites)} for each of its "
        whom = f"{at}images, which count as patients"
    yield (
        f"Each site's updates are differentially private for each of its {whom} "
        "(DP-SGD). Figures of evaluation are about other patients, and have a bound of their own "
        "where one is stated below."
    )
    yield ""
    yield "| site | ε | δ | noise multiplier | sampling rate |"
    yield "|---|---|---|---|---|"
    for name, one in sorted(arm.privacy.items()):
        yield (
            f"| {name} | {one.spent('.3g')} | {one.delta:.1e} | {one.noise_multiplier:.3g} | "
            f"{one.sampling_rate:.3g} |"
        )


def _figures(plan: Plan, arm: Arm, results: StudyResults) -> Iterator[str]:
    yield "## How good it is"
    yield ""
    if arm.test is None:
        yield unmeasured(arm) if arm.unmeasured else "Not measured on test patients yet."
        return
    names = plan.metrics.report
    yield "On patients that no training saw."
    yield ""
    yield "| |" + "|".join(f" {name} " for name in names) + "|"
    yield "|---|" + "---|" * len(names)
    for site in sorted(arm.test.per_site):
        yield f"| {site} |" + "|".join(_told(site_estimate(arm, site, n)) for n in names) + "|"
    for unseen in arm.left_out:
        told = "|".join(_told(site_estimate(unseen, str(unseen.site), n)) for n in names)
        yield f"| {unseen.site}, not in the training |{told}|"
    yield "| spread between sites |" + "|".join(_spread(arm, n) for n in names) + "|"
    yield "| together |" + "|".join(_told(together_estimate(arm, n)) for n in names) + "|"
    errors = arm.test.standard_errors
    if errors:
        cells = "|".join(_cell(errors.get(n)) for n in names)
        yield f"| standard error of the noise, all together |{cells}|"
        yield ""
        told = "Sites counted with noise; the standard error is what that noise alone adds."
        if (epsilon := arm.test.evaluation_epsilon) is not None:
            one = "image (patient, where images name theirs)" if per_image(results) else "patient"
            told += f" For each test {one} the counts are differentially private, ε = {epsilon:g}."
        yield told
    yield ""
    yield from _whom(arm, results, names)
    if told := dominance(arm, results.primary):
        yield ""
        yield f"**{told}**"


def _whom(arm: Arm, results: StudyResults, names: Sequence[str]) -> Iterator[str]:
    """Of whom the figures together are, and who is missing."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if contributing(arm, name):
            told = f"{whom(results, arm, name)}. {missing_words(results, arm, name)}".strip()
            groups.setdefault(told, []).append(name)
    yield "In brackets: 95 % interval, by patient. Together is on:"
    yield ""
    for told, own in groups.items():
        yield f"- {', '.join(own)}: {told}"
    if lacking := [name for name in names if not contributing(arm, name)]:
        yield f"- {', '.join(lacking)}: nobody. {missing_words(results, arm, lacking[0])}".rstrip()


def _use(plan: Plan, results: StudyResults) -> Iterator[str]:
    yield "## Intended use, and limits"
    yield ""
    yield plan.study.intended_use or "Research. The plan states no other use."
    yield ""
    yield (
        "Not a medical device; not validated for diagnosis. It was measured on the sites above: "
        "other scanners, protocols and populations may do worse, and the spread between these "
        "sites is the least to expect."
    )


def _cell(value: float | None) -> str:
    return " – " if value is None else f" {value:.3f} "


def _told(one: Estimate | None) -> str:
    limits = f"({one.interval[0]:.3f}–{one.interval[1]:.3f}) " if one and one.interval else ""
    return _cell(one.value if one else None) + limits


def _spread(arm: Arm, name: str) -> str:
    sites = arm.test.per_site.values() if arm.test else ()
    found = [one for values in sites if (one := values.get(name)) is not None]
    return f" {statistics.stdev(found):.3f} " if len(found) > 1 else " – "
