"""Every network of the registry gives the same output in its exported forms."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks import nets
from monai.networks.nets import efficientnet
from networks import NAMES, least, least_side

from fedward.models import sampled
from fedward.networks import vit
from fedward_server.artifacts.export import load_torchscript, onnx_model, torchscript

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[3]
onnxruntime = pytest.importorskip("onnxruntime")
# ResNet-34 and -50 are built of the same blocks as ResNet-18, with more of them.
# EfficientNet-B0 comes at an odd size, which asks more of its padding than an even one, UNETR with
# volumes, and RetinaNet in test_bundle.py.
ELSEWHERE = ("resnet34", "resnet50", "efficientnet-b0", "unetr", "retinanet")
FLAT = [(name, 2, None, {}) for name in NAMES if name not in ELSEWHERE]
DEEP = [(name, 3, None, {}) for name in ("cnn", "unet", "vit", "unetr")]
ODD = [
    ("efficientnet-b0", 2, 33, {}),
    ("efficientnet-lite0", 2, 21, {"model": {"taps": (2, 5), "feature_centering": True}}),
]
CASES = [pytest.param(*case, id="-".join(map(str, case[:3]))) for case in (*FLAT, *DEEP, *ODD)]
Make = Callable[..., Any]


def plan_for(plan_of: Make, name: str, dimensions: int, size: int | None, changes: Any) -> Any:
    size = least_side(name) if size is None else size
    return plan_of(name, dimensions, size, model={**least(name), **changes.get("model", {})})


@pytest.fixture
def _few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two where a network has dozens of a kind: each takes a quarter of a second."""
    monkeypatch.setattr(vit, "_LAYERS", 2)
    fewer = {"DenseNet121": {"block_config": (2, 2, 2, 2)}, "SwinUNETR": {"depths": (2, 1, 1, 1)}}
    for name, blocks in fewer.items():
        monkeypatch.setattr(nets, name, functools.partial(getattr(nets, name), **blocks))
    read = efficientnet.BlockArgs.from_string

    def seldom(text: str) -> efficientnet.BlockArgs:
        return read(text)._replace(num_repeat=2 if "o24" in text else 1)

    monkeypatch.setattr(efficientnet.BlockArgs, "from_string", seldom)


@pytest.mark.usefixtures("_few_blocks")
@pytest.mark.parametrize(("name", "dimensions", "size", "changes"), CASES)
def test_the_exported_network_gives_the_same_output(
    name: str,
    dimensions: int,
    size: int | None,
    changes: Any,
    plan_of: Make,
    trained: Make,
    images: Make,
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
