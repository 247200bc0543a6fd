"""The tables of a report, as rows of cells; the template gives them their tags."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fedward.protocol import SiteFacts
from fedward.rule_codes import RuleCode
from fedward_server.report.coverage import contributing, is_whole, share_of, why_not_measured
from fedward_server.report.formatting import (
    NOTHING,
    duration,
    figure,
    interval,
    listed,
    metric_name,
    runs,
    size,
)
from fedward_server.report.stats import (
    OF_ONE_SITE,
    Estimate,
    clear_best,
    contributed,
    finite,
    mean,
    ordered,
    own_mean_estimate,
    site_estimate,
    site_names,
    together_estimate,
    together_mean_estimate,
)
from fedward_server.results import Arm, Round, StudyResults, TestFigures


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes
    ----------
    text : str
        What it shows.
    best : bool
        Whether it is better than all others of its column, by more than chance.
    home : bool
        Whether it is a hospital's model on that hospital's own patients.
    interval : str
        The interval of the figure.
    """

    text: str
    best: bool = False
    home: bool = False
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """One row: its head and its cells."""

    head: str
    cells: Sequence[Cell]
    is_mean: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its caption.

    Attributes
    ----------
    corner : str
        Head of the first column.
    columns : sequence of str
        Heads of the others.
    words : frozenset of int
        Columns (from 0, without the first) that hold words rather than numbers.
    """

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]
    words: frozenset[int] = field(default_factory=frozenset)


def primary_table(results: StudyResults) -> Table | None:
    """Arms by test set: each site's own, their mean, all test patients together.

    None where no arm has a figure.
    """
    sites, metric = [*site_names(results), *results.evaluate_only], results.primary
    arms = [arm for arm in ordered(results.arms) if arm.test]
    columns: list[Callable[[Arm], Estimate | None]] = [_site(site, metric) for site in sites]
    columns += [lambda arm: _mean_of_homes(arm, metric), lambda arm: together_estimate(arm, metric)]
    values = [[column(arm) for arm in arms] for column in columns]
    if not any(one for column in values for one in column):
        return None
    tops = [clear_best(column, metric) for column in values]
    rows = [
        Row(
            arm.name,
            [
                _cell(
                    column[at],
                    metric,
                    best=top == at,
                    home=place < len(sites)
                    and arm.kind in OF_ONE_SITE
                    and arm.site == sites[place],
                )
                for place, (column, top) in enumerate(zip(values, tops, strict=True))
            ],
        )
        for at, arm in enumerate(arms)
    ]
    alone = [arm for arm in arms if arm.kind == "alone"]
    if len(alone) > 1:
        rows.insert(len(alone), _alone_row(alone, sites, metric))
    heads = [*sites, "mean of own tests", _together_head(results, arms, metric)]
    return Table(f"{metric_name(metric)} by test set", "trained", heads, rows)


def _together_head(results: StudyResults, arms: Sequence[Arm], metric: str) -> str:
    """``all together``, or of how many hospitals some arm's figure is."""
    part = next((arm for arm in arms if not is_whole(results, arm, metric)), None)
    return "all together" if part is None else f"together, {share_of(results, part, metric)}"


def _cell(one: Estimate | None, metric: str, *, best: bool = False, home: bool = False) -> Cell:
    if one is None:
        return Cell(NOTHING, home=home)
    limits = interval(one.interval, metric) if one.interval else ""
    return Cell(figure(one.value, metric), best, home, limits)


def _site(site: str, metric: str) -> Callable[[Arm], Estimate | None]:
    return lambda arm: site_estimate(arm, site, metric)


def _mean_of_homes(arm: Arm, metric: str) -> Estimate | None:
    # A hospital alone has one figure of its own; beside means over all hospitals it would mislead.
    return None if arm.kind in OF_ONE_SITE else own_mean_estimate([arm], metric)


def _alone_row(alone: Sequence[Arm], sites: Sequence[str], metric: str) -> Row:
    """Each hospital's own model at home, and the mean of them all."""
    homes = {str(arm.site): site_estimate(arm, str(arm.site), metric) for arm in alone}
    values = [homes.get(site) for site in sites]
    values += [own_mean_estimate(alone, metric), together_mean_estimate(alone, metric)]
    cells = [_cell(value, metric, home=place < len(sites)) for place, value in enumerate(values)]
    return Row("hospitals alone, each at home", cells, is_mean=True)


def metrics_table(results: StudyResults) -> Table | None:
    """Every metric of every arm on all test patients together; None where there is none."""
    arms = [arm for arm in ordered(results.arms) if arm.test]
    names = list(dict.fromkeys(key for arm in arms if arm.test for key in arm.test.pooled))
    names.sort(key=lambda name: name != results.primary)
    values = {name: [together_estimate(arm, name) for arm in arms] for name in names}
    values = {name: column for name, column in values.items() if any(column)}
    if not values:
        return None
    tops = {name: clear_best(column, name) for name, column in values.items()}
    rows = [
        Row(
            arm.name,
            [
                _with_noise(_cell(column[at], name, best=tops[name] == at), arm, name)
                for name, column in values.items()
            ],
        )
        for at, arm in enumerate(arms)
    ]
    parts = {name: _together_head(results, arms, name) for name in values}
    whole = all(head == "all together" for head in parts.values())
    caption = "Every metric on all test patients together"
    heads = [metric_name(name) for name in values]
    if not whole:
        caption = "Every metric on the test patients of the hospitals that gave it"
        heads = [
            f"{metric_name(n)} ({head.removeprefix('together, ')})"
            if head != "all together"
            else metric_name(n)
            for n, head in parts.items()
        ]
    if any(arm.test and arm.test.standard_errors for arm in arms):
        caption += "; ± is the standard error of the noise in private counts"
    return Table(caption, "trained", heads, rows)


def _with_noise(cell: Cell, arm: Arm, metric: str, site: str = "") -> Cell:
    """With the standard error of private counts, at a site or of all sites together."""
    errors: dict[str, float] = {}
    if arm.test is not None:
        errors = arm.test.site_standard_errors.get(site, {}) if site else arm.test.standard_errors
    if metric not in errors or cell.text == NOTHING:
        return cell
    return replace(cell, text=f"{cell.text} ± {figure(errors[metric], metric)}")


def site_metrics_table(results: StudyResults) -> Table | None:
    """Every metric of the federated arms on each site's own test patients."""
    arms = [arm for arm in ordered(results.arms) if arm.kind == "federated" and arm.test]
    names = list(dict.fromkeys(k for arm in arms if arm.test for k in arm.test.pooled))
    names.sort(key=lambda name: name != results.primary)
    rows = [
        Row(
            arm.name,
            [
                Cell(site),
                *(
                    _with_noise(_cell(site_estimate(arm, site, name), name), arm, name, site)
                    for name in names
                ),
            ],
        )
        for arm in arms
        for site in (arm.test.per_site if arm.test else ())
    ]
    columns = ["site", *(metric_name(name) for name in names)]
    caption = "Every metric at each site, on its own test patients"
    return Table(caption, "trained", columns, rows, frozenset({0})) if rows else None


def class_tables(results: StudyResults) -> list[Table]:
    """Segmentation: a table per metric, arms by class, on all test patients together."""
    arms = [arm for arm in ordered(results.arms) if arm.test and arm.test.per_class]
    metrics = list(dict.fromkeys(m for arm in arms if arm.test for m in arm.test.per_class))
    return [_class_table(results, arms, metric) for metric in metrics]


def _class_table(results: StudyResults, arms: Sequence[Arm], metric: str) -> Table:
    classes = list(
        dict.fromkeys(k for arm in arms if arm.test for k in arm.test.per_class.get(metric, {}))
    )
    values = {name: [_of_class(arm, name, metric) for arm in arms] for name in classes}
    tops = {name: clear_best(column, metric) for name, column in values.items()}
    rows = [
        Row(
            arm.name,
            [
                *(_cell(values[k][at], metric, best=tops[k] == at) for k in classes),
                _cell(together_estimate(arm, metric), metric),
            ],
        )
        for at, arm in enumerate(arms)
    ]
    head = _together_head(results, arms, metric)
    whose = "all test patients together" if head == "all together" else head
    caption = f"{metric_name(metric)} by class, {whose}"
    return Table(caption, "trained", [*classes, "mean of classes"], rows)


def _of_class(arm: Arm, name: str, metric: str) -> Estimate | None:
    if arm.test is None:
        return None
    value = finite(arm.test.per_class.get(metric, {}).get(name))
    limits = arm.test.class_intervals.get(metric, {}).get(name)
    return None if value is None else Estimate(value, limits)


def privacy_table(results: StudyResults) -> Table | None:
    """What each site's patients were promised and what was spent; none without privacy."""
    rows = [
        Row(
            arm.name,
            [
                Cell(site),
                Cell(NOTHING if arm.epsilon is None else f"{arm.epsilon:g}"),
                Cell(spent.spent(".3f")),
                Cell(f"{spent.delta:g}"),
                Cell(f"{spent.noise_multiplier:.3f}"),
                Cell(f"{spent.sampling_rate:.4g}"),
                Cell(f"{spent.steps:,}"),
            ],
        )
        for arm in ordered(results.arms)
        for site, spent in arm.privacy.items()
    ]
    columns = ["site", "target ε", "ε spent", "δ", "noise multiplier", "sampling rate", "steps"]
    caption = "Privacy spent, by site"
    return Table(caption, "trained", columns, rows, frozenset({0})) if rows else None


# Tables about the sites and the rounds: who took part, with what, at what cost.

_ROWS: Final = 200  # more rows than anybody reads
# The rules with which a site's policy refuses an evaluation, and what decides there.
KEYS: Final[Mapping[RuleCode, str]] = {
    RuleCode.WITHHELD: "`metrics` and `minimum_count` in [policy] of its site.toml decide",
    RuleCode.EVALUATION_EPSILON: (
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
    rows = [
        Row(
            f"{facts.site} (evaluates only)" * (facts.site in results.evaluate_only) or facts.site,
            _site_cells(facts, len(classes)),
        )
        for facts in results.sites
    ]
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


def contribution_table(results: StudyResults) -> Table | None:
    """For federated arms: by site, what its updates added to those of the others."""
    rows = [
        Row(
            arm.name,
            [
                Cell(site),
                Cell(NOTHING if own.share is None else f"{own.share:.1%}"),
                Cell(f"{own.agreement:+.2f}"),
                Cell(f"{own.rounds} of {len(arm.rounds)}"),
            ],
        )
        for arm in ordered(results.arms)
        if arm.kind == "federated"
        for site, own in sorted(contributed(arm).items())
    ]
    columns = ["site", "contribution", "agreement", "rounds"]
    caption = "What each site's updates added to the others'"
    return Table(caption, "trained", columns, rows, frozenset({0})) if rows else None


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
        NOTHING if quiet else size(down + up + arm.own_bytes_down),
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
        keys = [key for code, key in KEYS.items() if failed.reason.startswith(code.text)]
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
