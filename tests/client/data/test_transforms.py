"""Intensities and geometry against NumPy, SciPy and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from scipy import ndimage

from fedward.errors import DataError
from fedward_client.data.sample import Image
from fedward_client.data.transforms import prepare_image

RNG = np.random.default_rng(0)


def image(values, spacing=None, window=None):
    pixels = np.asarray(values, np.float32)
    return Image(pixels, spacing or (1.0,) * (pixels.ndim - 1), window)


def run(plan, img, mask=None):
    return prepare_image(img, mask, plan.task, plan.preprocessing)


# --- intensity ---------------------------------------------------------------------------------

HU = RNG.normal(0, 500, (1, 16, 16)).astype(np.float32)


def test_the_plans_window_leads(make_plan):
    plan = make_plan(window=[-100.0, 300.0], intensity="unit")
    out = run(plan, image(HU, window=(0.0, 1.0))).pixels
    np.testing.assert_allclose(out, np.clip((HU + 100) / 400, 0, 1), atol=1e-6)


def test_percentiles_come_next(make_plan):
    plan = make_plan(percentiles=[5.0, 95.0], intensity="unit")
    out = run(plan, image(HU, window=(0.0, 1.0))).pixels
    low, high = np.percentile(HU, [5, 95])
    np.testing.assert_allclose(out, np.clip((HU - low) / (high - low), 0, 1), atol=1e-5)


def test_then_the_files_window_then_the_range(make_plan):
    plan = make_plan(intensity="unit")
    out = run(plan, image(HU, window=(-50.0, 50.0))).pixels
    np.testing.assert_allclose(out, np.clip((HU + 50) / 100, 0, 1), atol=1e-5)
    out = run(plan, image(HU)).pixels
    np.testing.assert_allclose(out, (HU - HU.min()) / np.ptp(HU), atol=1e-5)


def test_zscore_after_the_mapping_and_over_all_channels(make_plan):
    plan = make_plan(intensity="zscore")
    np.testing.assert_allclose(run(plan, image(HU)).pixels, (HU - HU.mean()) / HU.std(), atol=1e-4)
    clipped = np.clip(HU, -50, 50)
    out = run(plan, image(HU, window=(-50.0, 50.0))).pixels
    np.testing.assert_allclose(out, (clipped - clipped.mean()) / clipped.std(), atol=1e-4)
    colour = RNG.random((3, 16, 16)).astype(np.float32)
    out = run(make_plan(channels=3), image(colour)).pixels
    np.testing.assert_allclose(out, (colour - colour.mean()) / colour.std(), atol=1e-4)


def test_imagenet(make_plan):
    eight = RNG.integers(0, 256, (3, 16, 16)).astype(np.float32)
    plan = make_plan(intensity="imagenet", channels=3)
    out = run(plan, image(eight, window=(0.0, 255.0))).pixels
    for c, (mean, deviation) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        np.testing.assert_allclose(out[c], (eight[c] / 255 - mean) / deviation, atol=1e-5)


def test_channels(make_plan):
    colour = RNG.integers(0, 256, (3, 16, 16)).astype(np.float32)
    grey = run(make_plan(intensity="unit"), image(colour, window=(0.0, 255.0))).pixels
    expected = np.asarray(
        Pillow.fromarray(colour.transpose(1, 2, 0).astype(np.uint8)).convert("L"), float
    )
    np.testing.assert_allclose(grey[0] * 255, expected, atol=1.0)
    repeated = run(make_plan(intensity="unit", channels=3), image(HU)).pixels
    assert repeated.shape == (3, 16, 16)
    np.testing.assert_array_equal(repeated[0], repeated[2])


@pytest.mark.parametrize("intensity", ["unit", "zscore"])
def test_flat_and_partly_broken_images(make_plan, intensity):
    plan = make_plan(intensity=intensity)
    assert (run(plan, image(np.full((1, 16, 16), 7.0))).pixels == 0).all()
    holes = HU.copy()
    holes[0, 0, :3] = [np.nan, np.inf, -np.inf]
    filled = HU.copy()
    filled[0, 0, :3] = np.delete(HU.ravel(), [0, 1, 2]).min()
    np.testing.assert_array_equal(run(plan, image(holes)).pixels, run(plan, image(filled)).pixels)
    with pytest.raises(DataError, match="not readable"):
        run(plan, image(np.full((1, 16, 16), np.nan)))


# --- geometry ----------------------------------------------------------------------------------


def test_shrinking_by_a_whole_factor_keeps_the_mean_and_does_not_alias(make_plan):
    stripes = np.tile([0.0, 1.0], 32)[None, None].repeat(64, 1)
    out = run(make_plan(intensity="unit"), image(stripes)).pixels
    np.testing.assert_allclose(out[0, 2:-2, 2:-2], 0.5, atol=0.02)
    cube = np.broadcast_to(np.tile([0.0, 1.0], 32), (1, 64, 64, 64))
    out = run(make_plan(size=(16, 16, 16), intensity="unit"), image(cube)).pixels
    np.testing.assert_allclose(out[0, :, :, 2:-2], 0.5, atol=0.02)


def triangle(values, axis, new):
    """Independent smoothing resize of one axis: a triangle as wide as the new pixel."""
    old = values.shape[axis]
    scale = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.clip(1 - np.abs(centres[:, None] - np.arange(old)[None]) / scale, 0, None)
    weights /= weights.sum(1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)


@pytest.mark.parametrize("shape", [(40, 25), (9, 33), (40, 9, 21), (10, 33, 16)])
def test_stretch_against_an_independent_filter(make_plan, shape):
    values = RNG.random((1, *shape)).astype(np.float32)
    size = (16, 24, 32)[: len(shape)]
    out = run(make_plan(size=size, window=[0.0, 1.0], intensity="unit"), image(values))
    expected = values
    for axis, new in enumerate(size):
        expected = triangle(expected, axis + 1, new)
    np.testing.assert_allclose(out.pixels, expected, atol=1e-4)
    assert out.spacing == pytest.approx([n / m for n, m in zip(shape, size, strict=True)])


def test_enlarging_agrees_with_scipy(make_plan):
    values = RNG.random((1, 16, 20)).astype(np.float32)
    out = run(make_plan(size=(32, 40), window=[0.0, 1.0], intensity="unit"), image(values))
    expected = ndimage.zoom(values[0], 2, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(out.pixels[0], expected, atol=1e-5)


def test_fit_keeps_the_shape_and_pads_with_black(make_plan):
    values = np.full((1, 20, 40), 100.0)
    values[0, 5:15] = 200.0
    plan = make_plan(size=(16, 16), resize="fit", window=[0.0, 255.0], intensity="unit")
    out = run(plan, image(values), np.ones((20, 40), np.uint8))
    assert (out.pixels[0, :4] == 0).all()
    assert (out.pixels[0, 12:] == 0).all()
    assert out.pixels[0, 4:12].min() > 0.35
    assert out.mask.sum() == 8 * 16
    assert out.spacing == pytest.approx((2.5, 2.5))


def test_the_padding_does_not_shift_the_zscore(make_plan):
    values = RNG.normal(100, 10, (1, 16, 8))
    out = run(make_plan(resize="fit"), image(values)).pixels[0]
    content = out[:, 4:12]
    assert abs(content.mean()) < 1e-4
    assert content.std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(out[:, :4], content.min())


def test_spacing_is_exact_then_cropped_or_padded_in_the_middle(make_plan):
    ramp = np.broadcast_to(np.arange(50.0)[:, None], (1, 50, 12))
    plan = make_plan(size=(16, 16), spacing=[2.0, 1.0], window=[0.0, 50.0], intensity="unit")
    out = run(plan, image(ramp, (1.0, 0.5)), (ramp[0] > 24).astype(np.uint8))
    assert out.spacing == (2.0, 1.0)
    # 50 mm become 25 rows of 2 mm, of which the middle 16 stay; 6 mm become 6 columns in 16.
    rows = (np.arange(4, 20) * 2 + 0.5) / 50
    np.testing.assert_allclose(out.pixels[0, 1:-1, 7], rows[1:-1], atol=1e-3)
    assert (out.pixels[0, :, :5] == 0).all()
    assert (out.pixels[0, :, 5:11] > 0).all()
    assert out.mask[:, 7].tolist() == [int(r * 50 > 24) for r in rows]


def test_spacing_of_a_volume_puts_points_where_they_were(make_plan):
    values = np.zeros((1, 40, 40, 20), np.float32)
    values[0, 28, 14, 12] = 1.0
    plan = make_plan(
        size=(32, 32, 32), spacing=[1.0, 1.0, 1.0], window=[0.0, 1.0], intensity="unit"
    )
    out = run(plan, image(values, (0.7, 0.7, 1.3))).pixels[0]
    centre = ndimage.center_of_mass(out)
    resampled = [28, 28, 26]
    expected = [
        (p + 0.5) * s - 0.5 + (32 - n) // 2
        for p, s, n in zip((28, 14, 12), (0.7, 0.7, 1.3), resampled, strict=True)
    ]
    np.testing.assert_allclose(centre, expected, atol=0.1)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from([{"resize": "stretch"}, {"resize": "fit"}, {"spacing": [1.5, 0.4]}]),
    intensity=st.sampled_from(["unit", "zscore"]),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_comes_out_in_the_plans_size(make_plan, shape, mode, intensity):
    values = np.random.default_rng(1).random((1, *shape))
    plan = make_plan("segmentation", ["a", "b"], (16, 24), intensity=intensity, **mode)
    mask = np.random.default_rng(2).integers(0, 3, shape).astype(np.uint8)
    out = run(plan, image(values, (0.8, 0.9)), mask)
    assert out.pixels.shape == (1, 16, 24)
    assert out.pixels.dtype == np.float32
    assert np.isfinite(out.pixels).all()
    assert out.mask.shape == (16, 24)
    assert out.mask.dtype == np.uint8
    assert set(np.unique(out.mask)) <= {0, *np.unique(mask)}


# --- masks -------------------------------------------------------------------------------------


def test_one_class_takes_any_foreground_and_several_only_their_numbers(make_plan):
    mask = np.zeros((16, 16), np.uint8)
    mask[:4] = 255
    assert run(make_plan("segmentation"), image(HU), mask).mask.max() == 1
    two = make_plan("segmentation", ["a", "b"])
    with pytest.raises(DataError, match="unknown class in mask"):
        run(two, image(HU), mask)
    assert run(two, image(HU), mask // 127).mask.max() == 2


def test_a_mask_of_another_shape(make_plan):
    with pytest.raises(DataError, match="shape of mask differs"):
        run(make_plan("segmentation"), image(HU), np.zeros((16, 15), np.uint8))
    with pytest.raises(DataError, match="shape does not fit the task"):
        run(make_plan(), image(HU[..., None]))
