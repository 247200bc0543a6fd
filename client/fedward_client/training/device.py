"""Where training runs: device, precision, memory layout."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fedward.errors import DeviceError
from fedward.rule_codes import RuleCode


def choose_device(text: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device that is really there.

    Raises
    ------
    DeviceError
        The text is no device, or the machine lacks it.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, _, index = text.partition(":")
    if name not in {"cpu", "cuda"} or (index and not (name == "cuda" and index.isdecimal())):
        raise DeviceError(
            "the device must be auto, cpu, cuda or cuda:INDEX",
            value=text,
            fix="Choose one of these",
        )
    if name == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            RuleCode.DEVICE,
            value=f"{text}, with {torch.cuda.device_count()} CUDA devices present",
            fix="Use --device auto, or install a CUDA build of torch",
        )
    return torch.device(text)


def autocast(device: torch.device, *, private: bool) -> AbstractContextManager[object]:
    """Mixed precision on a GPU; full precision on a CPU and where gradients are clipped.

    Per-patient norms in bfloat16 would round what the privacy proof bounds.
    """
    if device.type == "cuda" and not private:
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to its device, in the layout that convolutions prefer there."""
    moved = module.to(device)
    if device.type == "cuda" and any(parameter.ndim == 4 for parameter in module.parameters()):
        moved = moved.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def place_batch(batch: Tensor, device: torch.device) -> Tensor:
    """Move images to the device, in the layout of :func:`place`."""
    moved = batch.to(device, non_blocking=True)
    if device.type == "cuda" and moved.ndim == 4:
        return moved.contiguous(memory_format=torch.channels_last)
    return moved
