"""A network as files that run without Fedward: TorchScript and ONNX.

Both hold one network for images of the plan's size and batches of any; no place of this machine.
"""

from __future__ import annotations

import io
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedward.errors import ConfigError

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
