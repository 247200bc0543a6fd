"""``configs/inference.json`` of a bundle: the plan's preprocessing, and a run over a folder."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

from fedward.plan.load import plan_hash
from fedward.plan.schema import FLIP_AXES, Plan

Config = dict[str, Any]
_IMAGE: Final = "image"
_OWN: Final = "scripts.preprocessing."
_DICOM: Final = f"{_OWN}DicomReader"
_MEAN, _DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_UPRIGHT: Final = {"_target_": "PIL.ImageOps.exif_transpose", "_mode_": "callable"}


def inference_config(plan: Plan) -> Config:
    """The configuration, as MONAI's ``ConfigParser`` reads it."""
    return {
        "imports": ["$import glob", "$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/output'",
        "class_names": list(plan.task.classes),
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*'))",
        "network_def": {
            "_target_": "torch.jit.load",
            "f": "$@bundle_root + '/models/model.ts'",
            "map_location": "@device",
        },
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing(plan)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": _inferer(plan),
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(plan)},
        "handlers": list(plan.task.spec.bundle.handlers),
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network_def",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def _inferer(plan: Plan) -> Config:
    prep = plan.preprocessing
    if prep.patch is None:
        return {"_target_": "SimpleInferer"}
    return {
        "_target_": f"{_OWN}MirroredWindowInferer",
        "axes": [FLIP_AXES[name] for name in prep.patch.flips],
        "roi_size": list(prep.size),
        "sw_batch_size": 1,
        "overlap": prep.patch.overlap,
        "mode": "gaussian",
        "sw_device": "@device",
        "device": "$torch.device('cpu')",
    }


def preprocessing(plan: Plan) -> list[Config]:
    """What makes of a file what the network takes, step by step."""
    prep, flat = plan.preprocessing, plan.task.dimensions == 2
    steps: list[Config] = [
        {"_target_": "LoadImaged", "keys": _IMAGE, "dtype": None, "reader": _readers(flat)},
        {"_target_": "EnsureChannelFirstd", "keys": _IMAGE},
    ]
    if not flat:
        steps.append({"_target_": "Orientationd", "keys": _IMAGE, "axcodes": "RAS", "labels": None})
    steps += _window(plan)
    steps.append(_own("Channelsd", channels=prep.channels))
    grid = {"size": list(prep.size), "spacing": list(prep.spacing) if prep.spacing else None}
    if prep.patch is not None:
        grid["size"] = None
    steps.append(_own("Resampled", **grid, resize=prep.resize))
    return [*steps, _finish(plan), {"_target_": "EnsureTyped", "keys": _IMAGE}]


def _readers(flat: bool) -> list[Config]:
    # The last one is tried first. MONAI would give columns before rows.
    if not flat:
        return [{"_target_": _DICOM}, {"_target_": "NibabelReader"}]
    return [
        {"_target_": _DICOM, "swap_ij": False},
        {"_target_": "PILReader", "reverse_indexing": False, "converter": _UPRIGHT},
    ]


def _window(plan: Plan) -> list[Config]:
    prep = plan.preprocessing
    unit = {"keys": _IMAGE, "b_min": 0.0, "b_max": 1.0, "clip": True}
    if prep.window is not None:
        low, high = prep.window
        scale = {"_target_": "ScaleIntensityRanged", "a_min": low, "a_max": high, **unit}
        return [_own("Finited"), scale]
    if prep.percentiles is not None:
        low, high = prep.percentiles
        scale = {"_target_": "ScaleIntensityRangePercentilesd", "lower": low, "upper": high, **unit}
        return [_own("Finited"), scale]
    return [
        _own(
            "OwnRanged",
            bytes_are_mapped=plan.task.dimensions == 2,
            stretch=prep.intensity != "zscore",
        )
    ]


def _finish(plan: Plan) -> Config:
    prep = plan.preprocessing
    mapped = prep.window is not None or prep.percentiles is not None or prep.intensity != "zscore"
    numbers: Config = {"normalise": prep.intensity != "unit"}
    if prep.intensity == "imagenet":
        numbers |= {"mean": _MEAN, "deviation": _DEVIATION}
    return _own("Finishd", size=list(prep.size), mapped=mapped, **numbers)


def _own(name: str, **values: Any) -> Config:
    return {"_target_": _OWN + name, "keys": _IMAGE, **values}


def _postprocessing(plan: Plan) -> list[Config]:
    kind = "sigmoid" if plan.task.multi_label else "softmax"
    likely = {"_target_": "Activationsd", "keys": "pred", kind: True}
    bundle = plan.task.spec.bundle
    return [*([likely] if bundle.activated else []), *bundle.postprocessing]


# ``configs/metadata.json`` of a bundle, by MONAI's bundle specification.

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
    unused = {"augmentation"} if prep.patch is not None else {"augmentation", "patch"}
    return prep.model_dump(mode="json", exclude=unused)


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
        "is_patch_data": prep.patch is not None,
        "channel_def": {str(place): name for place, name in enumerate(names)},
    }


def _output(plan: Plan) -> Metadata:
    bundle, (channels, *rest) = plan.task.spec.bundle, _output_shape(plan)
    return {
        "type": bundle.type,
        "format": bundle.format,
        "num_channels": channels,
        "spatial_shape": rest or [1],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": plan.preprocessing.patch is not None,
        "channel_def": {str(place): name for place, name in enumerate(_channels(plan))},
    }


def _output_shape(plan: Plan) -> tuple[int, ...]:
    """Of one image, the channels first."""
    spec = plan.task.spec
    shape = spec.output_shape(plan.task, plan.preprocessing.size)
    return (shape[-1], *shape[:-1]) if spec.bundle.channels_last else shape


def _channels(plan: Plan) -> list[str]:
    spec = plan.task.spec
    first = ["background"] if spec.background else []
    return [*first, *plan.task.classes, *spec.bundle.besides]


def _public(number: str) -> str:
    """Without the mark of a build, such as +cpu."""
    return number.partition("+")[0]


# How to use an exported bundle: the part of its README after the model card.

_HOW: Final = "linear, smoothed where it shrinks"


def how_to_use(plan: Plan) -> str:
    """Input, output, files and limits of the bundle, in Markdown."""
    return "\n".join((*_readme_input(plan), *_readme_output(plan), *_files(plan), ""))


def _readme_input(plan: Plan) -> tuple[str, ...]:
    prep = plan.preprocessing
    sides = " × ".join(map(str, prep.size))
    axes = "rows, columns" if plan.task.dimensions == 2 else "right, front, up (RAS)"
    return (
        "## Input",
        "",
        f"- `image`: float32 `(N, {prep.channels}, {', '.join(map(str, prep.size))})`; "
        f"{sides} ({axes}), batches of any size.",
        f"- Window: {_readme_window(plan)}.",
        f"- Grid: {_grid(plan)}.",
        f"- Intensity: {_intensity(plan)}.",
        "",
        "`configs/inference.json` does all that. A test of Fedward holds these transforms against "
        "its own preprocessing: values differ by less than 0.0001. Before them, MONAI reads the "
        "file. It does not turn over inverted greys (MONOCHROME1) and applies no display window "
        "that a DICOM file proposes; a hospital's client does. Convert such files first. An "
        "ultrasound image in DICOM that names regions is refused: training saw the region alone, "
        "so save that as a picture.",
        "",
    )


def _readme_window(plan: Plan) -> str:
    prep = plan.preprocessing
    if prep.window is not None:
        return f"{prep.window[0]:g} to {prep.window[1]:g} become 0 to 1, clipped"
    if prep.percentiles is not None:
        low, high = prep.percentiles
        return f"percentiles {low:g} and {high:g} of each image become 0 and 1, clipped"
    kept = "keep their values" if prep.intensity == "zscore" else "from their own range"
    if plan.task.dimensions == 2:
        return f"8-bit pictures from 0 to 255, others {kept}"
    return f"none; volumes {kept}"


def _grid(plan: Plan) -> str:
    prep = plan.preprocessing
    mm = " × ".join(f"{v:g}" for v in prep.spacing or ())
    if prep.patch is not None:
        own = f"{mm} mm ({_HOW})" if mm else "the image's own"
        mirrored = f", each also mirrored ({', '.join(prep.patch.flips)})"
        return (
            f"{own}, of any size, padded with black up to one window; windows overlap by "
            f"{prep.patch.overlap:.0%}, weighted by a Gaussian"
            f"{mirrored if prep.patch.flips else ''}"
        )
    if prep.spacing is not None:
        return f"{mm} mm ({_HOW}), the middle cropped or padded with black"
    if prep.resize == "fit":
        return f"fitted into the size ({_HOW}), the rest black"
    return f"stretched to the size ({_HOW})"


def _intensity(plan: Plan) -> str:
    return {
        "unit": "0 to 1",
        "zscore": "each image to mean 0 and deviation 1, before the border is added",
        "imagenet": "0 to 1, then ImageNet's mean and deviation per channel",
    }[plan.preprocessing.intensity]


def _readme_output(plan: Plan) -> tuple[str, ...]:
    sides = _output_shape(plan)
    shape = f"(N, {', '.join(map(str, sides))})"
    meaning = "sigmoid of each" if plan.task.multi_label else "softmax over channels"
    told = f"logits; {meaning} gives probabilities"
    if spoken := plan.task.spec.bundle.output:
        told = spoken.format(rest=" × ".join(map(str, sides[1:])))
    listed = ", ".join(f"{place} = {name}" for place, name in enumerate(_channels(plan)))
    return (
        "## Output",
        "",
        f"- `pred`: float32 `{shape}`: {told}.",
        f"- Channels: {listed}.",
        "",
    )


def _files(plan: Plan) -> tuple[str, ...]:
    return (
        "## Files",
        "",
        "- `models/model.onnx`: for ONNX Runtime and others. `models/model.ts`: TorchScript. "
        "`models/model.pt`: the weights alone.",
        "- `configs/`, `scripts/`: the MONAI bundle. In its folder, with images in `images/`:",
        "",
        "```",
        "python -m monai.bundle run --config_file configs/inference.json",
        "```",
        "",
        f"writes {plan.task.spec.bundle.files}. It needs monai, pytorch-ignite and fire, and no "
        "Fedward.",
    )
