"""Apply a model to one part of a site's patients, and count its answers."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.plan.schema import FLIP_AXES, Patch, Plan
from fedward.tasks.base import Counts
from fedward.tasks.private_counts import NoisyTables, add_noise, patient_weights
from fedward_client.data.sample import PreparedSite
from fedward_client.data.transforms import crop, grid_for, restored
from fedward_client.data.volumes import Volumes, let_go
from fedward_client.training.batches import FILLER
from fedward_client.training.device import autocast
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Source

_BATCH: Final = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True)
class Answers:
    """What a model answered, image by image; it never leaves the trainer.

    Attributes
    ----------
    plan : Plan
        The study.
    values : NDArray
        See the task's :meth:`fedward.tasks.base.TaskSpec.answers`.
    targets : NDArray
        Classification: ``(N,)`` class indices or ``(N, K)`` flags.
    patients : NDArray
        ``(N,)`` the patient of each image.
    """

    plan: Plan
    values: NDArray[np.float64]
    targets: NDArray[Any]
    patients: NDArray[np.int64]

    def exact(self) -> Counts:
        """Counts over all images."""
        return self.plan.task.spec.count(self.values, self.targets)

    def noisy(
        self, how: NoisyTables, randbelow: Callable[[int], int] = secrets.randbelow
    ) -> dict[str, NDArray[np.int64]]:
        """Tables with noise; nothing exact is in them."""
        weights = np.full(len(self.patients), how.unit, np.int64)
        if how.by_patient:
            weights = patient_weights(self.patients, how.images_per_patient, how.unit, randbelow)
        task = self.plan.task
        tables = task.spec.tables(task, self.values, self.targets, weights, how.parts)
        noisy = add_noise(tables, how.scale, randbelow)
        return task.spec.withhold(noisy, how.least) if how.least else noisy


@torch.no_grad()
def evaluate(
    plan: Plan,
    module: nn.Module,
    source: Source,
    site: PreparedSite,
    indices: NDArray[np.int64],
    runtime: Runtime,
    *,
    surface: bool,
) -> Answers:
    """The model's answers on the given images.

    An image on which the model gives no finite number counts as answered by chance: whether an
    evaluation succeeds must not depend on a single patient.

    Parameters
    ----------
    module : nn.Module
        Takes what ``source`` gives.
    indices : NDArray
        ``(n,)`` images; at least one.
    surface : bool
        Segmentation: whether to measure HD95 too, which takes most of the time.
    """
    module.eval()
    if site.volumes is not None:
        return _of_volumes(plan, module, source, site.volumes, indices, runtime, surface=surface)
    spec, found = plan.task.spec, []
    # All batches have one size: kernels round by it, and an answer must not depend on how many
    # other images there are. Fewer where memory ran out.
    most = min(_BATCH[runtime.torch_device.type], runtime.physical_batch)
    starts = range(0, len(indices), most)
    for part, start in enumerate(starts, 1):
        batch = indices[start : start + most]
        filled = np.full(most, FILLER)
        filled[: len(batch)] = batch
        inputs, _ = source.plain(filled)
        with autocast(runtime.torch_device, private=False):
            logits = module(*inputs).float()[: len(batch)]
        targets, spacing = np.asarray(site.targets[batch]), site.spacing[batch]
        found.append(spec.answers(plan.task, logits, targets, spacing, surface=surface))
        if runtime.watch is not None:
            runtime.watch(part, len(starts))
    if not found:
        raise ValueError("nothing to evaluate on")
    values = np.concatenate(found, axis=spec.answer_axis)
    return Answers(plan, values, np.asarray(site.targets[indices]), site.patients[indices])


_WINDOW_PIXELS: Final = {"cpu": 1 << 19, "cuda": 1 << 23}  # of all windows at once, or one window


def _of_volumes(
    plan: Plan,
    module: nn.Module,
    source: Source,
    volumes: Volumes,
    indices: NDArray[np.int64],
    runtime: Runtime,
    *,
    surface: bool,
) -> Answers:
    """The same where an image is larger than the model's input."""
    site, found = source.site, []
    for number, index in enumerate(indices, 1):
        mask = _mask(plan, module, source, volumes, index, runtime)[None]
        truth, spacing = np.array(volumes.truth[index])[None], site.spacing[index][None]
        let_go(volumes.truth)
        answers = plan.task.spec.answers_of_masks
        found.append(answers(plan.task, mask, truth, spacing, surface=surface))
        if runtime.watch is not None:
            runtime.watch(number, len(indices))
    values = np.concatenate(found, axis=plan.task.spec.answer_axis)
    return Answers(plan, values, np.zeros(0, np.uint8), site.patients[indices])


def _mask(
    plan: Plan,
    module: nn.Module,
    source: Source,
    volumes: Volumes,
    index: int,
    runtime: Runtime,
) -> NDArray[np.uint8]:
    """The most likely class of each pixel of an image, on the grid of its file."""
    shape, spacing = volumes.truth[index].shape, tuple(source.site.spacing[index].tolist())
    grid = grid_for(shape, spacing, plan.preprocessing)
    likely = _answer(plan, module, source, index, runtime)
    likely = crop(likely, tuple(volumes.sides[index].tolist()))
    # One class after another: all of them on a fine grid may be larger than the memory.
    best, mask = restored(likely[:1], grid, shape)[0], np.zeros(shape, np.uint8)
    for k in range(1, len(likely)):
        one = restored(likely[k : k + 1], grid, shape)[0]
        mask[one > best] = k
        best = np.maximum(best, one)
    return mask


def _answer(
    plan: Plan, module: nn.Module, source: Source, index: int, runtime: Runtime
) -> NDArray[np.float32]:
    """Probabilities ``(K, *S)`` over a prepared image."""
    return over_windows(
        plan, lambda inputs: module(source.through(inputs)), source.volume(index), runtime
    )


def over_windows(
    plan: Plan, network: Callable[[Tensor], Tensor], volume: Tensor, runtime: Runtime
) -> NDArray[np.float32]:
    """Probabilities over an image that is larger than a model's input.

    Parameters
    ----------
    plan : Plan
        With patches.
    network : callable
        From windows ``(n, C, *size)`` to logits ``(n, K, *size)``.
    volume : Tensor
        ``(1, C, *S)``, prepared.
    runtime : Runtime
        The machine.

    Returns
    -------
    NDArray
        ``(K, *S)``: the mean over windows, and over mirrored ones where the plan asks for them.
    """
    prep, patch = plan.preprocessing, plan.preprocessing.patch or Patch()
    axes = [2 + FLIP_AXES[name] for name in patch.flips]
    ways = [list(some) for k in range(len(axes) + 1) for some in combinations(axes, k)]

    def window(inputs: Tensor) -> Tensor:
        with autocast(runtime.torch_device, private=False):
            seen = (network(inputs.flip(way)).float().flip(way) for way in ways)
            return torch.stack(list(seen)).mean(dim=0)

    at_once = max(1, _WINDOW_PIXELS[runtime.torch_device.type] // math.prod(prep.size))
    logits: Tensor = sliding_window_inference(
        volume,
        prep.size,
        min(at_once, runtime.physical_batch),
        window,
        overlap=patch.overlap,
        mode="gaussian",
        sw_device=runtime.torch_device,
        device="cpu",
    )
    return logits[0].softmax(dim=0).numpy()
