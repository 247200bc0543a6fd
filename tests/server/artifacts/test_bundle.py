"""A bundle is one by MONAI's rules, runs without Fedward, and tells no more than its card."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from fedward.errors import ConfigError, ModelError, OutputError
from fedward.models import build_model, to_arrays
from fedward.models.finished import FinishedModel
from fedward.plan import plan_from
from fedward_client.training.runtime import Runtime
from fedward_server.artifacts import export as exporting
from fedward_server.artifacts.export import export_bundle, exported_network

pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:parsing config_file"),  # MONAI's, that a config is code
    pytest.mark.filterwarnings("ignore:NvImgCodec"),
]
Make = Callable[..., Any]
RUNNER = Path(sys.prefix) / "bundle-runner"
# Runs each code in a process of its own, which has MONAI and no Fedward.
FORKING = """
import json, os, sys
sys.modules["fedward"] = sys.modules["server"] = None
import ignite, monai.bundle
for line in sys.stdin:
    if (child := os.fork()) == 0:
        folder, code, errors = json.loads(line)
        os.chdir(folder)
        os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(2, 1)
        exec(code)
        raise SystemExit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# What MONAI's bundle specification wants of metadata.json, written down by hand: the schema itself
# is downloaded by `monai.bundle verify_metadata`, and a test has no network.
TEXT, TENSOR = {"type": "string", "minLength": 1}, ("inputs", "outputs")
FORMAT = {
    "type": "object",
    "required": [
        "type",
        "format",
        "num_channels",
        "spatial_shape",
        "dtype",
        "value_range",
        "is_patch_data",
        "channel_def",
    ],
    "properties": {
        "type": {"enum": ["image", "series", "tuples", "probabilities"]},
        "format": TEXT,
        "modality": TEXT,
        "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
        "dtype": TEXT,
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object", "additionalProperties": TEXT},
    },
}
SCHEMA = {
    "type": "object",
    "required": [
        "schema",
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
    "properties": {
        **dict.fromkeys(
            (
                "schema",
                "monai_version",
                "pytorch_version",
                "numpy_version",
                "task",
                "description",
                "authors",
                "copyright",
                "intended_use",
            ),
            TEXT,
        ),
        "version": {"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+"},
        "changelog": {"type": "object", "additionalProperties": TEXT},
        "required_packages_version": {"type": "object", "additionalProperties": TEXT},
        "network_data_format": {
            "type": "object",
            "required": list(TENSOR),
            "properties": {
                name: {"type": "object", "minProperties": 1, "additionalProperties": FORMAT}
                for name in TENSOR
            },
        },
    },
}
KINDS: dict[str, tuple[str, int, dict[str, Any], list[int]]] = {
    "classification": ("cnn", 2, {"size": [24, 32], "intensity": "unit"}, [4, 8]),
    "segmentation": ("unet", 3, {"size": [16, 16, 16], "spacing": [2.0, 2.0, 2.0]}, [4, 8]),
    # Part of each image is padding.
    "detection": ("retinanet", 2, {"size": [48, 64], "resize": "fit"}, [4, 8, 8, 8, 8, 8]),
}


@pytest.fixture(scope="module")
def by_runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, str], None]]:
    """Runs code where MONAI's bundle runner has what it needs, and Fedward is not there."""
    if not RUNNER.is_dir():
        pytest.skip("make install puts ignite and fire in .venv/bundle-runner")
    errors = tmp_path_factory.mktemp("runner") / "errors"
    with subprocess.Popen(
        [sys.executable, "-c", FORKING],
        env={**os.environ, "PYTHONPATH": str(RUNNER)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(folder: Path, code: str) -> None:
            assert process.stdin and process.stdout
            errors.unlink(missing_ok=True)
            process.stdin.write(json.dumps([str(folder), code, str(errors)]) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "0\n", errors.read_text("utf-8")[-3000:]

        yield run


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    plan_of: Make,
    trained: Make,
    delivered: Make,
) -> tuple[Any, Any, Path]:
    name, dimensions, prep, widths = KINDS[request.param]
    plan = plan_of(name, dimensions, preprocessing=prep, model={"channels": widths})
    model, folder = trained(plan), tmp_path_factory.mktemp("bundle") / "b"
    if plan.task.has_boxes:  # sure of much
        last = model.get_submodule("detector.classes.6")
        with torch.no_grad():
            last.weight.mul_(30)
            last.bias.zero_()
    assert export_bundle(delivered(plan, model), folder).difference < 1e-4
    return plan, model, folder


def test_metadata_is_as_monai_wants_it(
    made: tuple[Any, Any, Path], by_runner: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, folder = made
    monkeypatch.syspath_prepend(folder)  # as `monai.bundle run` does
    told = json.loads((folder / "configs" / "metadata.json").read_text())
    jsonschema.validate(told, SCHEMA)
    files = {
        "meta_file": str(folder / "configs" / "metadata.json"),
        "config_file": str(folder / "configs" / "inference.json"),
    }
    monai.bundle.verify_net_in_out("network_def", device="cpu", bundle_root=str(folder), **files)
    by_runner(
        folder,
        "from monai.bundle import ConfigWorkflow; flow = ConfigWorkflow("
        f"workflow_type='inference', logging_file=False, bundle_root='.', **{files});"
        "flow.initialize(); assert not flow.check_properties()",
    )


def test_monai_loads_the_network(
    made: tuple[Any, Any, Path], images: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, model, folder = made
    monkeypatch.chdir(folder)
    loaded = monai.bundle.load(".", bundle_dir=".", workflow_type="inference", device="cpu")
    script, told, _ = monai.bundle.load(
        folder.name, bundle_dir=str(folder.parent), load_ts_module=True, device="cpu"
    )
    given = images(plan, 2)
    with torch.no_grad():
        for network in (loaded, script):
            assert torch.equal(network.eval()(given), exported_network(plan, model)(given))
    assert told["name"] == "exported"


def test_the_bundle_runs_over_a_folder_of_images(
    made: tuple[Any, Any, Path], by_runner: Make
) -> None:
    plan, model, folder = made
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    if plan.task.dimensions == 2:
        from fedward_client.data.readers.images import Picture as Reader

        path = folder / "images" / "one.png"
        Pillow.fromarray(rng.integers(0, 255, (40, 50)).astype(np.uint8)).save(path)
        image = Reader(path)()
    else:
        from fedward_client.data.readers.nifti import NiftiImage

        path = folder / "images" / "one.nii.gz"
        values = rng.normal(size=(20, 22, 18)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.diag([-1.8, 1.5, 2.0, 1.0])), path)
        image = NiftiImage(path, 3)()
    from fedward_client.data.transforms import prepare_image

    given = prepare_image(image, None, plan.task, plan.preprocessing).pixels
    with torch.no_grad():
        output = model(torch.from_numpy(given)[None])
    by_runner(folder, "from monai.bundle import run; run(config_file='configs/inference.json')")
    if plan.task.kind == "detection":
        from fedward_client.predict.run import Predictor

        finished = FinishedModel("s", "shared", plan, "", "", to_arrays(model), {})
        wanted = Predictor(finished, Runtime())(image, plan.preprocessing).boxes
        assert wanted is not None
        told = json.loads((folder / "output" / "one.png_boxes.json").read_text())
        assert len(told["box"]) == len(wanted[0]) > 10
        np.testing.assert_allclose(told["box"], wanted[0][:, [1, 0, 3, 2]], atol=0.02)
        np.testing.assert_allclose(told["label_scores"], wanted[1], atol=1e-4)
        assert told["label"] == [plan.task.classes[k] for k in wanted[2]]
        return
    likely = torch.softmax(output, 1)[0].numpy()
    if plan.task.kind == "classification":
        (row,) = csv.reader((folder / "output" / "predictions.csv").read_text().splitlines())
        assert Path(row[0]).name == "one.png"
        np.testing.assert_allclose([float(v) for v in row[1:]], likely, atol=1e-4)
        return
    mask = nib.load(folder / "output" / "one_mask.nii.gz")
    assert mask.shape == (20, 22, 18)
    np.testing.assert_allclose(mask.affine, np.diag([-1.8, 1.5, 2.0, 1.0]), atol=1e-5)
    share = (likely.argmax(0) == 1).mean()
    assert abs((np.asanyarray(mask.dataobj) == 1).mean() - share) < 0.25


def test_only_the_card_speaks_of_sites(made: tuple[Any, Any, Path]) -> None:
    _, _, folder = made
    assert "Made of two sites." in (folder / "docs" / "README.md").read_text()
    here = Path(__file__).resolve().parents[3]
    for path in (p for p in folder.rglob("*") if p.is_file() and "images" not in p.parts):
        content = path.read_bytes()
        assert str(here).encode() not in content, path
        assert str(folder).encode() not in content or path.name == "predictions.csv", path
        assert b"two sites" not in content or path.name == "README.md", path


def test_a_model_that_takes_more_than_an_image_is_not_exported(
    plan_of: Make, trained: Make, delivered: Make, tmp_path: Path
) -> None:
    age = {"name": "age", "kind": "number", "range": [0, 100]}
    plain = plan_of("cnn", model={"channels": [4, 8]}).model_dump(exclude_defaults=True)
    names = [{"name": "t1"}, {"name": "t2"}]
    prep = plain["preprocessing"] | {"channels": 2, "channel": names}
    for more, rule in (
        ({"table": {"column": [age]}}, "reads a table beside it"),
        ({"preprocessing": prep}, "takes channels that it names"),
    ):
        plan = plan_from(plain | more)
        with pytest.raises(ConfigError, match=rule):
            export_bundle(delivered(plan, build_model(plan, 0)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_there_is_left_alone(
    plan_of: Make, trained: Make, delivered: Make, tmp_path: Path
) -> None:
    plan = plan_of("cnn", model={"channels": [4, 8]})
    with pytest.raises(OutputError, match="must be new"):
        export_bundle(delivered(plan, trained(plan)), tmp_path)
    other = plan_of("cnn", model={"channels": [4, 16]})
    with pytest.raises(ModelError):
        export_bundle(delivered(other, trained(plan)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_file_that_gives_another_output_is_not_kept(
    plan_of: Make, trained: Make, delivered: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("cnn", model={"channels": [4, 8]})
    wrong = np.ones((3, 2), np.float32)
    monkeypatch.setattr(exporting, "_run_onnx", lambda *_: wrong)
    with pytest.raises(ModelError, match=r"model\.onnx: off by"):
        export_bundle(delivered(plan, trained(plan)), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
