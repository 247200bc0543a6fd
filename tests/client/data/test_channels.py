"""Named channels: which an image has, how each is scaled, and what stands for one that it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan import Plan, plan_from
from fedward_client.data.augment import with_channels_as_in
from fedward_client.data.channels import drops, missing_in
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.options import ChannelOptions
from fedward_client.data.prepare import prepare
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Source

RNG = np.random.default_rng(0)
CHANNELS = {
    "flair": ChannelOptions(1),
    "pre": ChannelOptions(0, "pre_missing"),
    "post": ChannelOptions(2, "Post_Missing"),
}
WORDS = ["0,0", "1,0", "0,yes", "1,TRUE"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve slices of three sequences in colour; one in four lacks each of two, one both."""
    rows = "image,patient,pre_missing,post_missing\n"
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for k in range(12):
        values = RNG.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Pillow.fromarray(values).save(tmp_path / "images" / f"{k}.png")
        mask = np.zeros((16, 16), np.uint8)
        mask[4:9, 3:8] = 255
        Pillow.fromarray(mask).save(tmp_path / "masks" / f"{k}.png")
        rows += f"{k},p{k},{WORDS[k % 4]}\n"
    (tmp_path / "patients.csv").write_text(rows)
    return tmp_path


def plan_with(make_plan: Any, *channels: dict[str, Any], **more: Any) -> Plan:
    content = make_plan("segmentation").model_dump(exclude_defaults=True)
    prep = content["preprocessing"] | {"channels": len(channels), "channel": list(channels)} | more
    return plan_from(content | {"preprocessing": prep})


def test_each_channel_is_scaled_by_itself_and_a_missing_one_is_zeros(
    folder: Path, make_plan: Any
) -> None:
    spec = DatasetSpec(folder, channels=CHANNELS)
    drop = {"missing": "drop"}
    plan = plan_with(
        make_plan,
        {"name": "pre", **drop, "window": [10, 200]},
        {"name": "flair"},
        {"name": "post", **drop},
    )
    samples = read_dataset(spec, plan.task).samples
    lacking = [missing_in(sample, plan.preprocessing) for sample in samples]
    assert set(lacking) == {(), ("pre",), ("post",), ("pre", "post")}
    for cache in (None, folder / "cache"):
        site = prepare("site", samples, plan, cache)
        for sample, image, missing in zip(samples, site.images, lacking, strict=True):
            colours = np.asarray(Pillow.open(folder / "images" / f"{sample.patient[1:]}.png"))
            values = colours.astype(float)
            low = (values[..., 0].clip(10, 200) - 10) / 190
            for plane, name, own in zip(
                image, ("pre", "flair", "post"), (low, values[..., 1], values[..., 2]), strict=True
            ):
                expected = np.zeros_like(own) if name in missing else (own - own.mean()) / own.std()
                np.testing.assert_allclose(plane, expected, atol=1e-5)
    assert list(drops(samples, plan.preprocessing)) == [
        "channel post is zeros in 6 of 12 images, which lack it",
        "channel pre is zeros in 6 of 12 images, which lack it",
    ]


def test_images_that_lack_what_the_plan_needs_are_left_out(folder: Path, make_plan: Any) -> None:
    spec = DatasetSpec(folder, channels=CHANNELS)
    pre, post = {"name": "pre"}, {"name": "post", "missing": "drop"}
    plan = plan_with(make_plan, pre, post)
    samples = read_dataset(spec, plan.task).samples
    site = prepare("site", samples, plan)
    assert len(site.images) == 6 and site.left_out == {rule_codes.CHANNEL_MISSING: 6}
    either = plan_with(make_plan, {**pre, "missing": "drop"}, post)
    assert prepare("site", samples, either).left_out == {rule_codes.CHANNEL_MISSING: 3}


def test_planes_without_names_are_the_plan_s_channels_in_their_order(
    folder: Path, make_plan: Any
) -> None:
    names = [{"name": name} for name in ("pre", "flair", "post")]
    plan = plan_with(make_plan, *names)
    named = prepare("site", read_dataset(DatasetSpec(folder), plan.task).samples, plan)
    assert len(named.images) == 12
    two = plan_with(make_plan, *names[:2])
    with pytest.raises(DataError, match="shape does not fit"):
        prepare("site", read_dataset(DatasetSpec(folder), plan.task).samples, two)


def test_a_column_that_is_not_there_is_named(folder: Path, make_plan: Any) -> None:
    channels = {"flair": ChannelOptions(1, "flair_gone")}
    with pytest.raises(DataError, match=r"which images lack a channel .*flair_gone"):
        read_dataset(DatasetSpec(folder, channels=channels), make_plan("segmentation").task)


def test_dropped_channels_are_zeros_and_one_always_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(4000, 3, 2, 2)
    before[:1000, 1:] = 0.0
    changed = before + 5.0  # a change of brightness gives nothing to a channel that is not there
    after = with_channels_as_in(before, changed, 0.4, generator)
    kept = after.flatten(2).any(2)
    assert (after == changed * kept[..., None, None]).all()
    assert kept.any(1).all()
    assert kept[:1000, 0].all() and not kept[:1000, 1:].any()
    share = kept[1000:].float().mean()
    # Each stays with 0.6; where none would, with 0.4³, all three do.
    assert float(share) == pytest.approx(0.6 + 0.4**3, abs=0.01)


def test_training_drops_channels_and_evaluation_does_not(folder: Path, make_plan: Any) -> None:
    names = [{"name": name, "missing": "drop"} for name in CHANNELS]
    random = {"drop_channel": 0.5, "brightness": 0.5}
    plan = plan_with(make_plan, *names, augmentation=random)
    samples = read_dataset(DatasetSpec(folder, channels=CHANNELS), plan.task).samples
    site = prepare("site", samples, plan)
    source = Source(plan, site, Runtime(), None, "")
    everyone = np.arange(12)
    there = torch.from_numpy(site.images).flatten(2).any(2)
    inputs, _ = source.augmented(everyone, torch.Generator().manual_seed(1))
    kept = inputs[0].flatten(2).any(2)
    assert not (kept & ~there).any() and (there & ~kept).any() and kept.any(1).all()
    again, _ = source.augmented(everyone, torch.Generator().manual_seed(1))
    assert torch.equal(inputs[0], again[0])
    plain, _ = source.plain(everyone)
    assert torch.equal(plain[0], torch.from_numpy(site.images))


AFFINE = np.diag([1.0, 1.2, 2.0, 1.0])
COARSE = np.array([[0, -2.1, 0, 15.0], [1.6, 0, 0, 1.0], [0, 0, 2.5, -1.0], [0, 0, 0, 1.0]])
FILES = {"t1": ChannelOptions(suffix="_0000"), "t2": ChannelOptions(suffix="_0001")}


def smooth(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """A field that is linear in mm, which linear interpolation gives back."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(grid @ affine[:3, :3].T + affine[:3, 3], -1, 0)
    return (3 * x - 2 * y + 5 * z + 100).astype(np.float32)


def volumes(folder: Path, *names: str, far: bool = False) -> Path:
    """Named as nnU-Net does; the second sequence lies on another grid, in other axes."""
    for part in ("images", "labels"):
        (folder / part).mkdir(exist_ok=True)
    moved = COARSE.copy()
    moved[0, 3] += 500 if far else 0
    for name in names:
        for number, (shape, affine) in enumerate((((12, 10, 8), AFFINE), ((9, 9, 8), moved))):
            values = smooth(shape, affine)
            nib.save(nib.Nifti1Image(values, affine), folder / f"images/{name}_000{number}.nii.gz")
        mask = np.zeros((12, 10, 8), np.uint8)
        mask[3:6, 2:7, 2:5] = 1
        nib.save(nib.Nifti1Image(mask, AFFINE), folder / f"labels/{name}.nii.gz")
    return folder


def test_files_of_a_case_are_brought_to_the_grid_of_the_first(
    tmp_path: Path, make_plan: Any
) -> None:
    root = volumes(tmp_path, "a", "b", "c")
    (root / "images" / "b_0001.nii.gz").unlink()
    (root / "patients.csv").write_text("image,patient\na,P1\nb,P2\nc,P3\n")
    nib.save(nib.Nifti1Image(np.ones((2, 2, 2)), AFFINE), root / "images" / "scout.nii.gz")
    task = make_plan("segmentation", size=(16, 16, 16)).task
    dataset = read_dataset(DatasetSpec(root, "nifti", channels=FILES), task)
    assert [item.reason for item in dataset.left_out] == [rule_codes.NOT_SELECTED]
    assert [sample.patient for sample in dataset.samples] == ["P1", "P2", "P3"]
    first, second, _ = (sample.load() for sample in dataset.samples)
    assert (first.names, second.names) == (("t1", "t2"), ("t1",))
    assert first.pixels.shape == (2, 12, 10, 8) and first.spacing == pytest.approx((1, 1.2, 2))
    expected = smooth((12, 10, 8), AFFINE)
    np.testing.assert_allclose(first.pixels[0], expected)
    # Where the second one reaches, worked out here from where its outermost voxels lie.
    corner, end = (COARSE @ [0, 0, 0, 1])[:3], (COARSE @ [8, 8, 7, 1])[:3]
    low, high = np.minimum(corner, end), np.maximum(corner, end)
    grid = np.stack(np.meshgrid(*map(np.arange, (12, 10, 8)), indexing="ij"), -1)
    place = grid * [1, 1.2, 2]
    inside = ((place >= low) & (place <= high)).all(-1)
    assert 200 < inside.sum() < inside.size
    np.testing.assert_allclose(first.pixels[1][inside], expected[inside], atol=2e-2)
    assert np.isfinite(first.pixels).all() and dataset.samples[0].mask().sum() == 3 * 5 * 3


def test_sequences_of_other_places_or_sizes_are_left_out(tmp_path: Path, make_plan: Any) -> None:
    names = [{"name": "t1"}, {"name": "t2"}]
    content = make_plan("segmentation", size=(16, 16, 16)).model_dump(exclude_defaults=True)
    prep = content["preprocessing"] | {"channels": 2, "channel": names}
    plan = plan_from(content | {"preprocessing": prep})
    (tmp_path / "far").mkdir()
    root = volumes(tmp_path / "far", "a", far=True)
    dataset = read_dataset(DatasetSpec(root, "nifti", channels=FILES), plan.task)
    with pytest.raises(DataError, match=f"{rule_codes.CHANNEL_POSITION}: 1"):
        prepare("site", dataset.samples, plan)
    flat = tmp_path / "flat"
    for k, part in enumerate(("images/t1", "images/t2", "masks")):
        (flat / part).mkdir(parents=True)
        side = 20 if k == 1 else 16
        Pillow.fromarray(np.eye(side, dtype=np.uint8)).save(flat / part / "x.png")
    channels = {name: ChannelOptions(folder=name) for name in ("t1", "t2")}
    plan = plan_with(make_plan, *names)
    dataset = read_dataset(DatasetSpec(flat, "folders", channels=channels), plan.task)
    with pytest.raises(DataError, match=f"{rule_codes.CHANNEL_SHAPE}: 1"):
        prepare("site", dataset.samples, plan)
