"""Whole sites, and the cache against kills, damage and changes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from fedward.errors import DataError, OutputError
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.prepare import Means, prepare
from fedward_client.data.sample import SPLITS, Image, Sample

RNG = np.random.default_rng(0)
ROOT = str(Path(__file__).parents[3])


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
    site = prepare("x", cohort(bad=(3, 4)), make_plan(), means=Means(workers))
    assert site.left_out == {"not readable": 2}
    assert site.patients.tolist() == [k // 2 for k in range(40) if k not in (3, 4)]


def test_nothing_readable_is_an_error_without_names(make_plan):
    with pytest.raises(DataError, match="not readable: 4") as caught:
        prepare("x", cohort(4, bad=range(4)), make_plan())
    assert "PATIENT" not in str(caught.value)
    with pytest.raises(DataError, match="must have images"):
        prepare("x", [], make_plan())


def test_workers_change_nothing(make_plan):
    one, many = (prepare("x", cohort(bad=(7,)), make_plan(), means=Means(w)) for w in (1, 4))
    np.testing.assert_array_equal(one.images, many.images)
    assert all((one.split[s] == many.split[s]).all() for s in SPLITS)


def test_the_number_of_torch_threads_is_as_before(make_plan):
    before = torch.get_num_threads()
    prepare("x", cohort(), make_plan(size=(24, 24)), means=Means(2))
    with pytest.raises(DataError):
        prepare("x", cohort(2, bad=(0, 1)), make_plan())
    assert torch.get_num_threads() == before


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
    samples = [
        Sample(f"p{k}", lambda: Image(np.zeros((1, 16, 16), np.float32), (1.0, 1.0)), (0,))
        for k in range(3)
    ]
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


def test_leftovers_are_swept_and_what_is_being_written_is_kept(tmp_path, make_plan):
    for name in ("left", "owned"):
        (tmp_path / f".partial-{name}").mkdir()
    handle = os.open(tmp_path / ".partial-owned", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    prepare("x", cohort(), make_plan(), cache=tmp_path)
    os.close(handle)
    assert {p.name for p in tmp_path.glob(".partial-*")} == {".partial-owned"}


KILLED = """
import sys, time
import numpy as np
from pathlib import Path
from fedward_client.data.prepare import prepare
from fedward_client.data.sample import Image, Sample
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
        env={"PYTHONPATH": ROOT},
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
    for k, sample in enumerate(dataset.samples[:12]):
        mask = sample.mask()
        # The voxel whose centre lies closest, axis by axis.
        nearest = [
            ((np.arange(m) + 0.5) * n / m).astype(int)
            for n, m in zip(mask.shape, (32, 48, 32), strict=True)
        ]
        np.testing.assert_array_equal(site.targets[k], mask[np.ix_(*nearest)])
