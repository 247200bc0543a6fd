"""Preprocessing against NumPy and SciPy, and the cache against kills and changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from scipy import ndimage

from client.data.preprocess import prepare, prepare_image
from client.data.read import DatasetSpec, read_dataset
from client.data.types import SPLITS, Image, Sample
from fedward.errors import DataError, OutputError

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


# --- whole sites -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A sample whose content is a number; negative ones cannot be read."""

    value: int

    def __call__(self):
        if self.value < 0:
            raise RuntimeError("PATIENT-7 in /secret/place")
        rows = np.random.default_rng(self.value).random((1, 16, 16)).astype(np.float32)
        return Image(rows, (1.0, 1.0))

    def identity(self):
        return str(self.value)


@dataclass(frozen=True)
class KnownMask:
    value: int

    def __call__(self):
        return np.full((16, 16) if self.value % 5 else (8, 8), self.value % 2, np.uint8)

    def identity(self):
        return str(self.value)


def cohort(n=40, bad=(), masks=False):
    return [
        Sample(
            f"p{k // 2}",
            Known(-k - 1 if k in bad else k),
            None if masks else (k // 2 % 2,),
            KnownMask(k) if masks else None,
        )
        for k in range(n)
    ]


def test_a_site_of_classification(make_plan):
    site = prepare("north", cohort(), make_plan())
    assert site.name == "north"
    assert site.images.shape == (40, 1, 16, 16)
    assert site.images.dtype == np.float32
    assert site.targets.dtype == np.int64
    assert site.targets.tolist() == [k // 2 % 2 for k in range(40)]
    assert site.patients.tolist() == [k // 2 for k in range(40)]
    assert site.spacing.shape == (40, 2)
    assert sorted(np.concatenate([site.split[s] for s in SPLITS])) == list(range(40))
    assert sum(site.patients_in(s) for s in SPLITS) == 20
    assert site.left_out == {}
    assert not site.synthetic


def test_multi_label_targets_and_the_synthetic_mark(make_plan):
    samples = [
        Sample(f"p{k}", Known(k), (k % 2, 1), columns={"synthetic": "yes"}) for k in range(4)
    ]
    site = prepare("x", samples, make_plan(task={"multi_label": True}))
    assert site.targets.dtype == np.float32
    assert site.targets.tolist() == [[0, 1], [1, 1], [0, 1], [1, 1]]
    assert site.synthetic


def test_segmentation_leaves_out_masks_that_do_not_fit(make_plan):
    site = prepare("x", cohort(20, masks=True), make_plan("segmentation"))
    assert site.targets.shape == (16, 16, 16)
    assert site.targets.dtype == np.uint8
    assert site.left_out == {"shape of mask differs": 4}
    kept = [k for k in range(20) if k % 5]
    assert site.targets.max((1, 2)).tolist() == [k % 2 for k in kept]


@pytest.mark.parametrize("workers", [1, 3])
def test_unreadable_images_are_counted_whatever_they_raise(make_plan, workers):
    site = prepare("x", cohort(bad=(3, 4)), make_plan(), workers=workers)
    assert site.left_out == {"not readable": 2}
    assert site.patients.tolist() == [k // 2 for k in range(40) if k not in (3, 4)]


def test_nothing_readable_is_an_error_without_names(make_plan):
    with pytest.raises(DataError, match="not readable: 4") as caught:
        prepare("x", cohort(4, bad=range(4)), make_plan())
    assert "PATIENT" not in str(caught.value)
    with pytest.raises(DataError, match="must have images"):
        prepare("x", [], make_plan())


def test_workers_change_nothing(make_plan):
    one, many = (prepare("x", cohort(bad=(7,)), make_plan(), workers=w) for w in (1, 4))
    np.testing.assert_array_equal(one.images, many.images)
    assert all((one.split[s] == many.split[s]).all() for s in SPLITS)


# --- cache -------------------------------------------------------------------------------------


def test_the_cache_gives_the_same_back_as_a_read_only_map(tmp_path, make_plan):
    for kind, samples in (
        ("classification", cohort(bad=(1,))),
        ("segmentation", cohort(masks=True)),
    ):
        plan = make_plan(kind)
        plain = prepare("x", samples, plan)
        for _ in range(2):
            site = prepare("x", samples, plan, cache=tmp_path)
            assert isinstance(site.images, np.memmap)
            assert not site.images.flags.writeable
            for name in ("images", "targets", "patients", "spacing"):
                one, other = getattr(site, name), getattr(plain, name)
                np.testing.assert_array_equal(one, other)
                assert one.dtype == other.dtype
            assert all((site.split[s] == plain.split[s]).all() for s in SPLITS)
            assert site.left_out == plain.left_out
    assert len(list(tmp_path.iterdir())) == 2


def test_a_hit_does_not_open_an_image(tmp_path, make_plan, monkeypatch):
    prepare("x", cohort(), make_plan(), cache=tmp_path)
    monkeypatch.setattr(Known, "__call__", lambda self: pytest.fail("opened"))
    assert len(prepare("y", cohort(), make_plan(), cache=tmp_path).images) == 40


def test_whatever_matters_makes_another_entry(tmp_path, make_plan):
    plan, samples = make_plan(), cohort()
    prepare("x", samples, plan, cache=tmp_path)
    prepare("x", samples, make_plan(augmentation={"noise": 0.5}), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # augmentation comes later and does not matter
    others = [
        (samples[:-1], plan),
        (samples[::-1], plan),
        ([Sample("other", s.load, s.label) for s in samples[:1]] + samples[1:], plan),
        ([Sample(s.patient, s.load, (1 - s.label[0],)) for s in samples], plan),
        (samples, make_plan(intensity="unit")),
        (samples, make_plan(split={"seed": 5})),
        (samples, make_plan(classes=["a", "b"])),
    ]
    for more, (changed, other) in enumerate(others, start=2):
        prepare("x", changed, other, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == more


def test_a_changed_file_is_prepared_again(tmp_path, make_plan):
    for name in ("normal/a", "sick/b", "sick/c"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(RNG.integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
    plan = make_plan(intensity="unit")

    def read():
        samples = read_dataset(DatasetSpec(tmp_path / "data"), plan.task).samples
        return prepare("x", samples, plan, cache=tmp_path / "cache").images.copy()

    before = read()
    Pillow.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "data" / "normal" / "a.png")
    after = read()
    assert (after[0] == 0).all()
    np.testing.assert_array_equal(before[1:], after[1:])


@pytest.mark.parametrize("damage", ["truncate", "remove", "meta"])
def test_a_damaged_entry_is_made_again(tmp_path, make_plan, damage):
    prepare("x", cohort(), make_plan(), cache=tmp_path)
    entry = next(tmp_path.iterdir())
    if damage == "truncate":
        with (entry / "images.npy").open("r+b") as file:
            file.truncate(1000)
    elif damage == "remove":
        (entry / "part.npy").unlink()
    else:
        (entry / "meta.json").write_text("{")
    site = prepare("x", cohort(), make_plan(), cache=tmp_path)
    np.testing.assert_array_equal(site.images, prepare("x", cohort(), make_plan()).images)


def test_samples_that_do_not_say_what_they_are_are_not_cached(tmp_path, make_plan):
    samples = [Sample(f"p{k}", lambda: image(HU), (0,)) for k in range(3)]
    assert len(prepare("x", samples, make_plan(), cache=tmp_path).images) == 3
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing_half(tmp_path, make_plan):
    with pytest.raises(DataError):
        prepare("x", cohort(4, bad=range(4)), make_plan(), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, make_plan):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cache") as caught:
        prepare("x", cohort(), make_plan(), cache=tmp_path / "file")
    assert str(tmp_path) not in str(caught.value)


def test_old_leftovers_are_swept_and_young_ones_kept(tmp_path, make_plan):
    for name, age in (("old", 2 * 86_400), ("young", 60)):
        folder = tmp_path / f".partial-{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    prepare("x", cohort(), make_plan(), cache=tmp_path)
    assert {p.name for p in tmp_path.glob(".partial-*")} == {".partial-young"}


KILLED = """
import sys, time
import numpy as np
from pathlib import Path
from client.data.preprocess import prepare
from client.data.types import Image, Sample
from fedward.plan.load import from_canonical

class Slow:
    def __init__(self, k): self.k = k
    def identity(self): return str(self.k)
    def __call__(self):
        if self.k == 30:
            print("half", flush=True)
            time.sleep(60)
        return Image(np.full((1, 16, 16), self.k, np.float32), (1.0, 1.0))

samples = [Sample(f"p{k}", Slow(k), (k % 2,)) for k in range(40)]
prepare("x", samples, from_canonical(sys.argv[2]), cache=Path(sys.argv[1]))
"""


def test_a_kill_in_the_middle_leaves_no_entry(tmp_path, make_plan):
    from fedward.plan.load import canonical

    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), canonical(make_plan())],
        env={"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".partial-")] == []


def test_real_volumes(real_data, make_plan):
    plan = make_plan("segmentation", ["anterior", "posterior"], (32, 48, 32))
    dataset = read_dataset(DatasetSpec(real_data / "hippocampus"), plan.task)
    site = prepare("x", dataset.samples[:12], plan)
    assert site.left_out == {}
    assert set(np.unique(site.targets)) == {0, 1, 2}
    # Both halves fill about as much of each volume before and after.
    for k, sample in enumerate(dataset.samples[:12]):
        mask = sample.mask()
        for label in (1, 2):
            assert (site.targets[k] == label).mean() == pytest.approx(
                (mask == label).mean(), rel=0.05
            )
