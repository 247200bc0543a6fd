"""Gradient inversion: an image drawn back out of one update.

Geiping et al., 2020, arXiv:2003.14053: the image whose gradient points where the update points
(cosine similarity), kept smooth by total variation, found by Adam on the signs of its gradients.
The worst case for the site: one step, one patient, one image, the label known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.metrics.regression import compute_ssim_and_cs
from numpy.typing import NDArray
from torch import Tensor

from fedward.dp.accounting import calibrate, epsilon_spent, private_steps_in
from fedward.errors import PrivacyError
from fedward.files import replace_file
from fedward.models import build_model, from_arrays, trainable_names
from fedward.plan.load import canonical, plan_from, plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder
from fedward_client.data.sample import PreparedSite
from fedward_client.training.losses import build_loss
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

Arrays = Mapping[str, NDArray[Any]]
STEPS = 400
_RATE = 0.1
_NOBODY = np.empty(0, np.int64)
_SMOOTHNESS = 1e-2
_MOST_EPSILON = 100.0  # of a plan


@dataclass(frozen=True)
class Drawn:
    """An image drawn back, and how like the original it is.

    Attributes
    ----------
    image : NDArray
        ``(C, *S)``, in the original's range.
    mse : float
        Mean squared error, the original's range being 0 to 1.
    ssim : float
        Structural similarity (1 for the same image), mean over the channels.
    correlation : float
        Pearson's, over all pixels.
    """

    image: NDArray[np.float32]
    mse: float
    ssim: float
    correlation: float


def invert(
    plan: Plan,
    site: PreparedSite,
    image: int,
    arrays: Arrays,
    runtime: Runtime,
    seed: int,
    steps: int = STEPS,
) -> Drawn:
    """Train one step on one image as the plan says, and draw the image back from the update.

    Parameters
    ----------
    image : int
        Index of the image.
    arrays : mapping
        The model before the update.
    """
    alone = replace(
        site,
        images=np.array(site.images[image : image + 1]),
        targets=np.array(site.targets[image : image + 1]),
        patients=np.zeros(1, np.int64),
        spacing=site.spacing[image : image + 1],
        table=None if site.table is None else site.table[image : image + 1],
        split={"train": np.zeros(1, np.int64), "validation": _NOBODY, "test": _NOBODY},
    )
    worst = one_patient_plan(plan, site.patients_in("train"))
    order = RoundOrder(
        plan=canonical(worst),
        plan_hash=plan_hash(worst),
        round=worst.first_training_round,
        seed=seed,
        account=False,
    )
    released, _ = Trainer(worst, alone, replace(runtime, cache=None)).train(arrays, order)
    found = _search(worst, alone, arrays, released, runtime, seed, steps)
    return _compare(np.asarray(alone.images[0], np.float32), found)


def one_patient_plan(plan: Plan, patients: int) -> Plan:
    """The same model, loss and noise; one plain step, in which the patient surely is.

    The noise multiplier stays what the plan's ε asks of a site with so many patients: the chance
    to be drawn rises to one, and with it the ε that this noise is worth.
    """
    content = plan.model_dump(mode="python")
    content["training"] |= {
        "local_steps": 1,
        "local_epochs": None,
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup_rounds": 0,
        "gradient_clipping": None,
    }
    content["preprocessing"]["augmentation"] = {}
    content["participation"]["minimum_patients"] = 1
    if plan.privacy.on:
        told = calibrate(plan, patients)
        before = private_steps_in(plan, 1.0, 1) - 1 if plan.is_centering(1) else 0
        steps = before + plan.rounds
        content["privacy"] |= {
            "sampling_rate": 1.0,
            "epsilon": _epsilon_of(told.noise_multiplier, steps, plan.privacy.delta or 1e-5),
        }
    return plan_from(content)


def _epsilon_of(noise: float, steps: int, delta: float) -> float:
    try:
        return min(_MOST_EPSILON, epsilon_spent(noise, 1.0, steps, delta))
    except PrivacyError:
        return _MOST_EPSILON


def _search(
    plan: Plan,
    site: PreparedSite,
    arrays: Arrays,
    released: Arrays,
    runtime: Runtime,
    seed: int,
    steps: int,
) -> NDArray[np.float32]:
    device = runtime.torch_device
    model = build_model(plan, seed=0).to(device).eval()
    from_arrays(model, arrays)
    names = trainable_names(model, plan.stage_of(plan.first_training_round)[0].train)
    named = dict(model.named_parameters())
    parameters = [named[name] for name in names]
    wanted = [torch.from_numpy(np.asarray(arrays[n] - released[n])).to(device) for n in names]
    loss = build_loss(plan, device)
    target = torch.from_numpy(np.array(site.targets)).to(device)
    # The attacker is given what a table says of the image.
    known = () if site.table is None else (torch.from_numpy(np.array(site.table)).to(device),)
    shape = (1, *site.images.shape[1:])
    guess = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    guess.requires_grad_(True)
    optimizer = torch.optim.Adam([guess], lr=_RATE)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [steps * 3 // 8, steps * 5 // 8, steps * 7 // 8], gamma=0.1
    )
    for _ in range(steps):
        found = torch.autograd.grad(
            loss(model(guess, *known).float(), target).mean(), parameters, create_graph=True
        )
        distance = _distance(found, wanted) + _SMOOTHNESS * _variation(guess)
        (guess.grad,) = torch.autograd.grad(distance, [guess])
        guess.grad.sign_()
        optimizer.step()
        schedule.step()
    return guess.detach()[0].cpu().numpy()


def _distance(found: tuple[Tensor, ...], wanted: list[Tensor]) -> Tensor:
    pairs = list(zip(found, wanted, strict=True))
    product = torch.stack([(a * b).sum() for a, b in pairs]).sum()
    sizes = [torch.stack([one.pow(2).sum() for one in side]).sum() for side in (found, wanted)]
    return 1.0 - product / (sizes[0] * sizes[1]).sqrt().clamp(min=1e-12)


def _variation(images: Tensor) -> Tensor:
    differences = [images.diff(dim=axis).abs().mean() for axis in range(2, images.ndim)]
    return torch.stack(differences).sum()


def _compare(original: NDArray[np.float32], found: NDArray[np.float32]) -> Drawn:
    low, high = float(original.min()), float(original.max())
    span = max(high - low, 1e-12)
    # The gradient tells brightness and contrast badly: those are given to the attacker.
    spread = max(float(found.std()), 1e-12)
    fitted = (found - found.mean()) / spread * original.std() + original.mean()
    shown = np.clip(fitted, low, high).astype(np.float32)
    one, other = (torch.from_numpy((x - low) / span)[None] for x in (original, shown))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = float(np.nan_to_num(np.corrcoef(original.ravel(), found.ravel())[0, 1]))
    return Drawn(shown, float((one - other).pow(2).mean()), _ssim(one, other), correlation)


def _ssim(one: Tensor, other: Tensor) -> float:
    size = min(11, *one.shape[2:])
    size -= 1 - size % 2  # odd
    dimensions = one.ndim - 2
    full, _ = compute_ssim_and_cs(
        one,
        other,
        spatial_dims=dimensions,
        kernel_size=[size] * dimensions,
        kernel_sigma=[1.5] * dimensions,
        data_range=1.0,
    )
    return float(full.mean())


def write_picture(path: Path, pictures: Mapping[str, NDArray[np.float32]]) -> None:
    """Draw images side by side into a file that its owner alone can read.

    It shows a patient: it stays where the images are.
    """
    figure = Figure(figsize=(3 * len(pictures), 3.4), layout="constrained")
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axis, (title, image) in zip(axes, pictures.items(), strict=True):
        plane = image if image.ndim == 3 else image[..., image.shape[-1] // 2]
        axis.imshow(plane.mean(axis=0), cmap="gray")
        axis.set_title(title)
        axis.set_axis_off()
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120)
    replace_file(path, content.getvalue(), mode=0o600)
