"""How to use an exported bundle: the part of its README after the model card."""

from __future__ import annotations

from typing import Final

from fedward.plan.schema import Plan

_HOW: Final = "linear, smoothed where it shrinks"


def how_to_use(plan: Plan) -> str:
    """Input, output, files and limits of the bundle, in Markdown."""
    return "\n".join((*_input(plan), *_output(plan), *_files(plan), ""))


def _input(plan: Plan) -> tuple[str, ...]:
    prep = plan.preprocessing
    sides = " × ".join(map(str, prep.size))
    axes = "rows, columns" if plan.task.dimensions == 2 else "right, front, up (RAS)"
    return (
        "## Input",
        "",
        f"- `image`: float32 `(N, {prep.channels}, {', '.join(map(str, prep.size))})`; "
        f"{sides} ({axes}), batches of any size.",
        f"- Window: {_window(plan)}.",
        f"- Grid: {_grid(plan)}.",
        f"- Intensity: {_intensity(plan)}.",
        "",
        "`configs/inference.json` does all that. A test of Fedward holds these transforms against "
        "its own preprocessing: values differ by less than 0.0001. Before them, MONAI reads the "
        "file. It does not turn over inverted greys (MONOCHROME1) and applies no display window "
        "that a DICOM file proposes; a hospital's client does. Convert such files first.",
        "",
    )


def _window(plan: Plan) -> str:
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
    if prep.spacing is not None:
        mm = " × ".join(f"{v:g}" for v in prep.spacing)
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


def _output(plan: Plan) -> tuple[str, ...]:
    segmentation = plan.task.kind == "segmentation"
    names = ["background", *plan.task.classes] if segmentation else list(plan.task.classes)
    shape = f"(N, {plan.task.outputs}{', *size' if segmentation else ''})"
    meaning = "sigmoid of each" if plan.task.multi_label else "softmax over channels"
    listed = ", ".join(f"{place} = {name}" for place, name in enumerate(names))
    return (
        "## Output",
        "",
        f"- `pred`: float32 `{shape}` logits; {meaning} gives probabilities.",
        f"- Channels: {listed}.",
        "",
    )


def _files(plan: Plan) -> tuple[str, ...]:
    made = (
        "a mask for each image in `output/`, on the image's own grid"
        if plan.task.kind == "segmentation"
        else "`output/predictions.csv`, a row for each image"
    )
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
        f"writes {made}. It needs monai, pytorch-ignite and fire, and no Fedward.",
    )
