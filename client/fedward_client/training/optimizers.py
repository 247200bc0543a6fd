"""The plan's local optimiser and its learning rate over a stage."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import nn

from fedward.plan.schema import Plan


def _plain(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimiser, whose step does not load torch's compiler to ask that it be left alone.

    That takes longer than torch's own import, in every process that trains.
    """
    step = inspect.unwrap(kind.step)

    @torch.no_grad()
    def alone(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> Any:
        return step(self, closure)

    return type(kind.__name__, (kind,), {"step": alone})


_KINDS: Final[dict[str, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": _plain(torch.optim.SGD),
    "adam": _plain(torch.optim.Adam),
    "adamw": _plain(torch.optim.AdamW),
}


def build_optimizer(plan: Plan, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser, its learning rate set anew by :func:`set_rate` before each step.

    It steps over all parameters at once: many small ones would otherwise cost more in Python than
    in arithmetic.
    """
    training, chosen = plan.training, list(parameters)
    settings: dict[str, Any] = {"lr": 0.0, "weight_decay": training.weight_decay, "foreach": True}
    if training.optimizer == "sgd":
        settings["momentum"] = training.momentum
    return _KINDS[training.optimizer](chosen, **settings)


def rate_at(plan: Plan, round_: int, part: float) -> float:
    """Learning rate in a round (from 1), ``part`` (0 to 1) of whose steps are done.

    The cosine runs over the stage's rounds (Loshchilov and Hutter, 2017, arXiv:1608.03983) and
    ends at a hundredth of the stage's rate; the polynomial falls as (1 - t)^0.9 (Chen et al., 2018,
    arXiv:1606.00915; nnU-Net). A warm-up begins at a hundredth and rises linearly. The round of the
    sites' own models is one of its own, without warm-up.
    """
    stage, place = plan.stage_of(round_)
    rate, progress = stage.learning_rate, (place + part) / stage.rounds
    warmup = plan.training.warmup_rounds
    if plan.personal is not None and round_ == plan.own_round:
        rate, progress, warmup = plan.personal.learning_rate or rate, part, 0
    if place < warmup:
        rate *= 0.01 + 0.99 * (place + part) / warmup
    if plan.training.schedule == "constant":
        return rate
    if plan.training.schedule == "polynomial":
        return rate * math.pow(1.0 - progress, 0.9)
    return rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
