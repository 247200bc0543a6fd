"""What privacy costs: a DP-SGD step against a plain one, per model and way to the gradients.

Run by hand on a quiet machine::

    .venv/bin/python benchmarks/dp.py                     # every model, one thread, all cores, GPU
    .venv/bin/python benchmarks/dp.py --threads 1 --models cnn unet --json

Each cell is a process of its own, so that its peak memory is its own. Within a cell plain and
private steps take turns, so that a change of the machine's load meets both. ``sampled`` is Opacus's
``hooks`` mode with the layers of :mod:`fedward.dp.layers`. ``noise`` is such a step over the
same one with noise from torch's generator in place of the keystream.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import torch
from opacus.grad_sample.utils import wrap_model
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from fedward.dp.gaussian import GaussianNoise
from fedward.dp.ghost_clipping import SumOptimizer, backward, keep_books
from fedward.dp.layers import sampled
from fedward.models.registry import build_model
from fedward.networks import MODELS
from fedward.plan.schema import ModelName, Plan
from fedward_client.training.runtime import Runtime

MODES = ("plain", "hooks", "sampled", "functorch", "ghost", "bookkeeping")
OURS = ("sampled", "bookkeeping")  # on the layers of fedward.dp.layers
KINDS = {"sampled": "hooks"}
WARM_UP = 1


def main() -> None:
    """Print a table, or one JSON object a line."""
    options = _options()
    if options.cell:
        name, device, mode = options.cell
        print(json.dumps(_measure(name, device, mode, options)))
        return
    if not options.json:
        titles = f"{'plain ms':>9}{'dp ms':>9}{'ratio':>7}{'noise':>7}{'MB':>7}"
        print(f"{'model':<20}{'device':<9}{'mode':<11}{titles}")
    for cell in _cells(options):
        row = _run(cell, options)
        print(json.dumps(row) if options.json else _line(row), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = get_args(ModelName)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--dimensions", type=int, default=2, choices=(2, 3))
    parser.add_argument("--batch", type=int, default=16, help="images in a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a cell may take")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def _cells(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    devices = [f"cpu:{n}" for n in dict.fromkeys(options.threads)]
    if torch.cuda.is_available():
        devices.append("cuda")
    for name in options.models:
        if options.dimensions not in MODELS[name].dimensions:
            continue
        yield from ((name, device, mode) for device in devices for mode in options.modes)


def _run(cell: tuple[str, str, str], options: argparse.Namespace) -> dict[str, Any]:
    keys = ("size", "dimensions", "batch", "steps")
    flags = [part for key in keys for part in (f"--{key}", str(getattr(options, key)))]
    command = [sys.executable, __file__, *flags, "--cell", *cell]
    row = dict(zip(("model", "device", "mode"), cell, strict=True))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {**row, "failed": "timeout"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return {**row, "failed": last.split(":")[0].split(".")[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**row, **result}


def _line(row: dict[str, Any]) -> str:
    head = f"{row['model']:<20}{row['device']:<9}{row['mode']:<11}"
    if "failed" in row:
        return f"{head}{row['failed']:>9}"
    dp = f"{row['dp_ms']:>9.1f}{row['ratio']:>7.2f}" if "dp_ms" in row else " " * 16
    noise = f"{row['noise_ratio']:>7.2f}" if "noise_ratio" in row else " " * 7
    return f"{head}{row['plain_ms']:>9.1f}{dp}{noise}{row['peak_mb']:>7.0f}"


def _measure(name: str, device: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    warnings.filterwarnings("ignore", category=UserWarning)
    kind, _, threads = device.partition(":")
    Runtime(device=kind, threads=int(threads or torch.get_num_threads())).enter()
    plan = _plan(name, options)
    runs = [_plain_step(plan, kind, options.batch)]
    if mode != "plain":
        runs += _private_steps(plan, kind, mode, options.batch)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(WARM_UP + options.steps):
        for taken, run in zip(times, runs, strict=True):
            taken.append(_seconds(run, kind))
    medians = [1e3 * statistics.median(taken[WARM_UP:]) for taken in times]
    result: dict[str, Any] = {"plain_ms": medians[0], "peak_mb": _peak_mb(kind)}
    if mode != "plain":
        result |= {"dp_ms": medians[1], "ratio": medians[1] / medians[0]}
    if len(medians) > 2:
        result["noise_ratio"] = statistics.median(
            ours / theirs for ours, theirs in zip(*(t[WARM_UP:] for t in times[1:]), strict=True)
        )
    return result


def _seconds(run: Callable[[], None], kind: str) -> float:
    # CPU time where there is one thread: other work on the machine does not lengthen it.
    alone = kind == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    run()
    if kind == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _peak_mb(kind: str) -> float:
    if kind == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _plain_step(plan: Plan, kind: str, batch: int) -> Callable[[], None]:
    model, images, labels = _parts(plan, kind, batch)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    criterion = nn.CrossEntropyLoss()

    def run() -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()

    return run


class _TorchNoise:
    """Noise from torch's generator, drawn and added as it was before the keystream."""

    def add_(
        self, sums: Sequence[Tensor], noise_multiplier: float, clipping_norm: float, divisor: float
    ) -> None:
        for one in sums:
            deviation = noise_multiplier * clipping_norm
            one.add_(torch.normal(0.0, deviation, one.shape, device=one.device, dtype=one.dtype))
        for one in sums:
            one /= divisor


def _private_steps(plan: Plan, kind: str, mode: str, batch: int) -> list[Callable[[], None]]:
    """The private step; for our own ways also with torch's noise, on the same model."""
    model, images, labels = _parts(plan, kind, batch)
    model = sampled(model) if mode in OURS else model
    books = mode == "bookkeeping"
    wrapped = keep_books(model) if books else wrap_model(model, KINDS.get(mode, mode))
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": batch}
    inner = torch.optim.AdamW(model.parameters(), 1e-3)
    noises: list[Any] = []
    if books:
        noises = [GaussianNoise(os.urandom(32)), _TorchNoise()]
        optimizer = SumOptimizer(inner, noise=noises[0], **settings)
    else:
        stock = DPOptimizerFastGradientClipping if mode == "ghost" else DPOptimizer
        optimizer = stock(inner, **settings)
    criterion = _image_loss if mode != "ghost" else _Ghost(wrapped, optimizer)

    owners = torch.arange(batch)

    def run() -> None:
        optimizer.zero_grad()
        if books:
            backward(wrapped, _PerImage("none")(wrapped(images), labels), owners, 1.0)
        else:
            criterion(wrapped(images), labels).backward()
        optimizer.step()

    def run_with(noise: Any) -> None:
        optimizer.noise = noise
        run()

    return [partial(run_with, noise) for noise in noises] or [run]


class _Ghost:
    """Ghost clipping's loss: its ``backward`` goes through the network twice."""

    def __init__(self, wrapped: nn.Module, optimizer: Any) -> None:
        self.loss = DPLossFastGradientClipping(wrapped, optimizer, _PerImage())

    def __call__(self, out: Tensor, labels: Tensor) -> Any:
        return self.loss(out, labels)


class _PerImage(nn.Module):
    """Cross entropy of each image; a segmentation's pixels are averaged."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction  # what Opacus reads, to know how to reduce over images

    def forward(self, out: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(out, labels, reduction="none")
        per_image = losses.flatten(1).mean(1) if losses.ndim > 1 else losses
        return per_image if self.reduction == "none" else per_image.mean()


def _image_loss(out: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = _PerImage()(out, labels)
    return loss


def _parts(plan: Plan, kind: str, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    size = plan.preprocessing.size
    shape = (batch, *size) if plan.task.kind == "segmentation" else (batch,)
    images = torch.randn(batch, plan.preprocessing.channels, *size)
    labels = torch.randint(0, plan.task.outputs, shape)
    return build_model(plan, seed=0).to(kind), images.to(kind), labels.to(kind)


def _plan(name: str, options: argparse.Namespace) -> Plan:
    segmentation, lite = "segmentation" in MODELS[name].tasks, MODELS[name].frozen_statistics
    # Such a network's plan must name weights; the speed of a step does not depend on them.
    weights = {"initial_weights": {"file": "none.pth", "sha256": "0" * 64}} if lite else {}
    return Plan.model_validate(
        {
            "version": 1,
            "study": {"name": "dp"},
            "task": {
                "kind": "segmentation" if segmentation else "classification",
                "dimensions": options.dimensions,
                "classes": ["one", "two"],
            },
            "preprocessing": {
                "size": [options.size] * options.dimensions,
                "channels": 3 if lite else 1,
            },
            "model": {"name": name, **weights},
            "training": {
                "rounds": 1,
                "learning_rate": 0.001,
                "local_steps": 1,
                "loss": "dice_ce" if segmentation else "cross_entropy",
            },
            "privacy": {"mechanism": "none"},
            "metrics": {"report": ["loss"], "primary": "loss"},
        }
    )


if __name__ == "__main__":
    main()
