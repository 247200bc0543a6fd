"""Every network of the registry gives the same output in its exported forms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedward.models import sampled
from fedward.models.registry import GRAD_SAMPLE_MODES
from fedward_server.artifacts.export import load_torchscript, onnx_model, torchscript

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[3]
onnxruntime = pytest.importorskip("onnxruntime")
# ResNet-34 and -50 are built of the same blocks as ResNet-18, with more of them.
# EfficientNet-B0 comes at an odd size, which asks more of its padding than an even one.
ELSEWHERE = ("resnet34", "resnet50", "efficientnet-b0")
NAMES = [name for name in GRAD_SAMPLE_MODES if name not in ELSEWHERE]
FLAT = [(name, 2, 32 if name == "densenet121" else 16, {}) for name in NAMES]
DEEP = [(name, 3, 16, {}) for name in ("cnn", "unet")]
ODD = [("efficientnet-lite0", 2, 21, {"model": {"taps": (2, 5)}}), ("efficientnet-b0", 2, 33, {})]
SMALL = {"resnet18": (4, 8, 8, 16), "unet": (4, 8), "attention-unet": (4, 8)}
CASES = [pytest.param(*case, id="-".join(map(str, case[:3]))) for case in (*FLAT, *DEEP, *ODD)]
Make = Callable[..., Any]


def plan_for(plan_of: Make, name: str, dimensions: int, size: int, changes: Any) -> Any:
    plan = plan_of(name, dimensions, size)
    model = {**plan.model.model_dump(), **changes.get("model", {})}
    if name in SMALL:
        model["channels"] = SMALL[name]
    return plan_of(name, dimensions, size, model=model)


@pytest.mark.parametrize(("name", "dimensions", "size", "changes"), CASES)
def test_the_exported_network_gives_the_same_output(
    name: str, dimensions: int, size: int, changes: Any, plan_of: Make, trained: Make, images: Make
) -> None:
    plan = plan_for(plan_of, name, dimensions, size, changes)
    model = trained(plan)
    given = images(plan, 3)
    with torch.no_grad():
        wanted = model(given).numpy()
    example = images(plan, 2)
    content = onnx_model(model, example, {"title": "x"})
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape[1:] == list(given.shape[1:])
    assert session.get_modelmeta().custom_metadata_map == {"title": "x"}
    np.testing.assert_allclose(
        session.run(["pred"], {"image": given.numpy()})[0], wanted, rtol=1e-3, atol=1e-4
    )
    script = torchscript(model, example, {})
    np.testing.assert_allclose(load_torchscript(script)(given).detach().numpy(), wanted, rtol=1e-5)
    for part in (b"site-packages", str(ROOT).encode(), str(Path.home()).encode() + b"/"):
        assert part not in content
        assert part not in script


def test_a_network_that_was_trained_privately_exports_alike(
    plan_of: Make, trained: Make, images: Make
) -> None:
    plan = plan_of("cnn")
    model = trained(plan)
    given = images(plan, 2)
    with torch.no_grad():
        wanted = model(given).numpy()
    private = sampled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_torchscript(torchscript(private, given, {}))
    np.testing.assert_allclose(loaded(given).detach().numpy(), wanted, rtol=1e-5)
