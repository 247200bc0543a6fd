"""``configs/metadata.json`` of a bundle, by MONAI's bundle specification."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan

Metadata = dict[str, Any]
SCHEMA: Final = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_PACKAGES: Final = {"pillow": "pillow", "nibabel": "nibabel", "pydicom": "pydicom"}
RESEARCH: Final = "Research. The plan states no other use. Not a medical device."


def metadata(plan: Plan) -> Metadata:
    """What the bundle is, takes and gives; no site is named in it."""
    task, release = plan.task, version("fedward")
    about = plan.study.title or plan.study.name
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by Fedward {release}"},
        "monai_version": version("monai"),
        "pytorch_version": _public(version("torch")),
        "numpy_version": version("numpy"),
        "required_packages_version": {
            **{name: version(package) for name, package in _PACKAGES.items()},
            "pytorch-ignite": "0.5.0",
        },
        "name": plan.study.name,
        "task": f"{about}: {task.kind}, {task.dimensions}D",
        "description": f"{plan.model.name}, trained by federated learning. The model card is in "
        "docs/README.md.",
        "authors": "the study's coordinator and sites; see docs/README.md",
        "copyright": "see LICENSE",
        "data_type": "nifti or dicom" if task.dimensions == 3 else "png, jpeg or dicom",
        "intended_use": plan.study.intended_use or RESEARCH,
        "network_data_format": {
            "inputs": {"image": _input(plan)},
            "outputs": {"pred": _output(plan)},
        },
        "fedward": {"plan_sha256": plan_hash(plan), "preprocessing": expected_input(plan)},
    }


def expected_input(plan: Plan) -> dict[str, Any]:
    """What the network takes for granted about its input, in the plan's words."""
    prep = plan.preprocessing
    return prep.model_dump(mode="json", exclude={"augmentation"})


def _input(plan: Plan) -> Metadata:
    prep = plan.preprocessing
    names = ["red", "green", "blue"] if prep.channels == 3 else ["image"]
    return {
        "type": "image",
        "format": "magnitude",
        "modality": "n/a" if "any" in plan.task.modality else ", ".join(plan.task.modality),
        "num_channels": prep.channels,
        "spatial_shape": list(prep.size),
        "dtype": "float32",
        "value_range": [0, 1] if prep.intensity == "unit" else [],
        "is_patch_data": False,
        "channel_def": {str(place): name for place, name in enumerate(names)},
    }


def _output(plan: Plan) -> Metadata:
    segmentation = plan.task.kind == "segmentation"
    names = (["background"] if segmentation else []) + list(plan.task.classes)
    return {
        "type": "image" if segmentation else "probabilities",
        "format": "labels" if segmentation else "classes",
        "num_channels": plan.task.outputs,
        "spatial_shape": list(plan.preprocessing.size) if segmentation else [1],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(place): name for place, name in enumerate(names)},
    }


def _public(number: str) -> str:
    """Without the mark of a build, such as +cpu."""
    return number.partition("+")[0]
