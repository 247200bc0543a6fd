"""Augmentation against SciPy, exact mirrors, and its own promises."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from monai.networks.layers import GaussianFilter
from monai.transforms import AdjustContrast
from scipy import ndimage

from fedward.plan.schema import Augmentation
from fedward_client.data.augment import augment, blurred, with_gamma


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n=4, size=(20, 30), channels=1, seed=0):
    noise = np.random.default_rng(seed).normal(size=(n, channels, *size))
    smooth = ndimage.gaussian_filter(noise, [0, 0] + [2.0] * len(size))
    return torch.tensor(smooth, dtype=torch.float32)


def test_nothing_active_gives_the_same_tensors():
    images, masks = blobs(), torch.zeros(4, 20, 30, dtype=torch.uint8)
    out, out_masks = augment(images, masks, Augmentation(), generator())
    assert out is images
    assert out_masks is masks


@pytest.mark.parametrize(
    ("name", "axis", "size"),
    [
        ("vertical", 0, (6, 9)),
        ("horizontal", 1, (6, 9)),
        ("vertical", 0, (5, 6, 7)),
        ("horizontal", 1, (5, 6, 7)),
        ("depth", 2, (5, 6, 7)),
    ],
)
def test_flips_are_exact_mirrors_of_half_the_images(name, axis, size):
    images = torch.rand(200, 2, *size)
    masks = torch.randint(0, 5, (200, *size), dtype=torch.uint8)
    out, out_masks = augment(images, masks, Augmentation(flip=(name,)), generator())
    mirrored = 0
    for k in range(200):
        same = torch.allclose(out[k], images[k], atol=1e-5)
        flipped = torch.allclose(out[k], images[k].flip(1 + axis), atol=1e-5)
        assert same != flipped
        expected = masks[k].flip(axis) if flipped else masks[k]
        assert torch.equal(out_masks[k], expected)
        mirrored += flipped
    assert 70 < mirrored < 130
    assert out_masks.dtype == torch.uint8


def angle_of(before, after, limit):
    """The rotation that explains `after` best, found by SciPy and brute force (degrees)."""
    angles = np.linspace(-limit, limit, 81)
    errors = [
        np.abs(ndimage.rotate(before, a, reshape=False, order=1, mode="nearest") - after).mean()
        for a in angles
    ]
    return angles[int(np.argmin(errors))], min(errors)


def test_rotation_is_rigid_within_its_limit_and_in_all_images():
    images = blobs(6, size=(24, 40))
    out, _ = augment(images, None, Augmentation(rotate=20.0), generator())
    found = [angle_of(images[k, 0].numpy(), out[k, 0].numpy(), 20) for k in range(6)]
    scale = images.abs().mean().item()
    assert all(error < 0.05 * scale for _, error in found)  # a sheared image could not do this
    assert np.std([angle for angle, _ in found]) > 3


def test_shift_moves_by_at_most_its_share():
    size = (32, 32)
    images = torch.zeros(300, 1, *size)
    images[:, 0, 16, 16] = 1.0
    out, _ = augment(images, None, Augmentation(shift=0.25), generator())
    mass = out.sum((1, 2, 3))
    rows = (out.sum((1, 3)) * torch.arange(32)).sum(1) / mass - 16
    columns = (out.sum((1, 2)) * torch.arange(32)).sum(1) / mass - 16
    assert torch.allclose(mass, torch.ones(300), atol=1e-4)
    for moved in (rows, columns):
        assert 7.0 < moved.abs().max() <= 8.001
        assert abs(moved.mean()) < 1.0
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.2


def test_zoom_changes_size_within_its_limits():
    disc = ((torch.arange(64)[:, None] - 31.5) ** 2 + (torch.arange(64)[None] - 31.5) ** 2) < 15**2
    masks = disc.to(torch.uint8).expand(100, 64, 64).contiguous()
    images = masks[:, None].float()
    _, out = augment(images, masks, Augmentation(scale=0.2), generator())
    zoom = torch.sqrt(out.sum((1, 2)) / disc.sum())
    assert 0.79 < zoom.min() < 0.85
    assert 1.15 < zoom.max() < 1.21


def test_volume_turns_by_at_most_the_angle_and_stays_rigid():
    axis = torch.arange(32) - 15.5
    r, c, s = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = [(r - 9) ** 2 + c**2 + s**2, r**2 + (c - 9) ** 2 + s**2]
    images = torch.stack([(-p / 8).exp() for p in points]).expand(50, 2, 32, 32, 32).contiguous()
    out, _ = augment(images, None, Augmentation(rotate=30.0), generator())
    weight = out / out.sum((2, 3, 4), keepdim=True)
    centres = torch.stack([(weight * x).sum((2, 3, 4)) for x in (r, c, s)], dim=2)
    lengths = centres.norm(dim=2)
    assert torch.allclose(lengths, torch.full_like(lengths, 9.0), atol=0.2)
    between = (centres[:, 0] * centres[:, 1]).sum(1) / (lengths[:, 0] * lengths[:, 1])
    assert between.abs().max() < 0.05  # still at a right angle
    turned = torch.rad2deg(torch.acos((centres[:, 0, 0] / lengths[:, 0]).clamp(-1, 1)))
    assert 10 < turned.max() < 31


def test_masks_move_with_their_images():
    images = (blobs(5, (32, 48)) > 0).float()
    masks = images[:, 0].to(torch.uint8) * 3
    settings = Augmentation(flip=("horizontal",), rotate=25.0, scale=0.2, shift=0.1)
    out, out_masks = augment(images, masks, settings, generator(3))
    assert set(out_masks.unique().tolist()) <= {0, 3}
    assert ((out[:, 0] > 0.5) == (out_masks == 3)).float().mean() > 0.98


def test_contrast_keeps_the_mean_and_brightness_the_contrast():
    images = blobs(200)
    out, _ = augment(images, None, Augmentation(contrast=0.4), generator())
    ratio = out.std((1, 2, 3)) / images.std((1, 2, 3))
    assert torch.allclose(out.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5)
    assert 0.6 <= ratio.min() < 0.65
    assert 1.35 < ratio.max() <= 1.4001
    out, _ = augment(images, None, Augmentation(brightness=0.5), generator())
    moved = out - images
    assert moved.std((1, 2, 3)).max() < 1e-5
    assert 0.45 < moved.abs().max() <= 0.5001


def test_noise_has_its_deviation():
    images = torch.zeros(20, 1, 32, 32)
    out, _ = augment(images, None, Augmentation(noise=0.3), generator())
    assert out.std().item() == pytest.approx(0.3, rel=0.02)


ALL = Augmentation(
    flip=("horizontal", "vertical"),
    rotate=15.0,
    scale=0.1,
    shift=0.1,
    contrast=0.2,
    brightness=0.2,
    noise=0.1,
)


def test_the_generator_decides_and_inputs_stay():
    images = blobs(8)
    before = images.clone()
    one, _ = augment(images, None, ALL, generator(1))
    torch.rand(5)  # the global generator has no say
    two, _ = augment(images, None, ALL, generator(1))
    three, _ = augment(images, None, ALL, generator(2))
    assert torch.equal(one, two)
    assert not torch.allclose(one, three)
    assert torch.equal(images, before)
    assert one.dtype == images.dtype


def test_an_empty_batch_passes():
    out, _ = augment(torch.zeros(0, 1, 8, 8), None, ALL, generator())
    assert out.shape == (0, 1, 8, 8)


def test_a_small_batch_takes_little_time():
    images = torch.rand(32, 1, 28, 28)
    augment(images, None, ALL, generator())
    start = time.perf_counter()
    for _ in range(20):
        augment(images, None, ALL, generator())
    assert (time.perf_counter() - start) / 20 < 0.05
    assert math.isfinite(images.sum().item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_batch_changes_in_the_same_way():
    images, masks = blobs(8), (blobs(8)[:, 0] > 0).to(torch.uint8)
    cpu, cpu_masks = augment(images, masks, ALL, generator())
    gpu, gpu_masks = augment(images.cuda(), masks.cuda(), ALL, generator())
    torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-3, rtol=1e-3)
    assert (gpu_masks.cpu() == cpu_masks).float().mean() > 0.999


@pytest.mark.parametrize("size", [(20, 30), (12, 14, 16)])
def test_gamma_is_monais_with_an_exponent_for_each_image(size):
    images, exponents = blobs(size=size), torch.tensor([0.5, 1.0, 1.7, 3.0])
    found = with_gamma(images, exponents)
    for one, before, exponent in zip(found, images, exponents, strict=True):
        wanted = AdjustContrast(float(exponent))(before)
        torch.testing.assert_close(one, torch.as_tensor(wanted), rtol=1e-5, atol=1e-6)
    out, _ = augment(images, None, Augmentation(gamma=0.5), generator())
    flat, before = out.flatten(1), images.flatten(1)
    torch.testing.assert_close(flat.amax(1), before.amax(1))
    torch.testing.assert_close(flat.amin(1), before.amin(1))
    assert (flat - before).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("size", [(40, 44), (26, 28, 30)])
def test_a_blur_is_a_gaussian_of_each_images_own_deviation(size):
    images, deviations = blobs(size=size, channels=2), torch.tensor([0.0, 0.6, 1.0, 1.5])
    found = blurred(images, deviations, 1.5)
    torch.testing.assert_close(found[0], images[0])
    inner = (slice(None), *(slice(7, -7) for _ in size))
    for one, before, sigma in zip(found[1:], images[1:], deviations[1:], strict=True):
        wanted = GaussianFilter(len(size), float(sigma), truncated=6.0, approx="erf")(before[None])
        torch.testing.assert_close(one[inner], wanted[0][inner], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(20, 30), (12, 14, 16)])
def test_a_bias_field_is_a_polynomial_of_third_degree(size):
    images = torch.ones(3, 2, *size)
    out, _ = augment(images, None, Augmentation(bias_field=0.3), generator())
    assert torch.equal(out[:, 0], out[:, 1])
    assert not torch.allclose(out[0], out[1])
    # Its logarithm is in the span of the products of powers up to the third degree, and no more.
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    powers = [p for p in np.ndindex(*[4] * len(size)) if sum(p) <= 3]
    basis = np.stack(
        [np.prod([x**k for x, k in zip(axes, p, strict=True)], axis=0).ravel() for p in powers], 1
    )
    for field in out[:, 0].log().double().numpy():
        fit, *_ = np.linalg.lstsq(basis, field.ravel(), rcond=None)
        assert np.abs(basis @ fit - field.ravel()).max() < 1e-5
        assert 0.05 < np.abs(field).max() < 0.3 * len(powers)


def test_low_resolution_loses_what_is_fine_and_keeps_the_place():
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    fine, ramp = ((rows + columns) % 2)[None, None], (rows + 2 * columns)[None, None]
    many = Augmentation(low_resolution=0.6)
    out, _ = augment(torch.cat([fine] * 40), None, many, generator())
    assert out.shape == (40, 1, 32, 32)
    assert (out.std(dim=(1, 2, 3)) < 0.45).float().mean() > 0.7
    out, _ = augment(torch.cat([ramp] * 40), None, many, generator())
    assert (out - ramp).abs()[..., 4:-4, 4:-4].max() < 6


def test_changes_of_brightness_leave_masks_alone_and_follow_the_generator():
    images, masks = blobs(), torch.randint(0, 3, (4, 20, 30), dtype=torch.uint8)
    more = {"gamma": 0.5, "blur": 1.0, "low_resolution": 0.5, "bias_field": 0.2}
    out, same = augment(images, masks, Augmentation(**more), generator())
    assert torch.equal(same, masks)
    assert not torch.allclose(out, images)
    again, _ = augment(images, masks, Augmentation(**more), generator())
    assert torch.equal(out, again)
