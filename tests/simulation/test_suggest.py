"""Plans by nnU-Net's rules from counts of sites' images."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from fedward.errors import DataError
from fedward.plan import load_plan
from fedward.plan.schema import Task
from fedward_client.data.fingerprint import (
    Bins,
    Fingerprint,
    bin_of,
    fingerprint,
    intensity,
    quantile,
    value_of,
)
from fedward_client.data.sample import Image, Sample
from fedward_client.data.survey import survey
from fedward_simulation.first_study import draft, write
from fedward_simulation.suggest import bytes_of, choose, shape_for

VOLUMES = Task(kind="segmentation", dimensions=3, classes=("a", "b"))


def of(shape: tuple[int, ...], spacing: tuple[float, ...] = (), images: int = 40) -> Fingerprint:
    """Of images that are all alike."""
    sides = tuple(Bins({bin_of(side): images}) for side in shape)
    spaced = tuple(Bins({bin_of(one): images}) for one in spacing or ())
    empty = tuple(Bins() for _ in shape)
    return Fingerprint(images, images, sides, spaced or empty, (images,), {1: images}, 0, {})


def volumes(count: int, seed: int, low: float = -900.0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = []
    for k in range(count):
        shape = (int(rng.integers(14, 20)), 24, 10)
        pixels = np.full((1, *shape), low, np.float32)
        pixels[0, 4:8, 4:8, 2:6] = rng.uniform(0, 80, (4, 4, 4))
        mask = np.zeros(shape, np.uint8)
        mask[4:8, 4:8, 2:6] = 1 + (k == 0)
        image = Image(pixels, (0.8, 0.8, 3.0))
        made.append(Sample(f"{seed}-{k}", lambda i=image: i, mask=lambda m=mask: m))  # type: ignore[misc]
    return made


def test_fingerprints_add_up_and_few_images_are_told_of_with_others() -> None:
    parts = [volumes(12, 0), volumes(9, 1)]
    whole = fingerprint([*parts[0], *parts[1]], VOLUMES)
    added = fingerprint(parts[0], VOLUMES) + fingerprint(parts[1], VOLUMES)
    assert replace(added, intensities={}) == replace(whole, intensities={})
    assert added.intensities == pytest.approx(whole.intensities)
    assert (whole.images, whole.patients, whole.classes, whole.absolute) == (21, 21, (19, 2), 21)
    assert quantile(whole.spacings[2], 0.5) == pytest.approx(3.0, rel=0.03)
    assert 0 <= intensity(whole, 0.5) < intensity(whole, 99.5) < 85
    assert sum(whole.intensities.values()) == pytest.approx(21)

    left = fingerprint(parts[0], VOLUMES).released(5)
    assert left is not None and left.classes == (11, 0)  # of one image the second class is not told
    for bins in (*left.sides, *left.spacings):
        assert sum(bins.values()) == 12 and min(bins.values()) >= 5
    assert fingerprint(parts[0][:4], VOLUMES).released(5) is None
    assert value_of(bin_of(1.0)) == 1.0
    unread = Sample("p", lambda: Image(np.zeros((1, 4, 4), np.float32), (1.0, 1.0)), (0,))
    assert fingerprint([unread], VOLUMES).images == 0


def test_patch_levels_and_widths_follow_nnu_net_s_rules() -> None:
    small = shape_for(of((35, 50, 36), (1.0, 1.0, 1.0)), 8.0)
    assert small.patch == (40, 56, 40) and small.widths == (32, 64, 128, 256) and small.whole
    large = shape_for(of((512, 512, 300), (0.8, 0.8, 1.5)), 8.0)
    assert not large.whole and large.spacing == pytest.approx((0.8, 0.8, 1.5), rel=0.03)
    assert large.batch == 2 and large.memory <= 8 and large.widths[-1] == 320
    # About as many voxels as nnU-Net's reference, in the image's proportions.
    assert 0.5 < math.prod(large.patch) / 128**3 < 1.3
    assert large.patch[0] == large.patch[1] > large.patch[2]
    for shape in (small, large):
        assert all(side % 2 ** (len(shape.widths) - 1) == 0 for side in shape.patch)
        assert 2 * bytes_of(shape.patch, shape.widths) <= 8 * 2**30
    # Thick slices: the 10th percentile in place of the median.
    thick = of((512, 512, 20), (0.7, 0.7, 5.0))
    bins = Bins({bin_of(2.5): 8, bin_of(5.0): 32})
    assert shape_for(replace(thick, spacings=(*thick.spacings[:2], bins)), 8.0).spacing[2] < 2.6
    assert shape_for(of((300, 320)), 8.0).spacing == ()


def test_a_suggested_plan_is_whole_and_says_why(tmp_path: Path) -> None:
    for site in ("north", "south", "tiny"):
        for place in range(2 if site == "tiny" else 6):
            values = np.random.default_rng(place).integers(0, 255, (40, 56), np.uint8)
            for folder, picture in (("images", values), ("masks", (values > 99).astype(np.uint8))):
                target = tmp_path / "scans" / site / folder / f"{place}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Pillow.fromarray(picture).save(target)
    found = replace(survey(tmp_path / "scans"), classes=("bright",))
    rules = partial(choose, memory=0.2, least=5, private=False)
    write(draft(found, "scans", tmp_path, private=False, choose=rules), tmp_path)
    plan = load_plan(tmp_path / "plan.toml")
    assert plan.model.name == "dynunet" and plan.preprocessing.size == (40, 56)
    text = (tmp_path / "plan.toml").read_text("utf-8")
    assert "plan suggest" in text and "init" not in text
    assert "Nearly all images fit into this size." in text
    with pytest.raises(DataError, match="3 sites of fewer than 7 patients"):
        draft(found, "scans", tmp_path, private=False, choose=partial(rules, least=7))


def test_rare_classes_weigh_more(tmp_path: Path) -> None:
    for place in range(30):
        folder = tmp_path / "scans" / ("rare" if place < 6 else "usual")
        folder.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(np.full((24, 24), place, np.uint8)).save(folder / f"{place}.png")
    rules = partial(choose, memory=8.0, least=5, private=False)
    made = draft(survey(tmp_path / "scans"), "scans", tmp_path, private=False, choose=rules)
    write(made, tmp_path)
    plan = load_plan(tmp_path / "plan.toml")
    weights = dict(zip(plan.task.classes, plan.training.class_weights or (), strict=True))
    assert weights["rare"] == pytest.approx(2 * weights["usual"], rel=0.02)
