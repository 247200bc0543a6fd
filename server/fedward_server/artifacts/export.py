"""A delivered model as a MONAI bundle with an ONNX file, for those who have no Fedward."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.errors import ConfigError, ModelError, OutputError
from fedward.models import build_model, from_arrays
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan
from fedward_server.artifacts.bundle_config import (
    RESEARCH,
    expected_input,
    how_to_use,
    inference_config,
    metadata,
)

# A network as files that run without Fedward: TorchScript and ONNX.
#
# Both hold one network for images of the plan's size and batches of any; no place of this machine.

INPUT, OUTPUT = "image", "pred"
_OPSET: Final = 18


def torchscript(model: nn.Module, example: Tensor, extra: Mapping[str, bytes]) -> bytes:
    """The network as TorchScript.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    example : Tensor
        ``(N, C, *size)``.
    extra : mapping
        Files to lay in, by name; MONAI looks for ``metadata.json``.
    """
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(model, example, check_trace=False)  # type: ignore[no-untyped-call]
        file = io.BytesIO()
        torch.jit.save(traced, file, _extra_files=dict(extra))
    return _without_places(file.getvalue())


def onnx_model(model: nn.Module, example: Tensor, about: Mapping[str, str]) -> bytes:
    """The network as ONNX, with text about it in its metadata.

    Raises
    ------
    ConfigError
        The packages that this needs are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        raise needed() from None
    batch = torch.export.Dim("batch")
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=_OPSET,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: batch},),
        )
    proto = program.model_proto  # type: ignore[union-attr]
    _forget(proto)
    proto.producer_name = "fedward"
    onnx.helper.set_model_props(proto, dict(about))
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


def load_torchscript(content: bytes) -> nn.Module:
    """What :func:`torchscript` wrote."""
    with _quiet():
        return torch.jit.load(io.BytesIO(content))  # type: ignore[no-any-return, no-untyped-call]


def needed() -> ConfigError:
    """The error for missing packages."""
    return ConfigError(
        "exports need onnx, onnxscript and onnxruntime",
        fix="pip install 'fedward[export]'",
    )


def _forget(proto: Any) -> None:
    """Take out where in which file each node came from."""
    proto.doc_string = ""
    functions = [proto.graph, *proto.functions]
    for graph in functions:
        graph.doc_string = ""
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
    for part in (
        *proto.graph.value_info,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
    ):
        part.doc_string = ""
        del part.metadata_props[:]
    del proto.graph.metadata_props[:]


def _without_places(content: bytes) -> bytes:
    """TorchScript without its debug records, which quote the source files of this machine."""
    result = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(result, "w", zipfile.ZIP_STORED) as new,
    ):
        for item in old.infolist():
            if not item.filename.endswith(".debug_pkl"):
                new.writestr(zipfile.ZipInfo(item.filename), old.read(item))
    return result.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    # Shapes are fixed on purpose, and the exporters tell of packages that are not wanted.
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


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
        A package that this needs is missing, or the model reads a table or named channels.
    ModelError
        The arrays do not fit the plan, or a file gives another output than the network.
    OutputError
        The folder is there already, or cannot be written.
    """
    if given.plan.table is not None:
        raise ConfigError(
            "an export takes an image alone, and this model reads a table beside it",
            fix="Deliver the safetensors file; fedward-client predict applies it with its table",
        )
    if given.plan.preprocessing.channel:
        raise ConfigError(
            "an export reads one file, and this model takes channels that it names",
            fix="Deliver the safetensors file; fedward-client predict applies it",
        )
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
    difference = _check(exported_network(given.plan, model), content, _images(given.plan, 3))
    _write(target, content)
    return Exported(tuple(sorted(content)), difference)


class _ChannelsFirst(nn.Module):
    """A network whose last axis becomes the one after the images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *size)`` to the network's ``(N, *S, K)`` as ``(N, K, *S)``."""
        found: Tensor = self.network(x).movedim(-1, 1)
        return found


def exported_network(plan: Plan, model: nn.Module) -> nn.Module:
    """What the files hold: the network, with its channels where MONAI expects them."""
    return _ChannelsFirst(model).eval() if plan.task.spec.bundle.channels_last else model


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
    network, bundle = exported_network(plan, model), plan.task.spec.bundle
    script, facts = files("fedward_server.artifacts.scripts"), _json(metadata(plan))
    content = {
        "models/model.onnx": onnx_model(network, example, about),
        "models/model.ts": torchscript(network, example, {"metadata.json": facts}),
        "models/model.pt": weights.getvalue(),
        "configs/metadata.json": facts,
        "configs/inference.json": _json(inference_config(plan)),
        "scripts/__init__.py": b"",
        **{
            f"scripts/{name}": (script / name).read_bytes()
            for name in ("preprocessing.py", *bundle.scripts)
        },
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
