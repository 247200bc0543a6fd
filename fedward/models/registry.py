"""Registry of networks: builds the model that a plan names."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from fedward.dp.layers import reuses_layers, unknown_layers
from fedward.errors import PlanError
from fedward.models.centering import with_centering
from fedward.models.table_head import with_table
from fedward.networks import MODELS
from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode

GradSampleMode = Literal["hooks", "functorch", "bookkeeping"]


def build_model(plan: Plan, seed: int) -> nn.Module:
    """Build the plan's network, with weights that depend on `seed` alone.

    Parameters
    ----------
    plan : Plan
        Names the architecture, its widths and dropout, the input size and channels, the classes.
    seed : int
        Seed of the fresh weights. The caller's random state is left as it was.

    Returns
    -------
    nn.Module
        On the CPU, float32, in training mode; ready for per-sample gradients.

    Raises
    ------
    PlanError
        The architecture has no such choice of widths or dropout, or not at this image size.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one would reseed the caller's GPUs as well.
        torch.default_generator.manual_seed(seed)
        model = _built(plan)
    _check_size(plan)
    return model.train()


def outline(plan: Plan) -> nn.Module:
    """The plan's network without storage (on the ``meta`` device): names, shapes, nothing else.

    One for all callers, each order and reply being held against it: not to be changed.
    """
    return _outline(plan.model_dump_json())


@lru_cache(maxsize=16)
def _outline(plan_json: str) -> nn.Module:
    plan = Plan.model_validate_json(plan_json)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _built(plan)


def example_inputs(plan: Plan, count: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Empty inputs of the plan's network.

    Returns
    -------
    tuple of Tensor
        Images ``(count, C, *size)``, and the rows ``(count, width)`` of a table where it reads one.
    """
    prep = plan.preprocessing
    images = torch.empty((count, prep.channels, *prep.size), device=device)
    if plan.table is None:
        return (images,)
    return images, torch.empty((count, plan.table.width), device=device)


def _built(plan: Plan) -> nn.Module:
    model = MODELS[plan.model.name].build(plan)
    model = with_centering(model) if plan.model.feature_centering else model
    return with_table(model, plan.table) if plan.table is not None else model


def _check_size(plan: Plan) -> None:
    expected = (2, *plan.task.spec.output_shape(plan.task, plan.preprocessing.size))
    if _output_shape(plan.model_dump_json()) == expected:
        return
    raise PlanError(
        RuleCode.MODEL_SIZE,
        values={"model": plan.model.name},
        value="x".join(map(str, plan.preprocessing.size)),
        fix="Make the sides larger, or multiples of 16",
        where="preprocessing.size",
    )


@lru_cache(maxsize=64)  # a simulation builds one plan's model for every site
def _output_shape(plan_json: str) -> tuple[int, ...] | None:
    plan = Plan.model_validate_json(plan_json)
    try:
        return tuple(outline(plan)(*example_inputs(plan, 2, "meta")).shape)
    except (RuntimeError, ValueError):
        return None


# Which way to per-sample gradients to take.
#
# From ``benchmarks/dp.py`` (figures in ``benchmarks/dp.md``): on one CPU thread and on two,
# ``bookkeeping`` took less time than ``hooks`` or as much, and less memory for large models;
# ``functorch`` stays behind, but takes every layer. No GPU was at hand: there the choice follows
# from the work and the memory of each way. Opacus' own ``ghost`` mode is none of them: it
# multiplies the losses with the clipping factors and goes through the network a second time, whose
# rounding nothing bounds.


def best_mode(model: nn.Module) -> GradSampleMode:
    """The mode to take by default.

    Parameters
    ----------
    model : nn.Module
        From :func:`build_model`.

    Returns
    -------
    {"bookkeeping", "hooks", "functorch"}
        ``bookkeeping`` where it knows every layer that has parameters, ``hooks`` where a layer is
        called more than once, so that its gradients must be summed before their norm; call
        :func:`fedward.dp.layers.sampled` on the model before wrapping then, and not for
        ``functorch``, Opacus' way for any layer.
    """
    if reuses_layers(model):
        return "hooks"
    return "bookkeeping" if next(unknown_layers(model), None) is None else "functorch"
