"""Models as named arrays: conversion, saving, and the parameters that a stage trains."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from fedward.compression import compressed_size, model_size
from fedward.errors import ModelError, OutputError
from fedward.files import replace_file
from fedward.integrity import check_model, unreadable
from fedward.models.patterns import matches
from fedward.models.registry import outline
from fedward.networks import MODELS
from fedward.plan.schema import FEATURE_MEAN, Plan
from fedward.rule_codes import RuleCode

Arrays = dict[str, NDArray[np.float32]]
NORMS: Final = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class ModelFacts:
    """What a plan's model looks like, before any weight exists.

    Attributes
    ----------
    parameters : int
        Numbers that can be trained.
    bytes : int
        Size of one exchange of the whole model.
    arrays : mapping
        Name to shape and dtype, in the order of :func:`to_arrays`.
    """

    parameters: int
    bytes: int
    arrays: Mapping[str, tuple[tuple[int, ...], str]]


def describe(plan: Plan) -> ModelFacts:
    """Names, shapes and sizes of the plan's model, without making it."""
    model = outline(plan)
    state = model.state_dict()
    return ModelFacts(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(4 * tensor.numel() for tensor in state.values()),
        arrays={name: (tuple(tensor.shape), "float32") for name, tensor in state.items()},
    )


def to_arrays(model: nn.Module) -> Arrays:
    """Copy parameters and persistent buffers, in state-dict order.

    Returns
    -------
    dict
        Name to float32, C-contiguous array that shares no memory with the model.

    Raises
    ------
    ModelError
        A tensor is not of floating point.
    """
    return {name: _array(name, tensor) for name, tensor in model.state_dict().items()}


def _array(name: str, tensor: torch.Tensor) -> NDArray[np.float32]:
    if not tensor.is_floating_point():
        raise ModelError(
            RuleCode.ARRAYS_FLOATING,
            value=str(tensor.dtype),
            fix="Use the models of the registry",
            where=name,
        )
    copy = tensor.detach().to("cpu", torch.float32, copy=True)
    return np.asarray(copy.numpy(), order="C")


def from_arrays(
    model: nn.Module, arrays: Mapping[str, NDArray[np.float32]], partial: bool = False
) -> None:
    """Copy `arrays` into the model, all of them or, after a fault, none.

    Parameters
    ----------
    model : nn.Module
        Changed in place; device and dtype stay.
    arrays : mapping
        Name to float32 array.
    partial : bool
        Whether arrays of the model may be missing.

    Raises
    ------
    ModelError
        Names the first array that is unknown, missing, of another shape or dtype, or not finite.
    """
    state = model.state_dict()
    if not partial and (missing := [name for name in state if name not in arrays]):
        raise ModelError(
            RuleCode.ARRAYS_COVER,
            values={"missing": len(missing)},
            fix="Send every array",
            where=missing[0],
        )
    for name, array in arrays.items():
        _check(name, array, state)
    with torch.no_grad():
        for name, array in arrays.items():
            # from_numpy wants writable memory; the copy is what makes read-only arrays welcome.
            state[name].copy_(torch.from_numpy(np.array(array)))


def _check(name: str, array: NDArray[np.float32], state: Mapping[str, torch.Tensor]) -> None:
    if name not in state:
        raise ModelError(RuleCode.ARRAYS_KNOWN, fix="Build both ends from one plan", where=name)
    if array.shape != (shape := tuple(state[name].shape)):
        raise ModelError(
            f"the array must have shape {shape}",
            code=RuleCode.ARRAYS_SHAPE,
            value=array.shape,
            fix="Build both ends from one plan",
            where=name,
        )
    if array.dtype != np.float32:
        raise ModelError(
            RuleCode.ARRAYS_FLOAT32, value=str(array.dtype), fix="Convert it", where=name
        )
    if not np.isfinite(array).all():
        raise ModelError(
            RuleCode.ARRAYS_FINITE,
            fix="Lower the learning rate, or leave it out",
            where=name,
        )


def trainable_names(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Names of the parameters that match any shell-style pattern, in the model's order.

    The mean of the features is no parameter; it is named by nothing but its whole name alone.

    Raises
    ------
    ModelError
        A pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    if tuple(patterns) == (FEATURE_MEAN,):
        names = [name for name, _ in model.named_buffers() if name == FEATURE_MEAN] or names
    for number, pattern in enumerate(patterns, start=1):
        if not any(matches(name, pattern) for name in names):
            raise ModelError(
                RuleCode.PATTERN,
                values={"pattern": number},
                value=pattern,
                fix=f"The names look like {names[0]} and {names[-1]}",
                where="stages.train",
            )
    return tuple(n for n in names if any(matches(n, pattern) for pattern in patterns))


def site_names(model: nn.Module, plan: Plan) -> frozenset[str]:
    """Names of the parameters that the plan keeps at each site: they train and are never sent."""
    personal = plan.personal
    if personal is None or not personal.keeps_layers:
        return frozenset()
    every = [name for name, _ in model.named_parameters()]
    if personal.method == "fedbn":
        found = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            if isinstance(module, NORMS)
            for name, _ in module.named_parameters(recurse=False)
        }
    else:
        by_pattern = {
            pattern: {name for name in every if matches(name, pattern)}
            for pattern in personal.local or (MODELS[plan.model.name].head,)
        }
        for pattern, names in by_pattern.items():
            if not names:
                raise ModelError(
                    RuleCode.NOTHING_OWN,
                    value=pattern,
                    fix=f"The names look like {every[0]} and {every[-1]}",
                    where="personal.local",
                )
        found = set().union(*by_pattern.values())
    if not found:
        raise ModelError(
            RuleCode.NOTHING_OWN, fix="Choose another method, or another network", where="personal"
        )
    return frozenset(found)


def shared_names(model: nn.Module, plan: Plan, round_: int) -> tuple[str, ...]:
    """Names of the parameters that travel in a round: what its stage trains, in the model's order.

    Raises
    ------
    ModelError
        A pattern matches no parameter, all that trains stays at the sites, or nothing of it where
        the method trains that first.
    """
    if round_ > plan.rounds:
        return ()
    trained = trainable_names(model, plan.stage_of(round_)[0].train)
    own = site_names(model, plan)
    names = tuple(name for name in trained if name not in own)
    if not names:
        raise ModelError(
            RuleCode.NOTHING_SHARED,
            fix="Train more in this stage, or choose another method",
            where="personal.method",
        )
    first = plan.personal is not None and plan.personal.method == "fedrep"
    if first and len(names) == len(trained) and not plan.is_centering(round_):
        raise ModelError(
            RuleCode.NOTHING_OWN,
            fix="Train some of them in each stage, or choose fedper",
            where="personal.method",
        )
    return names


def traffic(plan: Plan, round_: int) -> tuple[int, int]:
    """Bytes of tensors that a site sends and receives in a round of training.

    Received are the arrays that train, compressed as the plan says; those that do not come once.

    Raises
    ------
    ModelError
        As :func:`shared_names`.
    """
    model = outline(plan)
    state, names = model.state_dict(), shared_names(model, plan, round_)
    shapes: dict[str, tuple[int, ...]] = {name: tuple(state[name].shape) for name in names}
    spec, how = plan.strategy.spec, plan.compression_of(round_)
    size: int = 4 * sum(math.prod(shape) for shape in shapes.values())
    up, down = size * (1 + len(spec.sent)), size * (1 + len(spec.received))
    if how is not None:
        up = compressed_size(how, shapes)
    if how is not None and how.download is not None:
        down = model_size(how, shapes)
    return up, down


def most_traffic(plan: Plan) -> tuple[int, int]:
    """The most of :func:`traffic` over all stages."""
    starts = accumulate((stage.rounds for stage in plan.schedule[:-1]), initial=1)
    up, down = zip(*(traffic(plan, round_) for round_ in starts), strict=True)
    return max(up), max(down)


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Let exactly the parameters `names` be trained; all others get ``requires_grad=False``.

    Raises
    ------
    ModelError
        The model has no parameter of that name.
    """
    wanted, parameters = set(names) - {FEATURE_MEAN}, dict(model.named_parameters())
    if unknown := sorted(wanted - set(parameters)):
        raise ModelError(
            RuleCode.PARAMETER_KNOWN, fix="Take names from the model", where=unknown[0]
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)


def save_model(
    path: Path, arrays: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]
) -> str:
    """Write arrays and metadata as one safetensors file; a reader sees all of it or none.

    Equal arrays and metadata give equal bytes, so that two runs can be compared by a digest.

    Returns
    -------
    str
        SHA-256 of the file, 64 hexadecimal digits.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    content = _ordered(save(whole, dict(metadata)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content, mode=0o600)
    except OSError as error:
        raise OutputError(
            "the model file must be writable", value=error.strerror, fix="Check space and rights"
        ) from error
    return hashlib.sha256(content).hexdigest()


def _ordered(content: bytes) -> bytes:
    # The library writes metadata in an order that changes from call to call.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def load_model(path: Path, sha256: str = "") -> tuple[Arrays, dict[str, str]]:
    """Read what :func:`save_model` wrote.

    Parameters
    ----------
    path : Path
        The file.
    sha256 : str
        What :func:`save_model` gave; "" does not check it.

    Raises
    ------
    ModelError
        The file is missing, is not a safetensors file, or is another one.
    """
    if sha256:
        check_model(path, sha256)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return arrays, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise unreadable(error) from error
