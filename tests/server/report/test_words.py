from __future__ import annotations

import io
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from server.report import headline, summary_table
from server.report.numbers import best, gain, mean, ordered
from server.report.words import counted, duration, figure, listed, runs, size
from server.results import Arm, StudyResults


def _text(results: StudyResults) -> str:
    out = io.StringIO()
    Console(file=out, width=160, color_system=None).print(summary_table(results))
    return out.getvalue()


def test_the_headline_says_what_federation_bought(classification: StudyResults) -> None:
    assert headline(classification) == (
        "Federation bought +0.100 AUC over the mean of the hospitals alone (0.951 against 0.851, "
        "all test patients together); 0.004 worse than pooled data. On their own test patients the "
        "hospitals gain 0.064 on average. Patient-level differential privacy costs 0.014 at ε = 8, "
        "0.030 at ε = 3 and 0.067 at ε = 1."
    )


def test_the_headline_admits_a_loss(classification: StudyResults) -> None:
    federated = next(arm for arm in classification.arms if arm.name == "federated")
    assert federated.test is not None
    federated.test.pooled["auc"] = 0.70
    for figures in federated.test.per_site.values():
        figures["auc"] = 0.7003
    text = headline(classification)
    assert "Federation cost 0.151 AUC against the mean" in text
    assert "0.255 worse than pooled" in text
    loss = fmean([0.938, 0.911, 0.874, 0.823]) - 0.7003
    assert f"the hospitals lose {loss:.3f} on average" in text
    assert "privacy costs −0.237 at ε = 8" in text


def test_less_is_better_for_distances_and_losses(segmentation: StudyResults) -> None:
    segmentation.primary = "hd95"
    text = headline(segmentation)
    assert "Federation bought +4.01 HD95 in mm" in text and "0.18 worse than pooled" in text
    assert gain(1.0, 3.0, "hd95") == 2.0 and gain(1.0, 3.0, "dice") == -2.0
    assert best([3.0, None, 1.0], "loss") == 1.0 and best([3.0, None, 1.0], "auc") == 3.0


def test_the_headline_compares_only_with_what_was_trained(classification: StudyResults) -> None:
    arms = classification.arms
    classification.arms = [arm for arm in arms if arm.kind == "federated"]
    assert headline(classification).startswith(
        "The federated model reached 0.938 (St. Anne) to 0.962 (Hill) AUC at the hospitals, 0.951 "
        "on all test patients together. Patient-level"
    )
    classification.arms = [arm for arm in arms if arm.kind != "alone"]
    assert headline(classification).startswith(
        "Federation reached 0.951 AUC, 0.004 worse than pooled data."
    )
    classification.arms = [arm for arm in arms if arm.epsilon == 3 or arm.kind == "alone"]
    assert headline(classification).startswith("Federation at ε = 3 bought +0.070 AUC")
    classification.arms = []
    assert headline(classification) == "No federated model was finished."


def test_level_is_called_level(classification: StudyResults) -> None:
    pooled = next(arm for arm in classification.arms if arm.kind == "pooled")
    assert pooled.test is not None
    pooled.test.pooled["auc"] = 0.9512
    assert "level with pooled data" in headline(classification)


def test_home_gains_are_compared_site_by_site(classification: StudyResults) -> None:
    # Without the weakest hospital's arm, only the three others are compared.
    classification.arms = [arm for arm in classification.arms if arm.site != "Hill"]
    expected = fmean([0.957 - 0.938, 0.947 - 0.911, 0.938 - 0.874])
    assert f"gain {expected:.3f} on average" in headline(classification)


def test_the_terminal_table_has_the_figures(classification: StudyResults) -> None:
    lines = [line.split("│") for line in _text(classification).splitlines() if "│" in line]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}
    assert rows["federated, ε = 8"] == ["0.937", "0.937", "8", "52.4 s"]
    assert rows["alone: Hill"] == ["0.823", "0.781", "–", "13.1 s"]
    assert rows["hospitals alone, mean"] == ["0.886", "0.851", "–", "52.4 s"]
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
    [(0, "0.00 s"), (0.994, "0.99 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"),
     (245.4, "4 min 05 s"), (3599.7, "1 h 00 min"), (7384, "2 h 03 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (12_345, "12.3 kB"), (4.5678e6, "4.57 MB"), (2e9, "2000.00 MB"),
     (1.5e10, "15.00 GB")],
)  # fmt: skip
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
