from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedward.plan import parse_plan, plan_from, plan_hash
from fedward.plan.explain import count, explain
from fedward.strategies import STRATEGIES, Setting

Change = Callable[[str, dict[str, Any]], dict[str, Any]]


def _joined(text: str) -> str:
    return " ".join(text.split())


def test_a_classification_plan_is_told_in_words(classification: str) -> None:
    plan = parse_plan(classification)
    text = _joined(explain(plan, 24_001))
    for words in (
        "chest",
        "to tell 2 classes apart on 2D images: normal, pneumonia; pneumonia is the positive one",
        "10% serve validation, 20% the test",
        "stretched to 32 × 32",
        "24,001 parameters",
        "3 rounds, learning rate 0.001",
        "1 pass over its training images in a round, in batches of 32",
        "fedavg",
        "0.096 MB each way",
        "none: updates are exchanged as they are",
        "starts with 2 sites",
        "a round counts with 1 update, waits at most 3600 s",
        plan_hash(plan),
    ):
        assert words in text


def test_a_private_plan_says_what_epsilon_covers(segmentation: str) -> None:
    text = _joined(explain(parse_plan(segmentation)))
    for words in (
        "to outline 1 class in 2D images: lung",
        "10 steps in a round; a step draws each patient with chance 0.1, 1 image of each",
        "(ε = 8, δ = 0.0001)",
        "clipped to 1 ",
        "Evaluations have an ε of their own, 4, about validation and test patients",
    ):
        assert words in text
    assert "parameters;" not in text


def test_a_centring_plan_tells_of_its_first_round(classification: str, change: Change) -> None:
    plan = plan_from(change(classification, {"model.feature_centering": True}))
    text = _joined(explain(plan))
    assert plan.rounds == 4 and "Runs 3 rounds, learning rate 0.001" in text
    assert "first a round without training: each site measures the mean of its features" in text
    assert "the mean is exact" in text
    private = {"mechanism": "dp-sgd", "epsilon": 3.0, "delta": 1e-3, "clipping_norm": 1.0}
    for steps, words in ((None, "it takes 4 private steps"), (9, "it takes 9 private steps")):
        privacy = {**private, "centering_steps": steps} if steps else private
        told = change(classification, {"model.feature_centering": True, "privacy": privacy})
        text = _joined(explain(plan_from(told)))
        assert f"{words}, with the noise of the others and inside the same ε" in text
        assert "Needs plan schema 2 at every site: model.feature_centering" in text


def test_without_a_sampling_rate_the_chance_is_told_as_a_share(
    segmentation: str, change: Change
) -> None:
    plan = plan_from(
        change(
            segmentation,
            {
                "privacy.sampling_rate": None,
                "training.local_steps": None,
                "training.local_epochs": 2,
            },
        )
    )
    text = _joined(explain(plan))
    assert "2 passes over its patients in a round" in text
    assert "with chance 32 / its training patients" in text


def test_stages_weights_and_settings_are_told(classification: str, change: Change) -> None:
    stage = {"name": "head", "rounds": 1, "learning_rate": 0.5, "train": ["head.*"]}
    plan = plan_from(
        change(
            classification,
            {
                "training.rounds": None,
                "training.learning_rate": None,
                "stages": [stage, {**stage, "name": "all", "train": ["*"]}],
                "model.initial_weights": {"file": "w.pth", "sha256": "ab" * 32},
                "strategy.name": "fedprox",
                "strategy.settings.mu": 0.1,
                "preprocessing.augmentation": {"flip": ["horizontal"], "rotate": 10},
                "preprocessing.percentiles": [1, 99],
            },
        )
    )
    text = _joined(explain(plan))
    for words in (
        "2 rounds in 2 stages",
        "head: 1 round, learning rate 0.5, falling along a cosine; trains head.*",
        "all: 1 round, learning rate 0.5, falling along a cosine; all parameters train",
        "SHA-256 abababababab…",
        "(mu = 0.1)",
        "mirrored (horizontal), turned by up to 10°",
        "percentiles 1 to 99",
    ):
        assert words in text


def test_how_the_rate_moves_and_where_gradients_end_is_told(
    classification: str, change: Change
) -> None:
    more = {"schedule": "polynomial", "warmup_rounds": 2, "gradient_clipping": 12.0}
    changes = {f"training.{key}": value for key, value in more.items()}
    text = _joined(explain(plan_from(change(classification, changes))))
    assert "learning rate 0.001, falling as (1 − t)^0.9, after rising for 2 rounds" in text
    assert "adamw on cross_entropy, gradients clipped to 12" in text


def test_a_table_beside_the_images_is_told(classification: str, change: Change) -> None:
    age = {"name": "age", "kind": "number", "range": [0, 100], "unit": "years", "missing": True}
    sex = {"name": "sex", "kind": "category", "values": ["f", "m"]}
    text = " ".join(
        explain(plan_from(change(classification, {"table": {"column": [age, sex]}}))).split()
    )
    assert (
        "beside each image from the site's table: age (0 to 100 years, may be missing); sex (one "
        "of f, m); the last layer reads these with the image's features."
    ) in text
    assert "plan schema 2 at every site: table" in text
    hidden = explain(plan_from(change(classification, {"table": {"column": [age], "hidden": 8}})))
    assert "a layer of 8 with a ReLU reads" in " ".join(hidden.split())


def test_named_channels_are_told(segmentation: str, change: Change) -> None:
    channels = [{"name": "pet", "window": [0, 10]}, {"name": "ct", "missing": "drop"}]
    changes = {
        "preprocessing.channels": 2,
        "preprocessing.channel": channels,
        "preprocessing.augmentation.drop_channel": 0.2,
    }
    text = " ".join(explain(plan_from(change(segmentation, changes))).split())
    assert (
        "channels pet from 0 to 10 (images without it are left out), ct (zeros where it is "
        "missing), each scaled by itself"
    ) in text
    assert "each channel dropped with a chance of 20%" in text


def test_patches_and_their_cost_are_told(segmentation: str, change: Change) -> None:
    patch = {"per_image": 2, "flips": ["vertical", "horizontal"], "overlap": 0.25}
    changes = {"preprocessing.patch": patch, "preprocessing.spacing": [1.5, 1.5]}
    text = _joined(explain(plan_from(change(segmentation, changes))))
    for words in (
        "resampled to 1.5 × 1.5 mm, each at its own size",
        "2 random patches of 64 × 64 (0.0164 MB) of each image in a step, 33% of them about",
        "overlap by 25%, each also mirrored (vertical, horizontal)",
        "about 7.11 times the work",  # 4 ways / 0.75²
        "plan schema 2 at every site: preprocessing.patch",
    ):
        assert words in text, words
    plain = _joined(explain(plan_from(change(segmentation, {"preprocessing.patch": {}}))))
    assert "on the grid that they have, each at its own size" in plain


def test_compression_and_its_bytes_are_told(classification: str, change: Change) -> None:
    topk = {"compression": {"method": "top-k", "share": 0.01}}
    text = _joined(explain(plan_from(change(classification, topk)), 1_000_000, (60_000, 4_000_000)))
    for words in (
        "Compresses what a site sends of an update: top-k (only the numbers of the largest",
        "0.01 of all; a site keeps what this leaves out and adds it to its next update",
        "a site sends at most 60,000 bytes and receives at most 4,000,000; what does not train",
        "plan schema 2 at every site: compression",
    ):
        assert words in text, text
    assert "each way" not in text and "costs no ε" not in text
    private = {
        "compression": {
            "method": "int4",
            "rounding": "stochastic",
            "error_feedback": False,
            "download": "int8",
        },
        "privacy": {"mechanism": "dp-sgd", "epsilon": 3.0, "delta": 1e-4, "clipping_norm": 1.0},
    }
    text = _joined(explain(plan_from(change(classification, private))))
    assert (
        "rounded up and down by chance; what this leaves out is lost; the model travels to" in text
    )
    assert "training as int8. All of it has its" in text
    assert "noise before, so that compression costs no ε" in text


def test_a_plan_says_which_schema_it_needs(
    classification: str, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRATEGIES["fedprox"].settings, "mu", Setting("", since=2))
    assert "plan schema" not in explain(plan_from(change(classification, {})))
    mu = {"strategy.name": "fedprox", "strategy.settings.mu": 0.1}
    text = _joined(explain(plan_from(change(classification, mu))))
    assert "plan schema 2 at every site: strategy.settings.mu" in text


@pytest.mark.parametrize("base", ["classification", "segmentation"])
def test_lines_are_plain_and_short(base: str, request: pytest.FixtureRequest) -> None:
    text = explain(parse_plan(request.getfixturevalue(base)), 1_000_000)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "[/" not in text and "\x1b" not in text and "None" not in text


def test_counts_agree_with_their_words() -> None:
    assert [count(1, "class"), count(2, "class"), count(1000, "pass"), count(0, "site")] == [
        "1 class",
        "2 classes",
        "1,000 passes",
        "0 sites",
    ]
