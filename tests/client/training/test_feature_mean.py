"""The mean of a site's features: bounded by patient, with the noise of a step, released once."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import CLASSIFIERS, least, sections
from torch import Tensor

from fedward.dp.accounting import Mechanism, calibrate
from fedward.dp.gaussian import SLACK, GaussianNoise
from fedward.dp.keystream import Keystream, derive_key
from fedward.errors import PrivacyError
from fedward.models import build_model, from_arrays, to_arrays
from fedward.models.centering import FEATURE_LENGTH, with_centering
from fedward.models.prefix import steps_of
from fedward.plan import Plan, plan_from
from fedward.plan.schema import FEATURE_MEAN
from fedward_client.egress.gate import Gate, expected_arrays
from fedward_client.policy.decide import DatasetFacts
from fedward_client.policy.settings import Limits
from fedward_client.training.batches import PatientSampler
from fedward_client.training.feature_mean import clipped_sum, private_mean
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

Make = Callable[..., Any]
PRIVATE = {
    "mechanism": "dp-sgd",
    "epsilon": 8.0,
    "delta": 1e-3,
    "clipping_norm": 1.0,
    "centering_steps": 3,
}
HEAD = {
    "model": {"feature_centering": True},
    "training": {"rounds": None, "learning_rate": None},
    "stages": [{"name": "head", "rounds": 2, "learning_rate": 0.5, "train": ["fc.*"]}],
}
SEEDED = Runtime(randomness="seeded")


@pytest.fixture
def plan(make_plan: Make) -> Plan:
    made: Plan = make_plan(**HEAD, privacy=PRIVATE)
    return made


def hostile() -> list[list[float]]:
    big = 3e38
    return [
        [0.0] * 4,
        [big] * 4,
        [big, -big, big, 1.0],
        [1e-45, 0.0, 0.0, 0.0],
        [math.inf, 1.0, 1.0, 1.0],
        [math.nan] * 4,
        [1e5, 1.0, -1.0, 3.0],
    ]


@pytest.mark.parametrize("vector", hostile())
def test_one_patient_moves_the_sum_by_the_length_of_features_at_most(vector: list[float]) -> None:
    others = torch.randn(20, 4, dtype=torch.float64)
    without = clipped_sum(others)
    moved = clipped_sum(torch.cat([others, torch.tensor([vector], dtype=torch.float64)])) - without
    assert float(moved.norm()) <= FEATURE_LENGTH * (1 + 1e-9)
    assert torch.isfinite(moved).all()


def test_forty_images_weigh_as_one_patient() -> None:
    """Also before any clipping: what is summed are the patients' means of normalised features."""
    features = torch.nn.functional.normalize(torch.rand(42, 8) + 1, dim=1) * 1e4
    indices, owners = np.arange(42), np.array([0] * 40 + [1, 2])
    sampler = PatientSampler(indices, owners, 1.0, 64)
    none = Mechanism(0.0, 1.0, 1)
    keys = Keystream(derive_key("who")), GaussianNoise(derive_key("noise"))
    mean = private_mean(lambda i: features[torch.from_numpy(i)], sampler, none, 1, *keys)
    unit = features.double() / features.double().norm(dim=1, keepdim=True) * FEATURE_LENGTH
    expected = torch.stack([unit[:40].mean(0), unit[40], unit[41]]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_noise_is_that_of_so_many_training_steps(steps: int) -> None:
    width, people, noise = 20_000, 50, 2.5
    features = torch.zeros(people, width)
    sampler = PatientSampler(np.arange(people), np.arange(people), 0.3, 1)
    keys = Keystream(derive_key("who")), GaussianNoise(derive_key("noise"))
    mean = private_mean(
        lambda i: features[torch.from_numpy(i)], sampler, Mechanism(noise, 0.3, 99), steps, *keys
    )
    expected = noise * FEATURE_LENGTH * (1 + SLACK) / (0.3 * people) / math.sqrt(steps)
    assert float(mean.std()) == pytest.approx(expected, rel=0.02)


def test_where_nobody_is_drawn_there_is_noise_alone() -> None:
    sampler = PatientSampler(np.arange(3), np.arange(3), 1e-12, 1)
    keys = Keystream(derive_key("who")), GaussianNoise(derive_key("noise"))
    ran = Mechanism(1.0, 1e-12, 1)
    mean = private_mean(lambda i: torch.ones(len(i), 5), sampler, ran, 1, *keys)
    assert (mean.abs() > 0).all()


def features_of(plan: Plan, arrays: dict[str, Any], images: Any) -> Tensor:
    model = build_model(plan, 0)
    from_arrays(model, arrays)
    x = torch.from_numpy(images)
    with torch.no_grad():
        for name, block in steps_of(model.eval()):
            if name == "feature_centering":
                return x
            x = block(x)
    raise AssertionError("there is no such block")


@pytest.mark.parametrize("strategy", [{}, {"name": "fedprox", "settings": {"mu": 0.1}}])
def test_without_privacy_it_is_the_mean_over_patients(
    make_plan: Make, make_site: Make, make_order: Make, strategy: dict[str, Any]
) -> None:
    plan = make_plan(**HEAD, strategy=strategy)
    site = make_site(images_per_patient=3)
    arrays = to_arrays(build_model(plan, 0))
    update, outcome = Trainer(plan, site, SEEDED).train(arrays, make_order(plan, 1))
    train = site.split["train"]
    rows = features_of(plan, arrays, site.images[train]).double()
    rows = rows / rows.norm(dim=1, keepdim=True) * FEATURE_LENGTH
    people = site.patients[train]
    each = [rows[torch.from_numpy(people == one)].mean(0) for one in np.unique(people)]
    assert list(update) == [FEATURE_MEAN]
    np.testing.assert_allclose(update[FEATURE_MEAN], torch.stack(each).mean(0), atol=1e-5)
    assert (outcome.steps, outcome.loss, outcome.epsilon) == (1, None, None)


def test_with_privacy_it_has_its_share_of_the_steps_and_is_released_once(
    plan: Plan, make_site: Make, make_order: Make, tmp_path: Path
) -> None:
    site = make_site(patients=200)
    trainer, arrays = Trainer(plan, site, SEEDED), to_arrays(build_model(plan, 0))
    update, outcome = trainer.train(arrays, make_order(plan, 1, seed=1))
    whole = calibrate(plan, site.patients_in("train"))
    each = math.ceil(1 / whole.sampling_rate)
    assert (outcome.steps, whole.steps) == (3, 3 + 2 * each)
    assert outcome.noise_multiplier == whole.noise_multiplier
    again, _ = trainer.train(arrays, make_order(plan, 1, seed=2))
    np.testing.assert_array_equal(again[FEATURE_MEAN], update[FEATURE_MEAN])
    facts = DatasetFacts(200, 200, {"no": 100, "yes": 100})
    gate = Gate(plan, Limits(), site=site.name, facts=facts, max_upload_mib=1.0)
    gate.check_update(update, expected_arrays(plan, 1), outcome, 1)
    trained, later = trainer.train(arrays | update, make_order(plan, 2))
    assert list(trained) == ["fc.weight", "fc.bias"]
    assert outcome.epsilon is not None and later.epsilon is not None
    assert outcome.epsilon < later.epsilon < 8.0
    gate.check_update(trained, expected_arrays(plan, 2), later, 2)
    with pytest.raises(PrivacyError):
        trainer.train(arrays, make_order(plan, 1))


def test_the_images_pass_the_frozen_layers_once(
    plan: Plan, make_site: Make, make_order: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedward_client.training.source import Source

    made: list[int] = []
    compute = Source._compute
    monkeypatch.setattr(Source, "_compute", lambda self: made.append(1) or compute(self))
    runtime = Runtime(randomness="seeded", cache=tmp_path)
    trainer, arrays = Trainer(plan, make_site(), runtime), to_arrays(build_model(plan, 0))
    for round_ in (1, 2, 3):
        arrays |= trainer.train(arrays, make_order(plan, round_))[0]
    assert made == [1]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_reads_centred_features_under_its_own_names(
    name: str,
) -> None:
    plain = plan_from(sections(name, **least(name)))
    model = build_model(plain, 0).eval()
    names = set(model.state_dict())
    centred = with_centering(build_model(plain, 0)).eval()
    assert set(centred.state_dict()) - names == {FEATURE_MEAN}
    assert names <= set(centred.state_dict())
    assert {n for n, _ in centred.named_parameters()} == {n for n, _ in model.named_parameters()}
    size = (3, plain.preprocessing.channels, *plain.preprocessing.size)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    *before, (path, layer), (_, head) = steps_of(centred)
    assert path == "feature_centering"
    with torch.no_grad():
        features = x
        for _, block in before:
            features = block(features)
        torch.testing.assert_close(head(features), model(x))
        layer.get_buffer("mean").copy_(features.mean(0))
        out = layer(features)
        torch.testing.assert_close(out.norm(dim=1), torch.full((3,), FEATURE_LENGTH))
        torch.testing.assert_close(head(out), centred(x))
