"""Registry of networks: builds the model that a plan names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fedward.dp.layers import reuses_layers, unknown_layers
from fedward.errors import PlanError
from fedward.models.centering import with_centering
from fedward.models.table_head import with_table
from fedward.networks import MODELS
from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode

_INITIALISERS: Final = frozenset(
    ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_")
)
_SMALL: Final = 1 << 17  # numbers in two images
_MOST_SHAPES: Final = 64
_shapes: dict[str, tuple[int, ...] | None] = {}
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
    _check_size(plan, model)
    return model.train()


def outline(plan: Plan) -> nn.Module:
    """The plan's network without storage (on the ``meta`` device): names, shapes, nothing else.

    One for all callers, each order and reply being held against it: not to be changed.
    """
    return _outline(plan.model_dump_json())


@lru_cache(maxsize=16)
def _outline(plan_json: str) -> nn.Module:
    plan = Plan.model_validate_json(plan_json)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _NoInitialWeights():
        return _built(plan).eval()  # whose levels may answer in training


class _NoInitialWeights(TorchFunctionMode):
    """Leaves out the arithmetic of initial weights, which tensors without storage do not keep.

    Some of it is written in Python for the ``meta`` device, and imports ``sympy`` for a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, unless it gives values to a tensor that has none."""
        if getattr(func, "__name__", "") in _INITIALISERS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


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


def _check_size(plan: Plan, model: nn.Module) -> None:
    key, prep = plan.model_dump_json(), plan.preprocessing
    if key not in _shapes:  # a simulation builds one plan's model for every site
        if len(_shapes) >= _MOST_SHAPES:
            _shapes.clear()
        # The outline answers the same, but the first use of the meta device imports sympy for a
        # second: longer than two small images take.
        if 2 * prep.channels * math.prod(prep.size) > _SMALL:
            _shapes[key] = _output_shape(plan, outline(plan), "meta")
        else:  # in evaluation mode: no statistics of a batch are kept, no random numbers drawn
            _shapes[key] = _output_shape(plan, model.eval(), "cpu")
    expected = (2, *plan.task.spec.output_shape(plan.task, prep.size))
    if _shapes[key] == expected:
        return
    raise PlanError(
        RuleCode.MODEL_SIZE,
        values={"model": plan.model.name},
        value="x".join(map(str, plan.preprocessing.size)),
        fix="Make the sides larger, or multiples of 16",
        where="preprocessing.size",
    )


def _output_shape(plan: Plan, model: nn.Module, device: str) -> tuple[int, ...] | None:
    try:
        with torch.no_grad():
            return tuple(model(*example_inputs(plan, 2, device)).shape)
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
