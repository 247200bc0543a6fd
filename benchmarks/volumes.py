"""Full-size CT volumes: memory of a site, and the share of a training step that is reading.

Synthetic volumes of 512×512×300 voxels (a body, noise, a lesion) at a site of 2 patients and at
one of 10, which two sites of a study of 20 would be: prepare into the cache, train, and the small
site answers for one whole volume. Each step runs in a process of its own; memory is the peak of its
resident set. Beside it MONAI's PersistentDataset with the same crop reads the same volumes.
Writes ``benchmarks/volumes.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and its simulation.py would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

import numpy as np
import torch

from fedward.models import build_model, to_arrays
from fedward.plan import Plan, plan_from
from fedward.plan.load import canonical, plan_hash
from fedward.protocol import RoundOrder
from fedward_client.data.prepare import prepare
from fedward_client.data.sample import Image, PreparedSite, Sample
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Source
from fedward_client.training.trainer import Trainer

SHAPE = (512, 512, 300)
PLAN: dict[str, Any] = {
    "version": 1,
    "study": {"name": "volumes"},
    "task": {"kind": "segmentation", "dimensions": 3, "classes": ["lesion"]},
    "preprocessing": {
        "size": [96, 96, 96],
        "window": [-1000, 1000],
        "intensity": "unit",
        "patch": {"overlap": 0.1},
    },
    "model": {"name": "unet", "channels": [8, 16, 32, 64]},
    "training": {
        "rounds": 2,
        "learning_rate": 1e-3,
        "local_steps": 4,
        "batch_size": 2,
        "loss": "dice_ce",
    },
    "privacy": {"mechanism": "none"},
    "metrics": {"report": ["dice", "hd95"], "primary": "dice"},
}


@dataclass(frozen=True)
class Phantom:
    """One patient's CT, or its mask, made anew each time that it is read."""

    patient: int
    mask: bool = False

    def __call__(self) -> Any:
        """The image in HU, or the uint8 mask."""
        rng = np.random.default_rng(self.patient)
        centre = [int(rng.integers(n // 3, n // 2)) for n in SHAPE]
        box = tuple(slice(c, c + 24) for c in centre)
        if self.mask:
            mask = np.zeros(SHAPE, np.uint8)
            mask[box] = 1
            return mask
        block = rng.normal(0, 20, (64, 64, 60)).astype(np.float32)
        repeats = [-(-n // m) for n, m in zip(SHAPE, block.shape, strict=True)]
        pixels = np.tile(block, repeats)[tuple(slice(n) for n in SHAPE)]
        pixels[box] += 100
        return Image(pixels[None], (0.8, 0.8, 1.0))

    def identity(self) -> str:
        """What it is, for the cache's key."""
        return repr((self, SHAPE))


def peak() -> float:
    """MiB of the largest resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prepared(folder: Path, patients: int) -> tuple[Plan, PreparedSite]:
    """The site; made where it is not in the cache."""
    plan = plan_from(PLAN)
    samples = [Sample(f"p{k}", Phantom(k), None, Phantom(k, True)) for k in range(patients)]
    made = prepare("site", samples, plan, folder)
    parts = {**made.split, "train": np.arange(patients), "test": np.arange(1)}
    return plan, replace(made, split=parts)


def preparing(folder: Path, patients: int) -> dict[str, float]:
    """Into the cache."""
    prepared(folder, patients)
    return {"prepare": peak()}


def training(folder: Path, patients: int) -> dict[str, float]:
    """Two rounds, the first of which warms up."""
    plan, made = prepared(folder, patients)
    trainer = Trainer(plan, made, Runtime(randomness="seeded"))
    arrays = to_arrays(build_model(plan, 0))
    reading, patches = 0.0, Source._patches

    def timed(*given: Any) -> Any:
        nonlocal reading
        started = time.perf_counter()
        batch = patches(*given)
        reading += time.perf_counter() - started
        return batch

    Source._patches = timed  # type: ignore[method-assign]
    digest, text = plan_hash(plan), canonical(plan)
    for round_ in (1, 2):
        reading = 0.0
        order = RoundOrder(plan=text, plan_hash=digest, round=round_, account=False)
        _, outcome = trainer.train(arrays, order)
    steps = outcome.steps
    return {"train": peak(), "step": outcome.seconds / steps, "read": reading / steps}


def answering(folder: Path, patients: int) -> dict[str, float]:
    """The mask of one whole volume and its figures, by a network that has learnt nothing."""
    plan, made = prepared(folder, patients)
    trainer = Trainer(plan, made, Runtime(randomness="seeded"))
    text, digest = canonical(plan), plan_hash(plan)
    order = RoundOrder(plan=text, plan_hash=digest, round=0, part="test", account=False)
    started = time.perf_counter()
    trainer.evaluate(to_arrays(build_model(plan, 0)), order)
    return {"answer": peak(), "seconds": time.perf_counter() - started}


def persistent(folder: Path, patients: int) -> dict[str, float]:
    """The same patches by MONAI's PersistentDataset: whole volumes from disk, then a crop."""
    from monai.data import PersistentDataset
    from monai.transforms import Compose, RandCropByPosNegLabeld

    def whole(patient: int) -> dict[str, Any]:
        image, mask = Phantom(patient)(), Phantom(patient, True)()
        return {"image": torch.from_numpy(image.pixels), "mask": torch.from_numpy(mask)[None]}

    crop = RandCropByPosNegLabeld(
        ["image", "mask"], "mask", PLAN["preprocessing"]["size"], pos=1, neg=2, num_samples=1
    )
    data = PersistentDataset(range(patients), Compose([whole, crop]), folder / "monai")
    for k in range(patients):
        data[k]
    started = time.perf_counter()
    for k in range(patients):
        data[k]
    return {"read": 2 * (time.perf_counter() - started) / patients, "train": peak()}


STEPS = {
    "preparing": preparing,
    "training": training,
    "answering": answering,
    "persistent": persistent,
}


def measure(steps: Sequence[str], patients: int, shape: list[int]) -> dict[str, float]:
    """Steps of one site, each in a process of its own."""
    made: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            command = [sys.executable, __file__, "--step", step, "--folder", folder]
            command += ["--patients", str(patients), "--shape", *map(str, shape)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            made |= json.loads(done.stdout.splitlines()[-1])
            print(f"{step}, {patients} patients: {made}", flush=True)
    return made


def page(found: dict[int, dict[str, float]], other: dict[str, float], shape: list[int]) -> str:
    """The figures as Markdown."""
    sides = "×".join(map(str, shape))
    lines = [
        "# Volumes",
        "",
        f"Written by `python benchmarks/volumes.py`: synthetic CT of {sides} voxels, patches of "
        "96³, two in a step, `unet` with widths 8, 16, 32, 64, one thread. Peak resident memory of "
        "a process for each step, its imports (410 MiB) included.",
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}; busy with other work.",
        "",
        "| patients | prepare, MiB | train, MiB | step, s | reading, s | share |",
        "|---|---|---|---|---|---|",
    ]
    for patients, one in found.items():
        memory = " | ".join(f"{one[name]:.0f}" for name in ("prepare", "train"))
        share = one["read"] / one["step"]
        lines.append(
            f"| {patients} | {memory} | {one['step']:.2f} | {one['read']:.3f} | {share:.1%} |"
        )
    lines += [
        "",
        f"The answer for one whole volume took {found[min(found)]['seconds']:.0f} s and "
        f"{found[min(found)]['answer']:.0f} MiB. MONAI's "
        f"PersistentDataset with RandCropByPosNegLabeld took {other['read']:.2f} s to read two "
        f"such patches, and {other['train']:.0f} MiB: it loads a whole volume for each.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all and write the page; or one step, in a process of its own."""
    global SHAPE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--patients", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--shape", type=int, nargs=3, default=list(SHAPE))
    parser.add_argument("--out", type=Path, default=HERE / "volumes.md")
    options = parser.parse_args()
    SHAPE = tuple(options.shape)
    torch.set_num_threads(1)
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder, options.patients[0])))
        return
    small = min(options.patients)
    found = {
        n: measure(["preparing", "training", *["answering"] * (n == small)], n, options.shape)
        for n in options.patients
    }
    other = measure(["persistent"], small, options.shape)
    options.out.write_text(page(found, other, options.shape), "utf-8")


if __name__ == "__main__":
    main()
