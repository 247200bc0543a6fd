"""Patches of whole volumes: where they lie, what a step reads, privacy, and answers for images."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.dp.accounting import Mechanism
from fedward.errors import OutputError
from fedward.models import build_model, to_arrays
from fedward.plan import Plan
from fedward_client.data.prepare import Means, doubts, prepare
from fedward_client.data.sample import Image, PreparedSite, Sample
from fedward_client.data.volumes import file_of, let_go, marked_pixels
from fedward_client.training import source as source_module
from fedward_client.training.batches import FILLER
from fedward_client.training.evaluate import evaluate
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Source
from fedward_client.training.trainer import Trainer
from fedward_simulation.ray_engine import load_site, store_sites
from fedward_simulation.sites import digest_of_sites, pool_sites

SEEDED = Runtime(randomness="seeded")
PRIVATE = {
    "mechanism": "dp-sgd",
    "epsilon": 8.0,
    "delta": 1e-3,
    "clipping_norm": 0.1,
    "sampling_rate": 0.5,
}
SPACING = (1.0, 2.5, 0.8)
COARSE = (1.3, 2.7, 1.1)
Make = Callable[..., Any]


def shape_of(k: int) -> tuple[int, int, int]:
    return 12 + 3 * k, 20, 34 - 2 * k


@dataclass(frozen=True)
class Known:
    """A volume of its own size; every voxel has a value of its own, the ball's are above 1000."""

    k: int
    mask: bool = False
    side: int = 0

    def __call__(self) -> Any:
        shape = (self.side,) * 3 if self.side else shape_of(self.k)
        values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / np.prod(shape)
        mask = np.zeros(shape, np.uint8)
        mask[3:9, 6 + self.k : 13 + self.k, 8:15] = 1
        values[mask > 0] += 1000
        return mask if self.mask else Image(values[None], SPACING)

    def identity(self) -> str:
        return repr(self)


def cohort(count: int = 6, side: int = 0) -> list[Sample]:
    return [Sample(f"p{k}", Known(k, side=side), None, Known(k, True, side)) for k in range(count)]


@pytest.fixture
def patch_plan(make_plan: Make) -> Make:
    def build(patch: dict[str, Any] | None = None, **more: Any) -> Plan:
        task = {"kind": "segmentation", "dimensions": 3, "classes": ["ball"]}
        prep = {"size": [16, 16, 16], "patch": patch or {}, "window": [0.0, 2000.0]}
        base = {
            "task": task,
            "preprocessing": {**prep, "intensity": "unit", **more.pop("preprocessing", {})},
            "model": {"name": "unet", "channels": [4, 8]},
            "training": {"loss": "dice_ce", "local_epochs": None, "local_steps": 2},
            "metrics": {"report": ["dice", "hd95"], "primary": "dice"},
        }
        return make_plan(**{**base, **more})

    return build


def source_of(plan: Plan, site: PreparedSite) -> Source:
    return Source(plan, site, SEEDED, None, "")


def test_volumes_keep_their_own_size_and_small_ones_are_padded(
    patch_plan: Make, tmp_path: Path
) -> None:
    plan = patch_plan()
    plain, kept = prepare("x", cohort(), plan), prepare("x", cohort(), plan, tmp_path)
    assert isinstance(kept.images[0], np.memmap)
    for k in range(6):
        shape = tuple(max(n, 16) for n in shape_of(k))
        assert plain.images[k].shape == (1, *shape)
        assert plain.targets[k].shape == shape
        assert tuple(plain.volumes.sides[k]) == shape_of(k)
        assert plain.volumes.truth[k].shape == shape_of(k)
        for one, other in (
            (plain.images, kept.images),
            (plain.targets, kept.targets),
            (plain.volumes.truth, kept.volumes.truth),
        ):
            np.testing.assert_array_equal(one[k], other[k])
    np.testing.assert_allclose(plain.spacing, [SPACING] * 6)
    assert digest_of_sites([plain]) == digest_of_sites([kept])


def test_a_patch_larger_than_every_image_is_told(patch_plan: Make) -> None:
    some, all_ = (
        patch_plan(preprocessing={"size": [side] * 3, "window": [0.0, 2000.0]}) for side in (32, 40)
    )
    assert not list(doubts(prepare("x", cohort(), some), some))
    assert list(doubts(prepare("x", cohort(), all_), all_)) == [
        "all 6 images fit into one patch of 40 x 40 x 40, which cuts nothing out"
    ]


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_a_patch_is_a_piece_of_its_image_and_has_a_class_in_its_middle_as_often_as_told(
    patch_plan: Make, foreground: float
) -> None:
    plan = patch_plan({"foreground": foreground})
    site, size, starts = prepare("x", cohort(), plan), 16, []
    indices = np.repeat(np.arange(1, 6), 40)
    (images,), masks = source_of(plan, site).augmented(indices, torch.Generator().manual_seed(3))
    for k, image, mask in zip(indices, images[:, 0].numpy(), masks.numpy(), strict=True):
        whole = site.images[k][0]
        # Each value is there once.
        start = np.argwhere(whole == image[0, 0, 0])[0] if image[0, 0, 0] else None
        if start is None:  # black border
            continue
        box = tuple(slice(a, a + size) for a in start)
        np.testing.assert_array_equal(whole[box], image)
        np.testing.assert_array_equal(site.targets[k][box], mask)
        starts.append(tuple(start))
    assert len(set(starts)) > 20
    seen = masks.flatten(1).any(1).float().mean()
    assert seen == 1.0 if foreground else seen < 0.95
    if foreground:
        # Where the border does not push the patch, its middle is marked.
        free = [k for k in range(len(masks)) if masks[k, 8, 8, 8] == 1]
        assert len(free) > len(masks) / 2


def test_every_patch_takes_as_many_random_numbers(patch_plan: Make) -> None:
    """What one patient's image is like moves no other patient's patch."""
    plan = patch_plan({"foreground": 0.5})
    site = prepare("x", cohort(), plan)
    other = replace(
        site,
        volumes=replace(site.volumes, marked=np.full_like(site.volumes.marked, -1)),
    )
    mixed = replace(
        site,
        volumes=replace(
            site.volumes,
            marked=np.where(
                np.arange(6).reshape(-1, 1, 1, 1) == 2, other.volumes.marked, site.volumes.marked
            ),
        ),
    )
    made = []
    for one, indices in ((site, [1, 2, 3]), (mixed, [1, 2, 3]), (site, [1, FILLER, 3])):
        generator = torch.Generator().manual_seed(11)
        (images,), _ = source_of(plan, one).augmented(np.array(indices), generator)
        made.append((images[0], images[2], generator.get_state()))
    for found in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], found, strict=True))


def test_marked_pixels_are_of_their_class_and_all_over_it() -> None:
    mask = np.zeros((9, 8, 7), np.uint8)
    mask[2:5, 1:7, 3], mask[6, 6, 6] = 1, 3
    one, two, three = marked_pixels(mask, 3)
    assert {tuple(place) for place in one} == {tuple(place) for place in np.argwhere(mask == 1)}
    assert (two == -1).all()
    assert {tuple(place) for place in three} == {(6, 6, 6)}


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, PRIVATE], ids=["plain", "private"])
def test_a_repeated_round_gives_the_same_bytes_from_memory_and_from_the_cache(
    patch_plan: Make, make_order: Make, tmp_path: Path, privacy: dict[str, Any]
) -> None:
    plan = patch_plan({"per_image": 2}, privacy=privacy)
    arrays = to_arrays(build_model(plan, 0))
    sites = [prepare("x", cohort(), plan), prepare("x", cohort(), plan, tmp_path)]
    (one, facts), (other, _) = (
        Trainer(plan, site, SEEDED).train(arrays, make_order(plan)) for site in sites
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert facts.steps == 2
    assert (facts.loss is None) == bool(plan.privacy.on)
    again, _ = Trainer(plan, sites[0], SEEDED).train(arrays, make_order(plan, 2))
    assert any(not np.array_equal(one[name], again[name]) for name in one)


@pytest.mark.parametrize("per_image", [1, 5])
def test_a_patient_moves_a_step_by_no_more_than_the_clipping_norm(
    patch_plan: Make, make_order: Make, per_image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise and with plain SGD, a step's change is the clipped sum over its divisor."""
    norm = PRIVATE["clipping_norm"]
    plan = patch_plan(
        {"per_image": per_image, "foreground": 1.0},
        privacy={**PRIVATE, "sampling_rate": 1.0},
        training={
            "loss": "dice_ce",
            "local_epochs": None,
            "local_steps": 1,
            "optimizer": "sgd",
            "learning_rate": 1.0,
            "schedule": "constant",
        },
    )
    site = prepare("x", cohort(), plan)
    # Hostile: all that the last patient has is huge.
    images = site.images.copy()
    images[4] = images[4] * 1e6
    noiseless = Mechanism(noise_multiplier=0.0, sampling_rate=1.0, steps=1)
    monkeypatch.setattr(Trainer, "_private_mechanism", lambda self: noiseless)
    arrays = to_arrays(build_model(plan, 0))
    sums = []
    for count in (5, 4):
        one = replace(site, images=images, split={**site.split, "train": np.arange(count)})
        made, _ = Trainer(plan, one, SEEDED).train(arrays, make_order(plan, account=False))
        moved = [(made[name] - arrays[name]).astype(np.float64).ravel() for name in sorted(made)]
        sums.append(np.concatenate(moved) * count)
    # She comes last, so that the others' patches lie where they lie without her.
    assert norm / 2 < np.linalg.norm(sums[0] - sums[1]) <= norm * (1 + 1e-3)
    assert norm < np.linalg.norm(sums[1]) <= 4 * norm * (1 + 1e-3)


class Above(nn.Module):
    """Says `ball` for values above a threshold, pixel by pixel, and may shift its answer."""

    def __init__(self, threshold: float, shift: int = 0) -> None:
        super().__init__()
        self.threshold, self.shift = threshold, shift

    def forward(self, x: Tensor) -> Tensor:
        score = (x[:, :1] - self.threshold) * 100
        return torch.cat([-score, score], 1)


def figures(plan: Plan, site: PreparedSite, module: nn.Module) -> NDArray[np.float64]:
    everyone = np.arange(len(site.images))
    return evaluate(
        plan, module, source_of(plan, site), site, everyone, SEEDED, surface=True
    ).values


@pytest.mark.parametrize("patch", [{}, {"overlap": 0.0}, {"flips": ["depth", "horizontal"]}])
def test_a_whole_image_is_answered_on_its_own_grid(patch_plan: Make, patch: dict[str, Any]) -> None:
    plan = patch_plan(patch)
    values = figures(plan, prepare("x", cohort(), plan), Above(0.25))
    np.testing.assert_array_equal(values[0], 1)
    np.testing.assert_array_equal(values[2], 0)


def test_figures_after_resampling_are_those_of_the_original_grid_in_mm(patch_plan: Make) -> None:
    """Against MONAI's metrics, on what an independent resampling gives."""
    from scipy import ndimage

    plan = patch_plan(preprocessing={"spacing": list(COARSE)})
    site = prepare("x", cohort(), plan)
    values = figures(plan, site, Above(0.3))
    for k in range(6):
        own, sides = shape_of(k), site.volumes.sides[k]
        inner = site.images[k][0]
        starts = [(n - m) // 2 for n, m in zip(inner.shape, sides, strict=True)]
        inner = inner[tuple(slice(a, a + n) for a, n in zip(starts, sides, strict=True))]
        likely = 1 / (1 + np.exp(-200 * (inner.astype(np.float64) - 0.3)))
        # Where the middle of each original voxel lies on the resampled grid.
        ratios = np.divide(SPACING, COARSE)
        lines = [(np.arange(n) + 0.5) * f - 0.5 for n, f in zip(own, ratios, strict=True)]
        places = np.meshgrid(*lines, indexing="ij")
        back = ndimage.map_coordinates(likely, places, order=1, mode="nearest") > 0.5
        truth = Known(k, True)()
        one, two = (torch.from_numpy(np.stack([m == 0, m == 1])[None]) for m in (back, truth > 0))
        dice = compute_dice(one.float(), two.float(), include_background=False)
        hd95 = compute_hausdorff_distance(
            one.float(), two.float(), percentile=95, spacing=list(SPACING)
        )
        assert values[0, k, 0] == pytest.approx(float(dice), abs=1e-3)
        assert values[2, k, 0] == pytest.approx(float(hd95), abs=1e-3)
    assert 0.8 < values[0].min() < 1


def test_hd95_is_in_the_mm_of_the_file(patch_plan: Make) -> None:
    plan = patch_plan()
    site = prepare("x", cohort(), plan)
    # The truth is moved by two voxels of 2.5 mm: surfaces are 5 mm apart.
    moved = site.volumes.truth.copy()
    for k, mask in enumerate(site.volumes.truth):
        moved[k] = np.roll(mask, -2, axis=1)
    site = replace(site, volumes=replace(site.volumes, truth=moved))
    values = figures(plan, site, Above(0.25))
    np.testing.assert_allclose(values[2], 5.0)


def test_pooled_sites_are_the_sites_volumes(patch_plan: Make) -> None:
    plan = patch_plan()
    parts = [prepare("a", cohort(3), plan), prepare("b", cohort(6)[3:], plan)]
    pooled = pool_sites(parts)
    assert len(pooled.images) == 6
    np.testing.assert_array_equal(pooled.images[4], parts[1].images[1])
    np.testing.assert_array_equal(pooled.volumes.truth[4], parts[1].volumes.truth[1])
    np.testing.assert_array_equal(pooled.volumes.sides[3:], parts[1].volumes.sides)


def test_a_stored_site_of_volumes_comes_back_as_it_was(patch_plan: Make, tmp_path: Path) -> None:
    site = prepare("x", cohort(), patch_plan())
    store_sites([site], tmp_path)
    again = load_site(tmp_path / "site-0", "x")
    assert digest_of_sites([again]) == digest_of_sites([site])
    for k, mask in enumerate(site.volumes.truth):
        np.testing.assert_array_equal(again.volumes.truth[k], mask)
    np.testing.assert_array_equal(again.volumes.sides, site.volumes.sides)
    np.testing.assert_array_equal(again.volumes.marked, site.volumes.marked)


# --- memory and disk ---------------------------------------------------------------------------


def resident(path: Path) -> int:
    """Bytes of a mapped file that count as this process's memory (proc(5))."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def test_a_step_reads_its_patches_alone_and_keeps_none_of_the_volumes(
    patch_plan: Make, make_order: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = patch_plan(training={"loss": "dice_ce", "local_epochs": None, "local_steps": 3})
    site = prepare("x", cohort(8, side=128), plan, tmp_path)
    site = replace(site, split={**site.split, "train": np.arange(8)})
    place = file_of(site.images)
    assert place is not None
    whole, read = place.stat().st_size, []
    assert whole > 8 * 4 * 128**3
    let_go(site.images)

    def spied(*arrays: NDArray[Any]) -> None:
        read.append(resident(place))
        let_go(*arrays)

    monkeypatch.setattr(source_module, "let_go", spied)
    Trainer(plan, site, SEEDED).train(to_arrays(build_model(plan, 0)), make_order(plan))
    assert len(read) == 3
    # Pages and what the system reads around them come on top of 8 patches.
    assert 8 * 4 * 16**3 <= max(read) < whole / 3
    assert resident(place) == 0


def test_the_cache_makes_room_volume_by_volume_and_holds_its_bound(
    patch_plan: Make, tmp_path: Path
) -> None:
    plan = patch_plan()
    one = sum(4 * np.prod(s) for s in (shape_of(k) for k in range(6)))

    def size() -> int:
        return sum(file.stat().st_size for file in tmp_path.rglob("*.npy"))

    prepare("x", cohort(), plan, tmp_path)
    (first,), most = list(tmp_path.iterdir()), round(1.5 * size())
    held = prepare("x", cohort(5), plan, tmp_path, Means(cache_bytes=most))
    assert not first.exists()
    assert one / 2 < size() <= most
    with pytest.raises(OutputError, match="Raise cache_gib"):
        prepare("x", cohort(4), plan, tmp_path, Means(cache_bytes=10_000))
    assert not list(tmp_path.glob(".partial-*"))
    assert float(held.images[0].sum()) > 0


def test_a_damaged_entry_is_made_again_and_drawing_otherwise_needs_no_other(
    patch_plan: Make, tmp_path: Path
) -> None:
    plan = patch_plan()
    site = prepare("x", cohort(), plan, tmp_path)
    prepare("x", cohort(), patch_plan({"foreground": 0.9, "per_image": 3}), tmp_path)
    (entry,) = tmp_path.iterdir()
    wanted = [np.array(one) for one in site.images]
    with (entry / "voxels.npy").open("r+b") as file:
        file.truncate(1000)
    again = prepare("x", cohort(), plan, tmp_path)
    for one, other in zip(wanted, again.images, strict=True):
        np.testing.assert_array_equal(one, other)
