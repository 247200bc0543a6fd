"""Answers for each pixel come back to the grid of the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedward.plan.schema import Preprocessing
from fedward_client.data.restore import restore, seen
from fedward_client.data.sample import Image
from fedward_client.data.transforms import prepare_image

# A larger image, a smaller one, a mixed one; by size, by fit, by spacing with crop and with pad.
SETTINGS = [
    ((40, 52), (1.0, 1.0), {"size": (32, 32)}),
    ((20, 27), (1.0, 1.0), {"size": (32, 32)}),
    ((40, 26), (1.0, 1.0), {"size": (32, 32), "resize": "fit"}),
    ((60, 70), (0.5, 0.8), {"size": (32, 48), "spacing": (1.0, 1.0)}),
    ((90, 31), (0.7, 2.1), {"size": (40, 48), "spacing": (1.3, 1.0)}),
    ((31, 40, 12), (0.7, 0.7, 3.0), {"size": (24, 24, 24), "spacing": (1.0, 1.2, 1.5)}),
    ((20, 24, 9), (1.0, 1.0, 1.0), {"size": (16, 16, 16)}),
]


@pytest.mark.parametrize(("shape", "spacing", "settings"), SETTINGS)
def test_what_the_model_sees_as_bright_is_marked_where_the_image_is_bright(
    make_plan: Any, shape: Any, spacing: Any, settings: Any
) -> None:
    """A smooth ball through the preprocessing of training and back, against the ball itself."""
    task = make_plan("segmentation", settings["size"], "CT").task
    prep = Preprocessing.model_validate({"intensity": "unit", "window": (0.0, 1.0), **settings})
    middle = [(n - 1) / 2 + 1.5 for n in shape]
    steps = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    far = sum((s - m) ** 2 * d**2 for s, m, d in zip(steps, middle, spacing, strict=True))
    radius = 0.3 * min(n * d for n, d in zip(shape, spacing, strict=True))
    bright = np.clip(0.5 + (radius - np.sqrt(far)) / (4 * max(spacing)), 0, 1).astype(np.float32)
    prepared = prepare_image(Image(bright[None], spacing), None, task, prep)
    ball = prepared.pixels[0].astype(float)
    labels = restore(np.stack([1 - ball, ball, ball * 0]), shape, spacing, prep)
    wrong = labels != (bright > 0.5)
    # Only pixels whose brightness is about a half may fall on the other side.
    assert labels.shape == shape and labels.any()
    assert not wrong[np.abs(bright - 0.5) > 0.12].any()
    assert wrong.mean() < 0.02


def test_places_are_exact() -> None:
    """A ramp is linear in the place, so its half lies where it is, to a tenth of a pixel."""
    prep = Preprocessing.model_validate({"size": (64, 8), "spacing": (0.5, 1.0)})
    place = (np.arange(64) + 0.5) / 2 - 0.5  # of the model's pixels among the image's
    for half in (5.93, 6.07, 20.45, 20.55):
        ramp = np.repeat(np.clip(0.5 + (place - half) / 40, 0, 1)[:, None], 8, axis=1)
        found = restore(np.stack([1 - ramp, ramp]), (32, 8), (1.0, 1.0), prep)
        np.testing.assert_array_equal(found[:, 0], np.arange(32) > half)


def test_the_same_grid_keeps_the_model_s_own_choice() -> None:
    prep = Preprocessing.model_validate({"size": (9, 8)})
    values = np.random.default_rng(0).random((3, 9, 8))
    found = restore(values, (9, 8), (1.0, 1.0), prep)
    np.testing.assert_array_equal(found, values.argmax(0))


def test_what_was_cropped_is_background() -> None:
    prep = Preprocessing.model_validate({"size": (16, 16), "spacing": (1.0, 1.0)})
    everything = np.stack([np.zeros((16, 16)), np.ones((16, 16))])
    found = restore(everything, (40, 20), (1.0, 1.0), prep)
    expected = np.zeros((40, 20))
    expected[12:28, 2:18] = 1
    np.testing.assert_array_equal(found, expected)
    assert seen((40, 20), (1.0, 1.0), prep) == pytest.approx(16 * 16 / 800)
