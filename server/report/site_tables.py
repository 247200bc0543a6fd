"""Tables about the sites and the rounds: who took part, with what, at what cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fedward.protocol import SiteFacts
from server.report.coverage import contributing, why_not_measured
from server.report.numbers import finite, mean, ordered, site_names
from server.report.tables import Cell, Row, Table
from server.report.words import NOTHING, duration, figure, listed, metric_name, runs, size
from server.results import Arm, Round, StudyResults, TestFigures

_ROWS: Final = 200  # more rows than anybody reads
# The sentences with which a site's policy refuses an evaluation, and what decides there.
KEYS: Final[Mapping[str, str]] = {
    "what the site counts must be enough, and allowed, to leave it": (
        "`metrics` and `minimum_count` in [policy] of its site.toml decide"
    ),
    "ε of evaluations must not be above what the site allows": (
        "`max_evaluation_epsilon` and `max_evaluation_epsilon_per_cohort` in [policy] of its "
        "site.toml decide"
    ),
}
WITHHELD: Final = (
    "Withheld by its policy: `metrics` in [policy] of its site.toml must name all figures that the "
    "same counts give, and each class must have `minimum_count` images."
)


def sites_table(results: StudyResults) -> Table | None:
    """Patients, images, their division and the classes at each site."""
    if not results.sites:
        return None
    classes = _class_names(results)
    rows = [Row(facts.site, _site_cells(facts, len(classes))) for facts in results.sites]
    if len(rows) > 1:
        rows.append(_sum_row(results.sites, len(classes)))
    if results.left_out:
        nothing = [Cell(NOTHING)] * (5 + len(classes))
        rows.append(Row("not given to any site", [*nothing, Cell(_reasons(results.left_out))]))
    columns = ["patients", "training", "validation", "test", "images", *classes, "left out"]
    return Table(
        "Patients, images and classes", "site", columns, rows, frozenset({len(columns) - 1})
    )


def _site_cells(facts: SiteFacts, classes: int) -> list[Cell]:
    numbers = [*_numbers(facts), *facts.class_counts]
    cells = [Cell(f"{number:,}") for number in numbers]
    cells += [Cell(NOTHING)] * (5 + classes - len(cells))
    return [*cells, Cell(_left_out(facts))]


def _numbers(facts: SiteFacts) -> tuple[int, ...]:
    return (
        facts.patients,
        facts.train_patients,
        facts.validation_patients,
        facts.test_patients,
        facts.images,
    )


def _sum_row(sites: Sequence[SiteFacts], classes: int) -> Row:
    sums = [sum(column) for column in zip(*(_numbers(facts) for facts in sites), strict=True)]
    whole = [facts.class_counts for facts in sites if len(facts.class_counts) == classes]
    sums += [sum(column) for column in zip(*whole, strict=True)]
    cells = [Cell(f"{number:,}") for number in sums]
    cells += [Cell(NOTHING)] * (5 + classes - len(cells))
    left = sum(sum(facts.left_out_counts) for facts in sites)
    return Row("all sites", [*cells, Cell(f"{left:,}" if left else "none")], is_mean=True)


def _left_out(facts: SiteFacts) -> str:
    return _reasons(dict(zip(facts.left_out_reasons, facts.left_out_counts, strict=False)))


def _reasons(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{reason}: {count:,}" for reason, count in counts.items()) or "none"


def _class_names(results: StudyResults) -> list[str]:
    number = max((len(facts.class_counts) for facts in results.sites), default=0)
    task: dict[str, Any] = results.plan.get("task", {})
    names = [str(name) for name in task.get("classes", ())]
    if number == len(names) + 1:
        names.insert(0, "background")
    names = names if number == len(names) else [f"class {place}" for place in range(number)]
    return [f"images with {name}" for name in names]


def always_there(arm: Arm, sites: Sequence[str]) -> bool:
    """Whether every site's update counted in every round of an arm."""
    return all(set(sites) <= set(round_.sites) for round_ in arm.rounds)


def participation_table(results: StudyResults) -> Table | None:
    """For federated arms that missed an update: by site, how many counted and why not all."""
    sites = site_names(results)
    rows = [
        Row(arm.name, _site_record(arm, site))
        for arm in ordered(results.arms)
        if arm.kind == "federated" and not always_there(arm, sites)
        for site in sites
    ]
    columns = ["site", "updates counted", "failures", "why"]
    caption = "Updates that counted, by site"
    return Table(caption, "trained", columns, rows, frozenset({0, 3})) if rows else None


def _site_record(arm: Arm, site: str) -> list[Cell]:
    reasons: dict[str, list[int]] = defaultdict(list)
    for round_ in arm.rounds:
        for failure in round_.failures:
            if failure.site == site:
                reasons[failure.reason].append(round_.round)
    failed = [number for numbers in reasons.values() for number in numbers]
    took_part = sum(site in r.sites for r in arm.rounds)
    absent = [r.round for r in arm.rounds if site not in r.sites and r.round not in failed]
    why = [f"{reason} ({_in_rounds(numbers)})" for reason, numbers in reasons.items()]
    why += [f"not asked ({_in_rounds(absent)})"] if absent else []
    return [
        Cell(site),
        Cell(f"{took_part} of {len(arm.rounds)}"),
        Cell(f"{len(failed)}"),
        Cell("; ".join(why) or NOTHING),
    ]


def _in_rounds(numbers: Sequence[int]) -> str:
    return f"{'round' if len(set(numbers)) == 1 else 'rounds'} {runs(numbers)}"


def cost_table(results: StudyResults) -> Table | None:
    """By arm: rounds, seconds per round and in all, bytes per round and in all."""
    arms = [arm for arm in ordered(results.arms) if arm.rounds]
    rows = [Row(arm.name, _cost_cells(arm)) for arm in arms]
    columns = [
        "rounds",
        "time per round",
        "slowest round",
        "sent per round",
        "received per round",
        "traffic in all",
        "time in all",
    ]
    return Table("Time and traffic", "trained", columns, rows) if rows else None


def _cost_cells(arm: Arm) -> list[Cell]:
    seconds = [round_.seconds for round_ in arm.rounds]
    down, up = (sum(getattr(r, key) for r in arm.rounds) for key in ("bytes_down", "bytes_up"))
    quiet = down + up == 0
    texts = (
        str(len(arm.rounds)),
        duration(mean(seconds) or 0.0),
        duration(max(seconds)),
        NOTHING if quiet else size(down / len(arm.rounds)),
        NOTHING if quiet else size(up / len(arm.rounds)),
        NOTHING if quiet else size(down + up),
        duration(arm.seconds),
    )
    return [Cell(text) for text in texts]


def rounds_table(results: StudyResults, arm: Arm) -> Table:
    """The rounds of an arm; of very many the measured ones and some between."""
    stages = Counter(round_.stage for round_ in arm.rounds)
    columns = [
        *(["stage"] if len(stages) > 1 else []),
        "time",
        "sent",
        "received",
        "training loss",
        f"{metric_name(results.primary)}, validation",
        "updates",
        "failed sites",
    ]
    shown = _some(arm.rounds)
    rows = [Row(str(r.round), _round_cells(r, results.primary, len(stages) > 1)) for r in shown]
    words = {len(columns) - 1, *([0] if len(stages) > 1 else [])}
    part = f", {len(shown):,} of {len(arm.rounds):,} rounds; metrics.json has all"
    caption = arm.name + (part if len(shown) < len(arm.rounds) else "")
    return Table(caption, "round", columns, rows, frozenset(words))


def _some(rounds: Sequence[Round]) -> Sequence[Round]:
    step = max(1, -(-len(rounds) // _ROWS))
    return [
        one
        for place, one in enumerate(rounds, start=1)
        if one.validation or place in (1, len(rounds)) or place % step == 0
    ]


def _round_cells(round_: Round, metric: str, staged: bool) -> list[Cell]:
    failed = list(dict.fromkeys(f.site for f in round_.failures if f.site not in round_.sites))
    texts = (
        *([round_.stage] if staged else []),
        duration(round_.seconds),
        size(round_.bytes_down),
        size(round_.bytes_up),
        figure(finite(round_.train_loss)),
        figure(finite(round_.validation.get(metric)), metric),
        str(len(round_.sites)),
        listed(failed) if failed else NOTHING,
    )
    return [Cell(text) for text in texts]


def coverage_table(results: StudyResults, arm: Arm) -> Table | None:
    """By site: test patients, the figures that it gave, those that are missing and why."""
    if arm.test is None:
        return None
    asked = results.plan.get("metrics", {}).get("report", ())
    names = list(arm.test.pooled or arm.test.contributors or asked)
    rows = [
        Row(site, _coverage_cells(results, arm, arm.test, site, names))
        for site in site_names(results)
    ]
    columns = ["test patients", "test images", "figures it gave", "missing", "why"]
    caption = f"Of whom the figures are ({arm.name})"
    return Table(caption, "hospital", columns, rows, frozenset({2, 3, 4})) if rows else None


def _coverage_cells(
    results: StudyResults, arm: Arm, test: TestFigures, site: str, names: list[str]
) -> list[Cell]:
    facts = {one.site: one for one in results.sites}.get(site)
    patients = test.patients.get(site, facts.test_patients if facts else None)
    images = test.images.get(site, facts.test_images if facts else None)
    given = [name for name in names if site in contributing(arm, name)]
    lacking = [name for name in names if name not in given]
    return [
        Cell(NOTHING if patients is None else f"{patients:,}"),
        Cell(NOTHING if images is None else f"{images:,}"),
        Cell(", ".join(map(metric_name, given)) or "none"),
        Cell(", ".join(map(metric_name, lacking)) or "none"),
        Cell(_why(arm, test, site, given, lacking, patients)),
    ]


def _why(
    arm: Arm,
    test: TestFigures,
    site: str,
    given: list[str],
    lacking: list[str],
    patients: int | None,
) -> str:
    failed = why_not_measured(arm, site)
    if failed is not None:
        keys = [key for rule, key in KEYS.items() if failed.reason.startswith(rule)]
        return f"{'; '.join([failed.reason.rstrip('.'), *keys])}."
    if patients == 0:
        return "It has no test patients."
    if site not in test.per_site:
        return "It was not measured."
    undefined = [
        metric_name(name) for name in given if finite(test.per_site[site].get(name)) is None
    ]
    told = [WITHHELD] if lacking else []
    if undefined:
        told.append(f"Its own patients define no {listed(undefined)} (one class, or too few).")
    return " ".join(told) or NOTHING
