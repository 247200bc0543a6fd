from __future__ import annotations

import io
import math
import re
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedward_server.report import headline, summary_table
from fedward_server.report.formatting import counted, duration, figure, listed, runs, size
from fedward_server.report.page import render
from fedward_server.report.stats import Estimate, clear_best, gain, mean, ordered
from fedward_server.results import Arm, Paired, StudyResults


def _text(results: StudyResults) -> str:
    out = io.StringIO()
    Console(file=out, width=160, color_system=None).print(summary_table(results))
    return out.getvalue()


def _half(*halves: float) -> float:
    return math.hypot(*halves)


def test_the_headline_says_what_federation_bought(classification: StudyResults) -> None:
    # Each arm together ± 0.010, each hospital ± 0.030 (conftest): by hand, what follows for
    # differences. The mean of four arms on the same patients stays at ± 0.010.
    two, home = _half(0.01, 0.01), _half(0.03, 0.03) / 2
    assert headline(classification) == (
        f"Federation bought +0.100 AUC (95 % interval +{0.10025 - two:.3f} to "
        f"+{0.10025 + two:.3f}) over the mean of the hospitals alone, 0.951 against 0.851, on all "
        "test patients together (546 patients of 4 hospitals). It cannot be told apart from pooled "
        "data (0.955; difference −0.004, 95 % interval −0.019 to +0.010). On their own test "
        "patients the hospitals gain 0.064 on average, 0.951 against 0.886 (95 % interval "
        f"+{0.0645 - home:.3f} to +{0.0645 + home:.3f}). With the shared model 2 of 4 hospitals "
        "are better off than alone, 2 level within chance, 0 worse. Patient-level differential "
        "privacy costs 0.014 at ε = 8 (0.000 to +0.028), which cannot be told from none; "
        "0.030 at ε = 3 (+0.016 to +0.044); 0.067 at ε = 1 (+0.053 to +0.081)."
    )


def test_a_paired_interval_is_used_where_there_is_one(classification: StudyResults) -> None:
    names = [arm.name for arm in classification.arms if arm.kind == "alone"]
    classification.paired = [
        Paired(
            one="federated",
            others=["pooled"],
            metric="auc",
            own=False,
            difference=-0.0044,
            interval=(-0.007, -0.002),
        ),
        Paired(
            one="federated",
            others=names,
            metric="auc",
            own=True,
            difference=0.0645,
            interval=(-0.01, 0.139),
        ),
    ]
    text = headline(classification)
    assert "worse than pooled data (0.955; paired 95 % interval −0.007 to −0.002)" in text
    assert "difference +0.064 (paired 95 % interval −0.010 to +0.139)" in text
    classification.primary = "ece"  # less is better, and nothing is paired by it
    assert "paired" not in headline(classification)


def test_a_tie_of_all_arms_is_told_as_one_and_nothing_is_marked(
    classification: StudyResults, read_page: Any
) -> None:
    """28 patients, balanced accuracy of one third in every arm."""
    for arm in classification.arms:
        assert arm.test is not None
        arm.test.pooled["auc"], arm.test.intervals["auc"] = 0.333, (0.30, 0.54)
        for site, figures in arm.test.per_site.items():
            figures["auc"], arm.test.site_intervals[site]["auc"] = 0.333, (0.1, 0.7)
    text = headline(classification)
    assert (
        "the federated model cannot be told apart from the hospitals alone on average: 0.333 "
        "against 0.333 AUC, difference 0.000" in text
    )
    assert "cannot be told apart from pooled data" in text
    assert "On their own test patients the hospitals cannot tell it from their own models" in text
    assert text.count("which cannot be told from none") == 3
    assert "With the shared model none of 4 hospitals can be told apart from alone." in text
    assert not re.search(r"\b(bought|gain|better|worse|lose)\b", text)
    assert not read_page(render([classification])).marks["AUC by test set"]
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system="standard")
    console.print(summary_table(classification))
    assert "\x1b[1;32m" not in out.getvalue()


def test_a_gain_within_chance_is_no_gain(classification: StudyResults) -> None:
    """+0.076 AUC on 28 patients."""
    federated = next(arm for arm in classification.arms if arm.name == "federated")
    assert federated.test is not None
    federated.test.pooled["auc"], federated.test.intervals["auc"] = 0.927, (0.78, 0.98)
    text = headline(classification)
    assert "bought" not in text
    assert "0.927 against 0.851 AUC, difference +0.076 (95 % interval −0.071 to" in text


def test_the_headline_admits_a_loss(classification: StudyResults) -> None:
    federated = next(arm for arm in classification.arms if arm.name == "federated")
    assert federated.test is not None
    federated.test.pooled["auc"], federated.test.intervals["auc"] = 0.70, (0.68, 0.72)
    for site, figures in federated.test.per_site.items():
        figures["auc"], federated.test.site_intervals[site]["auc"] = 0.7003, (0.65, 0.75)
    text = headline(classification)
    half, mean_alone = _half(0.02, 0.01), fmean([0.902, 0.881, 0.839, 0.781])
    low, high = mean_alone - 0.70 - half, mean_alone - 0.70 + half
    told = f"cost 0.151 AUC (95 % interval −{high:.3f} to −{low:.3f}) against the mean"
    assert told in text
    assert "It is 0.255 worse than pooled data" in text
    loss = fmean([0.938, 0.911, 0.874, 0.823]) - 0.7003
    assert f"the hospitals lose {loss:.3f} on average" in text
    assert "privacy costs −0.237 at ε = 8" in text


def test_without_intervals_nothing_is_claimed(classification: StudyResults) -> None:
    """Results of an earlier release."""
    for arm in classification.arms:
        assert arm.test is not None
        arm.test.intervals, arm.test.site_intervals = {}, {}
        arm.test.contributors, arm.test.patients = {}, {}
    text = headline(classification)
    assert text.startswith("On all test patients together the federated model has 0.951 against")
    assert "hold no interval" in text
    assert not re.search(r"\b(bought|gain|better|worse|lose)\b", text)


def test_less_is_better_for_distances_and_losses(segmentation: StudyResults) -> None:
    segmentation.primary = "hd95"
    text = headline(segmentation)
    assert "Federation bought +4.01 HD95 in mm" in text
    assert "It is 0.18 worse than pooled data" in text
    assert gain(1.0, 3.0, "hd95") == 2.0 and gain(1.0, 3.0, "dice") == -2.0
    near, far = Estimate(1.0, (0.9, 1.1)), Estimate(3.0, (2.9, 3.1))
    assert clear_best([far, None, near], "loss") == 2 and clear_best([far, near], "auc") == 0


def test_the_best_is_better_than_every_other_by_more_than_chance() -> None:
    one, other = Estimate(0.9, (0.88, 0.92)), Estimate(0.8, (0.78, 0.82))
    assert clear_best([one, other], "auc") == 0
    assert clear_best([one, other, Estimate(0.89, (0.85, 0.91))], "auc") is None
    assert clear_best([one, Estimate(0.1)], "auc") is None  # nothing is known of its interval
    assert clear_best([one], "auc") is None and clear_best([None], "auc") is None


def test_the_headline_compares_only_with_what_was_trained(classification: StudyResults) -> None:
    arms = classification.arms
    classification.arms = [arm for arm in arms if arm.kind == "federated"]
    assert headline(classification).startswith(
        "The federated model reached 0.951 AUC (95 % interval 0.941–0.961) on all test patients "
        "together (546 patients of 4 hospitals); 0.938 (St. Anne) to 0.962 (Hill) at the hospitals."
        " Patient-level"
    )
    classification.arms = [arm for arm in arms if arm.kind != "alone"]
    assert "It cannot be told apart from pooled data" in headline(classification)
    classification.arms = [arm for arm in arms if arm.epsilon == 3 or arm.kind == "alone"]
    assert headline(classification).startswith("Federation at ε = 3 bought +0.070 AUC")
    classification.arms = []
    assert headline(classification) == "No federated model was finished."


def test_home_gains_are_compared_site_by_site(classification: StudyResults) -> None:
    # Without the weakest hospital's arm, only the three others are compared.
    classification.arms = [arm for arm in classification.arms if arm.site != "Hill"]
    expected = fmean([0.957 - 0.938, 0.947 - 0.911, 0.938 - 0.874])
    assert f"gain {expected:.3f} on average" in headline(classification)


def test_the_terminal_table_has_the_figures(classification: StudyResults) -> None:
    lines = [line.split("│") for line in _text(classification).splitlines() if "│" in line]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}
    assert rows["federated, ε = 8"] == [
        "0.937 (0.922–0.952)",
        "0.937 (0.927–0.947)",
        "8",
        "52.4 s",
    ]
    assert rows["alone: Hill"][0] == "0.823 (0.793–0.853)"
    assert rows["hospitals alone, mean"][1] == "0.851 (0.841–0.861)"
    assert list(rows)[-1] == "pooled" and len(rows) == 10


def test_the_terminal_table_says_synthetic_and_interrupted(classification: StudyResults) -> None:
    assert "(synthetic data)" in _text(classification)
    classification.complete = False
    classification.arms[-1].test = None
    text = _text(classification)
    assert "(synthetic data, interrupted)" in text and "unfinished" in text


def test_markup_in_names_is_shown_in_the_terminal(classification: StudyResults) -> None:
    classification.title = "[bold]x[/bold]"
    classification.arms[0].name = "[red]a[/red] [/]"
    text = _text(classification)
    assert "[bold]x[/bold]" in text and "[red]a[/red] [/]" in text


def test_arms_are_ordered_from_alone_to_pooled_and_loose_to_strict() -> None:
    arms = [
        Arm(name="p", kind="pooled"),
        Arm(name="1", kind="federated", epsilon=1),
        Arm(name="8", kind="federated", epsilon=8),
        Arm(name="f", kind="federated"),
        Arm(name="a", kind="alone", site="s"),
    ]
    assert [arm.name for arm in ordered(arms)] == ["a", "f", "8", "1", "p"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.994, "0.99 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (245.4, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7384, "2 h 03 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (12_345, "12.3 kB"),
        (4.5678e6, "4.57 MB"),
        (2e9, "2000.00 MB"),
        (1.5e10, "15.00 GB"),
    ],
)
def test_sizes(number: float, text: str) -> None:
    assert size(number) == text


def test_small_words() -> None:
    assert listed([]) == "" and listed(["a"]) == "a" and listed("abc") == "a, b and c"
    assert counted(1, "site") == "1 site" and counted(2000, "site") == "2,000 sites"
    assert figure(None) == "–" and figure(2.345, "hd95") in {"2.35", "2.34"}
    assert mean([None]) is None and mean([1.0, None, 3.0]) == 2.0


@given(st.lists(st.integers(1, 60)))
def test_runs_name_each_number_once(numbers: list[int]) -> None:
    named: list[int] = []
    for part in filter(None, runs(numbers).split(", ")):
        low, _, high = part.partition("–")
        named += range(int(low), int(high or low) + 1)
    assert named == sorted(set(numbers))
