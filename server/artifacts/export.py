"""A delivered model as a MONAI bundle with an ONNX file, for those who have no Fedward."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.errors import ModelError, OutputError
from fedward.models import build_model, from_arrays
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan
from server.artifacts.graph import INPUT, load_torchscript, needed, onnx_model, torchscript
from server.artifacts.inference import inference_config
from server.artifacts.metadata import RESEARCH, expected_input, metadata
from server.artifacts.readme import how_to_use

TOLERANCE: Final = 1e-3
"""Largest difference of an output, relative to the largest output, that an export may have."""

_LICENSE: Final = """\
The model's terms are those that the study's coordinator and its sites agreed on; ask them before
you use or pass on this bundle. It comes without warranty of any kind and is not a medical device.
"""


@dataclass(frozen=True)
class Delivered:
    """A model and what is known of it.

    Attributes
    ----------
    plan : Plan
        How it was made.
    arrays : mapping
        Its arrays by name, float32.
    card : str
        The model card, Markdown.
    """

    plan: Plan
    arrays: Mapping[str, NDArray[Any]]
    card: str


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    files : tuple of str
        Inside the bundle.
    difference : float
        Largest difference between outputs of the files and of the network, on random images.
    """

    files: tuple[str, ...]
    difference: float


def export_bundle(given: Delivered, target: Path) -> Exported:
    """Write a bundle and hold both of its networks against the original.

    Parameters
    ----------
    given : Delivered
        The model.
    target : Path
        The bundle's folder; must not exist.

    Raises
    ------
    ConfigError
        A package that this needs is missing.
    ModelError
        The arrays do not fit the plan, or a file gives another output than the network.
    OutputError
        The folder is there already, or cannot be written.
    """
    if target.exists():
        raise OutputError(
            "the export's folder must be new",
            value=target.name,
            fix="Choose another with --out",
            where="--out",
        )
    model = build_model(given.plan, 0)
    from_arrays(model, given.arrays)
    model.eval()
    example = _images(given.plan, 2)
    content = _content(given, model, example)
    difference = _check(model, content, _images(given.plan, 3))
    _write(target, content)
    return Exported(tuple(sorted(content)), difference)


def _content(given: Delivered, model: nn.Module, example: Tensor) -> dict[str, bytes]:
    plan = given.plan
    about = {
        "title": plan.study.title or plan.study.name,
        "plan_sha256": plan_hash(plan),
        "classes": json.dumps(plan.task.classes),
        "task": plan.task.kind,
        "preprocessing": json.dumps(expected_input(plan)),
        "intended_use": plan.study.intended_use or RESEARCH,
    }
    weights = io.BytesIO()
    torch.save({name: value.clone() for name, value in model.state_dict().items()}, weights)
    script, facts = files("server.artifacts.scripts"), _json(metadata(plan))
    content = {
        "models/model.onnx": onnx_model(model, example, about),
        "models/model.ts": torchscript(model, example, {"metadata.json": facts}),
        "models/model.pt": weights.getvalue(),
        "configs/metadata.json": facts,
        "configs/inference.json": _json(inference_config(plan)),
        "scripts/__init__.py": b"",
        "scripts/preprocessing.py": (script / "preprocessing.py").read_bytes(),
        "docs/README.md": (given.card + how_to_use(plan)).encode(),
        "LICENSE": _LICENSE.encode(),
        "docs/license.txt": _LICENSE.encode(),
    }
    sums = (f"{hashlib.sha256(v).hexdigest()}  {name}\n" for name, v in sorted(content.items()))
    return {**content, "SHA256SUMS": "".join(sums).encode()}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _images(plan: Plan, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, plan.preprocessing.channels, *plan.preprocessing.size)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def _check(model: nn.Module, content: Mapping[str, bytes], images: Tensor) -> float:
    wanted = model(images).numpy()
    found = {
        "models/model.onnx": _run_onnx(content["models/model.onnx"], images),
        "models/model.ts": _run_script(content["models/model.ts"], images),
    }
    worst = 0.0
    for name, output in found.items():
        off = float(np.abs(output - wanted).max())
        if not off <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            raise ModelError(
                "an exported model must give the network's own output",
                value=f"{name}: off by {off:.2g}",
                fix="Report it with the plan; use the safetensors file meanwhile",
            )
        worst = max(worst, off)
    return worst


def _run_onnx(content: bytes, images: Tensor) -> NDArray[Any]:
    try:
        import onnxruntime
    except ImportError:
        raise needed() from None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {INPUT: images.numpy()})[0])


def _run_script(content: bytes, images: Tensor) -> NDArray[Any]:
    return np.asarray(load_torchscript(content)(images).numpy())


def _write(target: Path, content: Mapping[str, bytes]) -> None:
    """All or nothing: beside, then renamed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=".export-"))
    except OSError as error:
        raise _unwritable(error) from None
    try:
        for name, value in content.items():
            path = part / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(value)
        part.chmod(0o755)
        part.rename(target)
    except OSError as error:
        raise _unwritable(error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unwritable(error: OSError) -> OutputError:
    return OutputError(
        "the export must be writable",
        value=error.strerror,
        fix="Choose another folder with --out",
        where="--out",
    )
