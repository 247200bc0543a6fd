"""A classifier's figures against scikit-learn, and the adding up of counts."""

from __future__ import annotations

import warnings
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sk

from fedward.errors import DataError, ModelError, PlanError, ProtocolError
from fedward.plan.schema import MetricName, Task
from fedward.tasks.classification import BINS, CLASSIFICATION, ClassificationCounts, bin_of
from fedward.tasks.registry import counts_from_arrays

NAMES: tuple[MetricName, ...] = (
    "auc",
    "accuracy",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "f1",
    "precision",
    "ece",
    "loss",
)
Scores = tuple[NDArray[Any], NDArray[Any]]


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    p: NDArray[Any] = e / e.sum(axis=1, keepdims=True)
    return p


def single(n: int, k: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Scores:
    random = np.random.default_rng(seed)
    targets = random.integers(0, k, n)
    logits = random.normal(size=(n, k)) + 1.2 * np.eye(k)[targets]
    logits[:, -1] += shift
    return softmax(scale * logits).astype(np.float32), targets


def multi(n: int, k: int, seed: int) -> Scores:
    random = np.random.default_rng(seed)
    flags = (random.random((n, k)) < 0.3).astype(np.int64)
    return 1 / (1 + np.exp(-random.normal(2 * flags - 1.5, 1.0))), flags


def figures(scores: Scores) -> dict[str, float | None]:
    return ClassificationCounts.from_scores(*scores).figures(NAMES)


def ece(p: NDArray[Any], right: NDArray[Any], confidence: NDArray[Any]) -> float:
    """Straight from the definition, bin by bin."""
    total = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & ((confidence < (low + 1) / 15) | (low == 14))
        if inside.any():
            total += abs(confidence[inside].mean() - right[inside].mean()) * inside.sum()
    return total / len(right)


@pytest.mark.parametrize("scale", [0.03, 0.1, 1, 4, 10])
@pytest.mark.parametrize("shift", [-4.0, 0.0, 2.0])
@pytest.mark.parametrize("n", [500, 4000])
def test_auc_agrees_with_the_exact_one(n: int, scale: float, shift: float) -> None:
    p, targets = single(n, 2, seed=int(scale * 100) + n, scale=scale, shift=shift)
    exact = sk.roc_auc_score(targets, p[:, 1])
    assert figures((p, targets))["auc"] == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize("k", [3, 9])
def test_auc_of_more_classes_is_macro_one_against_the_rest(k: int) -> None:
    p, targets = single(1500, k, seed=k, scale=2)
    p = p.astype(np.float64)
    p /= p.sum(axis=1, keepdims=True)
    exact = sk.roc_auc_score(targets, p, multi_class="ovr", average="macro")
    assert figures((p, targets))["auc"] == pytest.approx(exact, abs=2e-3)


def test_auc_of_equal_scores_is_one_half() -> None:
    assert figures((np.full((20, 2), 0.5), np.arange(20) % 2))["auc"] == 0.5


def test_bins_never_fall_as_probability_rises() -> None:
    p = np.concatenate([[0.0], np.logspace(-40, -0.001, 5000), 1 - np.logspace(-1, -16), [1.0]])
    bins = bin_of(np.sort(p))
    assert (np.diff(bins) >= 0).all()
    assert (bins[0], bins[-1]) == (0, BINS - 1)


@pytest.mark.parametrize("scores", [single(700, 2, 1), single(700, 5, 2)], ids=["two", "five"])
def test_figures_agree_with_scikit_learn(scores: Scores) -> None:
    p, targets = scores
    k, answer = p.shape[1], p.argmax(axis=1)
    average: dict[str, Any] = {"average": "binary"} if k == 2 else {"average": "macro"}
    found = figures(scores)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(targets, answer))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(targets, answer))
    assert found["sensitivity"] == pytest.approx(sk.recall_score(targets, answer, **average))
    assert found["f1"] == pytest.approx(sk.f1_score(targets, answer, **average))
    assert found["precision"] == pytest.approx(sk.precision_score(targets, answer, **average))
    assert found["loss"] == pytest.approx(-np.log(p[np.arange(700), targets]).mean())
    assert found["ece"] == pytest.approx(ece(p, answer == targets, p.max(axis=1)), abs=1e-6)
    by_class = sk.multilabel_confusion_matrix(targets, answer)
    specificity = by_class[:, 0, 0] / by_class[:, 0].sum(axis=1)
    wanted = specificity[-1] if k == 2 else specificity.mean()
    assert found["specificity"] == pytest.approx(wanted)


def test_multi_label_figures_agree_with_scikit_learn() -> None:
    p, flags = multi(900, 4, seed=3)
    answer = (p >= 0.5).astype(int)
    found = figures((p, flags))
    assert found["auc"] == pytest.approx(sk.roc_auc_score(flags, p, average="macro"), abs=2e-3)
    assert found["accuracy"] == pytest.approx((answer == flags).mean())
    assert found["sensitivity"] == pytest.approx(sk.recall_score(flags, answer, average="macro"))
    assert found["f1"] == pytest.approx(sk.f1_score(flags, answer, average="macro"))
    assert found["precision"] == pytest.approx(sk.precision_score(flags, answer, average="macro"))
    each = [sk.balanced_accuracy_score(flags[:, c], answer[:, c]) for c in range(4)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(each))
    losses = [sk.log_loss(flags[:, c], p[:, c]) for c in range(4)]
    assert found["loss"] == pytest.approx(np.mean(losses))
    confidence = np.maximum(p, 1 - p).ravel()
    assert found["ece"] == pytest.approx(ece(p, (answer == flags).ravel(), confidence))


@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    kind=st.sampled_from(["two", "four", "multi"]),
)
@settings(max_examples=60, deadline=None)
def test_parts_add_up_to_the_whole(seed: int, cuts: list[int], kind: str) -> None:
    p, targets = (
        multi(40, 3, seed) if kind == "multi" else single(40, 2 if kind == "two" else 4, seed)
    )
    order = np.random.default_rng(seed).permutation(40)
    parts = np.split(order, sorted(cuts))
    counts = [ClassificationCounts.from_scores(p[part], targets[part]) for part in parts]
    merged = reduce(add, counts).figures(NAMES)
    for name, value in figures((p, targets)).items():
        assert merged[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name


def test_pooled_auc_is_not_the_mean_of_the_sites() -> None:
    # Each site ranks perfectly, but on another scale: pooled, the ranking is far from perfect.
    low = (np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))
    high = (np.array([[0.3, 0.7], [0.2, 0.8]]), np.array([0, 1]))
    pooled = ClassificationCounts.from_scores(*low) + ClassificationCounts.from_scores(*high)
    assert figures(low)["auc"] == figures(high)["auc"] == 1.0
    assert pooled.figures(["auc"])["auc"] == 0.75


def test_given_losses_are_the_loss() -> None:
    p, targets = single(3, 2, 0)
    counts = ClassificationCounts.from_scores(p, targets, np.array([1.0, 2.0, 6.0]))
    assert counts.figures(["loss"]) == {"loss": 3.0}


def test_no_images_define_nothing() -> None:
    nothing = (np.zeros((0, 2)), np.zeros(0, np.int64))
    assert set(figures(nothing).values()) == {None}


def test_one_class_alone_defines_no_auc() -> None:
    p, _ = single(10, 2, 0)
    found = figures((p, np.ones(10, np.int64)))
    assert found["auc"] is found["balanced_accuracy"] is found["specificity"] is None
    assert found["sensitivity"] is not None


def test_a_class_that_never_occurs_is_left_out() -> None:
    p, targets = single(400, 3, 5)
    targets = targets % 2
    areas = [sk.roc_auc_score(targets == c, p[:, c]) for c in (0, 1)]
    assert figures((p, targets))["auc"] == pytest.approx(np.mean(areas), abs=2e-3)


@pytest.mark.parametrize("scores", [single(50, 3, 1), multi(50, 3, 1)], ids=["single", "multi"])
def test_arrays_come_back_as_the_same_counts(scores: Scores) -> None:
    counts = ClassificationCounts.from_scores(*scores)
    back = ClassificationCounts.from_arrays(counts.to_arrays())
    assert back.figures(NAMES) == counts.figures(NAMES)
    assert (back.images, back.classes, back.multi_label) == (50, 3, scores[1].ndim == 2)


def changed(name: str, place: Any, value: float) -> dict[str, NDArray[Any]]:
    arrays = ClassificationCounts.from_scores(*single(50, 3, 1)).to_arrays()
    array = arrays[name].astype(np.float64)
    array[place] = value
    return {**arrays, name: array}


@pytest.mark.parametrize("name", ["scores", "confusion", "calibration", "loss"])
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 1e300])
def test_impossible_values_are_refused(name: str, value: float) -> None:
    array = changed(name, ..., value)
    with pytest.raises(ProtocolError, match="finite and not negative"):
        ClassificationCounts.from_arrays(array)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("scores", (0, 0, 0), 0.5),
        ("scores", (0, 0, 0), 7),
        ("confusion", (0, 0), 49),
        ("calibration", (0, 0), 9),
        ("calibration", (1, 14), 1e6),
        ("calibration", (2, 14), 1e6),
        ("loss", 1, 51),
        ("loss", 1, 49.5),
    ],
)
def test_counts_that_contradict_each_other_are_refused(name: str, place: Any, value: float) -> None:
    with pytest.raises(ProtocolError):
        ClassificationCounts.from_arrays(changed(name, place, value))


@given(name=st.sampled_from(["scores", "confusion", "calibration", "loss"]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_wrong_arrays_never_pass(name: str, data: st.DataObject) -> None:
    arrays = ClassificationCounts.from_scores(*single(20, 3, 1)).to_arrays()
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    wrong = data.draw(
        st.sampled_from(
            [np.zeros(shape), np.zeros(shape, object), np.zeros(shape, "U3"), [1], None]
        )
    )
    # Nothing at all in the right shape is a part that a site withholds.
    assume(getattr(wrong, "shape", None) != arrays[name].shape or wrong.dtype.kind != "f")
    with pytest.raises(ProtocolError):
        ClassificationCounts.from_arrays({**arrays, name: wrong})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("scores", {"auc"}),
        ("confusion", {"balanced_accuracy", "sensitivity", "specificity", "f1", "precision"}),
        ("calibration", {"accuracy", "ece"}),
        ("loss", {"loss"}),
    ],
)
def test_a_part_that_is_withheld_costs_its_figures_alone(name: str, gone: set[str]) -> None:
    whole = ClassificationCounts.from_scores(*single(40, 3, 1))
    arrays = whole.to_arrays()
    made = ClassificationCounts.from_arrays({**arrays, name: np.zeros_like(arrays[name])})
    assert made.images == 40
    known = whole.figures(CLASSIFICATION.metric_names)
    for figure, value in made.figures(CLASSIFICATION.metric_names).items():
        assert value == (None if figure in gone else known[figure])
    both = made + whole
    assert both.figures(tuple(gone)) == whole.figures(tuple(gone))


def test_a_part_of_other_images_than_the_rest_is_refused() -> None:
    arrays = ClassificationCounts.from_scores(*single(40, 3, 1)).to_arrays()
    other = ClassificationCounts.from_scores(*single(39, 3, 1)).to_arrays()
    for name in arrays:
        with pytest.raises(ProtocolError):
            ClassificationCounts.from_arrays({**arrays, name: other[name]})
    with pytest.raises(ProtocolError):
        ClassificationCounts.from_arrays({**arrays, "loss": np.array([3.0, 0.0])})


def test_missing_and_further_arrays_are_refused() -> None:
    arrays = ClassificationCounts.from_scores(*single(20, 3, 1)).to_arrays()
    with pytest.raises(ProtocolError, match="the arrays must be"):
        ClassificationCounts.from_arrays({**arrays, "more": np.zeros(1)})
    with pytest.raises(ProtocolError, match="the arrays must be"):
        ClassificationCounts.from_arrays({"loss": arrays["loss"]})


def test_counts_of_other_tasks_do_not_mix() -> None:
    two, three, several = (
        ClassificationCounts.from_scores(*scores)
        for scores in (single(5, 2, 0), single(5, 3, 0), multi(5, 3, 0))
    )
    for other in (two, several):
        with pytest.raises(ProtocolError, match="of one task"):
            three.merge(other)
    task = Task(kind="classification", classes=("a", "b", "c"))
    assert task.spec.counts is ClassificationCounts
    assert counts_from_arrays(task, three.to_arrays()).figures(NAMES) == three.figures(NAMES)
    for other in (two, several):
        with pytest.raises(ProtocolError):
            counts_from_arrays(task, other.to_arrays())


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1.5, -0.2])
def test_scores_of_a_diverged_model_are_refused(bad: float) -> None:
    with pytest.raises(ModelError, match="probabilities must lie in 0 to 1"):
        ClassificationCounts.from_scores(np.array([[bad, 0.5]]), np.array([0]))


@pytest.mark.parametrize(
    "targets",
    [np.array([0]), np.array([0, 2]), np.array([0, -1]), np.array([0.0, 1.0]), [[0, 3]] * 2],
)
def test_targets_that_do_not_fit_are_refused(targets: Any) -> None:
    with pytest.raises(DataError):
        ClassificationCounts.from_scores(np.full((2, 2), 0.5), np.asarray(targets))


def test_a_figure_of_segmentation_is_refused() -> None:
    with pytest.raises(PlanError, match="no such metric"):
        ClassificationCounts.from_scores(*single(5, 2, 0)).figures(["dice"])


def test_counts_cannot_be_changed() -> None:
    counts = ClassificationCounts.from_scores(*single(5, 2, 0))
    with pytest.raises(ValueError, match="read-only"):
        counts.confusion[0, 0] = 3


def test_rounded_probabilities_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = ClassificationCounts.from_scores(
            np.array([[1 + 1e-7, -1e-9]], np.float32), np.array([1])
        )
    assert np.isfinite(counts.loss).all()


@pytest.mark.parametrize("least", [5, 10])
def test_merged_scores_keep_the_area_of_each_hospital_and_of_all_together(least: int) -> None:
    """The middles of merged bins once took two points of a model's errors away."""
    rng, off = np.random.default_rng(0), []
    for _ in range(20):
        hospital = rng.choice(4, 600, p=[0.4, 0.3, 0.2, 0.1])
        truth = rng.uniform(size=600) < 0.4
        score = 1 / (1 + np.exp(-rng.normal(2.0 * truth - 1.0, 1.0)))
        counts = [
            ClassificationCounts.from_scores(
                np.stack([1 - score, score], axis=1)[hospital == h],
                truth[hospital == h].astype(int),
            )
            for h in range(4)
        ]
        left = [
            ClassificationCounts.from_arrays(one.release(CLASSIFICATION.metric_names, least, 6)[0])
            for one in counts
        ]
        for exact, merged in [
            *zip(counts, left, strict=True),
            (reduce(add, counts), reduce(add, left)),
        ]:
            off.append(merged.figures(["auc"])["auc"] - exact.figures(["auc"])["auc"])  # type: ignore[operator]
    wrong = np.array(off).reshape(-1, 5)
    assert np.abs(wrong.mean(axis=0)).max() < 0.01, wrong.mean(axis=0)
    assert np.abs(wrong[:, -1]).mean() < 0.005, "all hospitals together"
