"""Maps and what they are worth, each against a computation that shares nothing with it."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import auc, roc_auc_score
from torch.nn import functional as F

from fedward.errors import PlanError
from fedward.models import build_model
from fedward.plan.load import plan_from
from fedward_client.explain.maps import METHODS, Explained, entropy, mirrored, scaled
from fedward_client.explain.trust import (
    deletion_and_insertion,
    likeness,
    points_at,
    randomised,
    tells_wrong,
)

RNG = np.random.default_rng


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(RNG(seed).random((1, 1, *shape), dtype=np.float32))


def log_odds(network: torch.nn.Module, images: torch.Tensor, number: int) -> torch.Tensor:
    chosen = network(images).softmax(1)[:, number]
    return (chosen / (1 - chosen)).log()


@pytest.mark.parametrize("shape", [(16, 16), (12, 12, 12)])
def test_integrated_gradients_sum_up_to_what_the_image_changes(make_plan: Any, shape: Any) -> None:
    """The axiom of completeness, from the blurred image on."""
    plan = make_plan("classification", shape, "any")
    network, pixels = build_model(plan, 3).eval(), image(*shape)
    network[-1].weight.data *= 5  # type: ignore[operator]  # as sure as a trained one
    found = Explained(plan, network, "integrated-gradients")(pixels, 1)
    blurred = ndimage.gaussian_filter(pixels[0, 0].numpy(), [side / 20 for side in shape])
    with torch.no_grad():
        ends = [
            log_odds(network, one.reshape(1, 1, *shape), 1).item()
            for one in (pixels, torch.from_numpy(blurred))
        ]
    assert abs(ends[0] - ends[1]) > 0.02
    assert found.sum() == pytest.approx(ends[0] - ends[1], rel=0.02, abs=0.002)


def test_grad_cam_weighs_the_last_feature_map(make_plan: Any) -> None:
    """By hand: the network cut behind its last level, where maps have places."""
    plan = make_plan("classification", (16, 16), "any")
    network, pixels = build_model(plan, 3).eval(), image(16, 16)
    layers = list(network.children())
    made = torch.nn.Sequential(*layers[:3])(pixels).detach().requires_grad_(True)
    score = log_odds(torch.nn.Sequential(*layers[3:]), made, 0).sum()
    (slope,) = torch.autograd.grad(score, made)
    weights = slope.mean(dim=(2, 3), keepdim=True)
    expected = F.interpolate(
        (weights * made).sum(1, keepdim=True).relu(), (16, 16), mode="bilinear"
    )[0, 0]
    found = Explained(plan, network, "grad-cam")(pixels, 0)
    assert found.max() > 0
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)


def test_occlusion_is_how_far_the_answer_falls(make_plan: Any) -> None:
    """An eighth of a side is one pixel here: each is covered by itself."""
    plan = make_plan("classification", (8, 8), "any")
    network, pixels = build_model(plan, 3).eval(), image(8, 8)
    found = Explained(plan, network, "occlusion")(pixels, 1)
    for row, column in product(range(8), range(8)):
        covered = pixels.clone()
        covered[0, 0, row, column] = pixels.mean()
        with torch.no_grad():
            fall = log_odds(network, pixels, 1) - log_odds(network, covered, 1)
        assert found[row, column] == pytest.approx(fall.item(), abs=1e-5)


def test_a_network_without_a_feature_map_is_refused_for_grad_cam(make_plan: Any) -> None:
    plan = make_plan("classification", (16, 16), "any")
    content = plan.model_dump(exclude_defaults=True) | {
        "model": {"name": "vit", "channels": [8, 16]}
    }

    plan = plan_from(content)
    network = build_model(plan, 3).eval()
    for method in METHODS:
        if "cam" in method:
            with pytest.raises(PlanError, match="needs a feature map, which vit has not"):
                Explained(plan, network, method)
        else:
            assert Explained(plan, network, method)(image(16, 16), 1).shape == (16, 16)


def test_mirrored_answers_that_differ_are_unsure() -> None:
    """A model that looks at the place as well: its answers to mirror images differ."""
    rng = RNG(0)
    slope = rng.random((3, 4, 6))

    def answer(images: torch.Tensor) -> np.ndarray:
        raw = slope * images[0, 0].numpy()
        return np.exp(raw) / np.exp(raw).sum(axis=0)

    pixels = image(4, 6)
    found, marked = mirrored(answer, pixels)
    mean = np.zeros((3, 4, 6))
    expected = np.zeros((4, 6), bool)
    for down, across in product((1, -1), (1, -1)):
        mirror = pixels[0, 0].numpy()[::down, ::across].copy()
        back = answer(torch.from_numpy(mirror)[None, None])[:, ::down, ::across]
        mean += back / 4
        expected |= back.argmax(0) > 0
    np.testing.assert_allclose(found, -(mean * np.log(mean)).sum(0) / np.log(3), atol=1e-6)
    np.testing.assert_array_equal(marked, expected)
    assert entropy(np.full((3, 1), 1 / 3)) == pytest.approx(1)
    assert entropy(np.array([[1.0], [0.0]])) == pytest.approx(0)


def test_what_is_shown_lies_between_0_and_1() -> None:
    shown = scaled(np.linspace(-1, 2, 1000, dtype=np.float32))
    assert shown.min() == 0 and shown.max() == 1 and np.count_nonzero(shown == 1) == 5
    assert not scaled(np.full((4, 4), -1.0, np.float32)).any()


def test_deletion_and_insertion_are_areas_under_their_curves() -> None:
    """A model whose probability is the mean of the left half: by hand, pixel by pixel."""
    pixels, found = image(4, 6), RNG(1).random((4, 6)).astype(np.float32)
    flat, order = pixels[0, 0].numpy().ravel(), np.argsort(-found.ravel())
    left = np.tile([1.0, 1, 1, 0, 0, 0], 4) / 12

    def probability(images: torch.Tensor) -> np.ndarray:
        return images.reshape(len(images), -1).double().numpy() @ left

    blurred = ndimage.gaussian_filter(pixels[0, 0].numpy(), (4 / 20, 6 / 20)).ravel()
    curves: list[list[float]] = [[], []]
    for count in range(0, 25, 4):
        gone, come = flat.copy(), blurred.copy()
        gone[order[:count]] = flat.mean()
        come[order[:count]] = flat[order[:count]]
        curves[0].append(float(gone @ left))
        curves[1].append(float(come @ left))
    expected = [auc(np.linspace(0, 1, 7), curve) for curve in curves]
    assert deletion_and_insertion(probability, pixels, found, 6) == pytest.approx(expected)


def test_the_pointing_game_is_won_inside() -> None:
    found = np.array([[0.0, 3.0], [-5.0, 1.0]], np.float32)
    inside = np.array([[False, True], [True, False]])
    assert points_at(found, inside) == (True, 0.75)
    assert points_at(found, ~inside) == (False, 0.25)
    assert points_at(-np.abs(found), inside)[1] == 0.0


def test_likeness_is_the_correlation_of_ranks() -> None:
    one, other = RNG(0).random((2, 5, 6))
    ranks = [np.argsort(np.argsort(each.ravel())) for each in (one, other)]
    assert likeness(one, other) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert likeness(one, one**3) == pytest.approx(1)
    assert likeness(one, np.ones_like(one)) is None


def test_uncertainty_that_tells_wrong_pixels_is_an_auc() -> None:
    unsure = np.round(RNG(0).random((8, 9)), 1).astype(np.float32)  # with ties
    wrong = RNG(1).random((8, 9)) < unsure
    expected = roc_auc_score(wrong.ravel(), unsure.ravel())
    assert tells_wrong(unsure, wrong) == pytest.approx(expected)
    assert tells_wrong(unsure, np.zeros_like(wrong)) is None


def test_a_randomised_network_keeps_what_it_is_told_to(make_plan: Any) -> None:
    plan = make_plan("classification", (16, 16), "any")
    network = build_model(plan, 3).eval()
    mine = network.state_dict()
    for alone in (True, False):
        other = randomised(plan, network, head_alone=alone).state_dict()
        changed = {name for name, value in other.items() if not torch.equal(value, mine[name])}
        weights = {name for name in mine if name.endswith("conv.weight") or name == "fc.weight"}
        assert changed - {"fc.bias"} == ({"fc.weight"} if alone else weights)
