"""Canaries: planted behind a site's own images, apart from each other in what they teach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from fedward.models import build_model, to_arrays
from fedward.plan import Plan
from fedward.protocol import RoundOrder
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_simulation.audit.canaries import included, with_canaries
from fedward_simulation.audit.inversion import invert
from fedward_simulation.audit.people import People
from fedward_simulation.audit.updates import WatchedTrainer
from fedward_simulation.audit.view import SiteView


@pytest.fixture
def planted(
    make_plan: Callable[..., Plan], make_site: Callable[..., PreparedSite]
) -> tuple[Plan, PreparedSite, PreparedSite, np.ndarray]:  # type: ignore[type-arg]
    plan, site = make_plan(), make_site(images_per_patient=2)
    arrays = to_arrays(build_model(plan, 0))
    made, images = with_canaries(plan, site, 6, arrays, Runtime(), seed=3)
    return plan, site, made, images


def test_canaries_stand_behind_the_sites_own_images(planted: tuple) -> None:  # type: ignore[type-arg]
    _, site, made, images = planted
    assert images.tolist() == list(range(80, 86))
    assert (made.images[:80] == site.images).all() and len(set(made.patients[images])) == 6
    assert not set(made.patients[images]) & set(site.patients)
    assert made.split == site.split
    assert included(made, images[:2]).patients_in("train") == site.patients_in("train") + 2
    people = People.of([made], [images])
    assert people.canaries.sum() == 6 and not (people.canaries & people.trained).any()
    assert people.images_of(0, people.canaries).tolist() == images.tolist()
    assert people.trained.sum() == site.patients_in("train")


def test_gradients_are_those_of_the_losses(planted: tuple) -> None:  # type: ignore[type-arg]
    """Along a direction the loss falls as the gradient says (finite differences)."""
    plan, _, made, images = planted
    arrays = to_arrays(build_model(plan, 0))
    view = SiteView(plan, made, Runtime())
    view.load(arrays, 1)
    (gradient,) = view.gradients([images[:1]])
    direction = gradient / np.linalg.norm(gradient)
    losses = []
    for step in (-1e-2, 1e-2):
        start, moved = 0, {}
        for name in view.names:
            size = arrays[name].size
            part = direction[start : start + size].reshape(arrays[name].shape)
            moved[name] = (arrays[name] + step * part).astype(np.float32)
            start += size
        view.load({**arrays, **moved}, 1)
        losses.append(view.signals(images[:1])[0][0])
    slope = (losses[1] - losses[0]) / 2e-2
    assert slope == pytest.approx(np.linalg.norm(gradient), rel=0.02)


def test_the_confidence_is_the_log_odds_of_the_true_class(planted: tuple) -> None:  # type: ignore[type-arg]
    plan, _, made, _ = planted
    view = SiteView(plan, made, Runtime())
    view.load(to_arrays(build_model(plan, 0)), 1)
    loss, confidence = view.signals(np.arange(80))
    chance = np.exp(-loss)
    assert confidence == pytest.approx(np.log(chance / (1 - chance)), abs=1e-4)


def test_a_centring_plan_is_watched_from_its_first_training_round(
    make_plan: Callable[..., Plan],
    make_site: Callable[..., PreparedSite],
    make_order: Callable[..., RoundOrder],
) -> None:
    plan = make_plan(
        model={"feature_centering": True},
        training={
            "rounds": None,
            "learning_rate": None,
            "optimizer": "sgd",
            "schedule": "constant",
        },
        stages=[{"name": "head", "rounds": 2, "learning_rate": 0.5, "train": ["fc.*"]}],
        privacy={"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0},
    )
    arrays = to_arrays(build_model(plan, 0))
    made, images = with_canaries(plan, make_site(), 4, arrays, Runtime(), seed=3)
    inside = np.array([True, False, True, False])
    trainer = WatchedTrainer(plan, included(made, images[inside]), Runtime(), images, inside)
    for round_ in (1, 2, 3):
        arrays |= trainer.train(arrays, make_order(plan, round_))[0]
    seen = trainer.kept()
    assert seen.noise_multiplier == 0.0 or seen.sampling_rate > 0
    assert np.isfinite(seen.score).all() and seen.score.any()
    drawn = invert(plan, make_site(), 0, arrays, Runtime(), seed=0, steps=3)
    assert np.isfinite(drawn.mse)


def test_a_detector_s_canaries_are_images_with_boxes_that_an_attacker_reads(
    make_plan: Callable[..., Plan], make_site: Callable[..., PreparedSite]
) -> None:
    plan = make_plan(
        task={"kind": "detection", "classes": ["a", "b"]},
        preprocessing={"size": [32, 32]},
        model={"name": "retinanet", "channels": [4, 8, 8, 8, 8, 8]},
        training={"loss": "focal_giou"},
        metrics={"report": ["map50"], "primary": "map50"},
        privacy={"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0},
    )
    site = make_site(size=32)
    boxes = np.zeros((len(site.images), 5, 5), np.float32)
    boxes[:, :2] = [[2, 3, 12, 20, 1], [16, 8, 30, 30, 2]]
    site = dataclasses.replace(site, targets=boxes)
    arrays = to_arrays(build_model(plan, 0))
    made, images = with_canaries(plan, site, 4, arrays, Runtime(), seed=3)
    planted = made.targets[images]
    there = planted[..., -1] > 0
    assert (there.sum(axis=1) == 2).all() and set(planted[there][:, -1]) <= {1, 2}
    low, high = planted[there][:, :2], planted[there][:, 2:4]
    assert (low >= 0).all() and (high > low).all() and (high <= 32).all()
    view = SiteView(plan, made, Runtime())
    view.load(arrays, 1)
    gradients = view.gradients([images[:1], images[1:2]])
    assert np.isfinite(gradients).all()
    cosine = gradients[0] @ gradients[1] / np.prod(np.linalg.norm(gradients, axis=1))
    assert abs(cosine) < 0.99  # an update tells of each by itself
    losses, confidences = view.signals(images)
    assert losses == pytest.approx(-confidences)
    drawn = invert(plan, site, 0, arrays, Runtime(randomness="seeded"), seed=1, steps=3)
    assert drawn.image.shape == (1, 32, 32) and np.isfinite([drawn.mse, drawn.ssim]).all()
