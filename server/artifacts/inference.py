"""``configs/inference.json`` of a bundle: the plan's preprocessing, and a run over a folder."""

from __future__ import annotations

from typing import Any, Final

from fedward.plan.schema import Plan

Config = dict[str, Any]
_IMAGE: Final = "image"
_OWN: Final = "scripts.preprocessing."
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
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(plan)},
        "handlers": _handlers(plan),
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
    steps.append(_own("Resampled", **grid, resize=prep.resize))
    return [*steps, _finish(plan), {"_target_": "EnsureTyped", "keys": _IMAGE}]


def _readers(flat: bool) -> list[Config]:
    # The last one is tried first. MONAI would give columns before rows.
    if not flat:
        return [{"_target_": "PydicomReader"}, {"_target_": "NibabelReader"}]
    return [
        {"_target_": "PydicomReader", "swap_ij": False},
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
    if plan.task.kind == "classification":
        return [likely]
    return [
        likely,
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": _IMAGE,
            "nearest_interp": False,
            "to_tensor": True,
        },
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "mask",
            "output_dtype": "$__import__('numpy').uint8",
            "separate_folder": False,
            "resample": False,
            "print_log": False,
        },
    ]


def _handlers(plan: Plan) -> list[Config]:
    if plan.task.kind == "segmentation":
        return []
    return [
        {
            "_target_": "ClassificationSaver",
            "output_dir": "@output_dir",
            "filename": "predictions.csv",
            "batch_transform": "$lambda batch: [item['image'].meta for item in batch]",
            "output_transform": "$lambda output: [item['pred'] for item in output]",
        }
    ]
