"""What a model was not trained for: an input held against the plan, as ``data check`` does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fedward.plan.image_filter import accepts
from fedward.plan.schema import Plan
from fedward_client.data.readers.dicom.kinds import read_kind
from fedward_client.data.readers.dicom.pixels import open_dicom
from fedward_client.data.restore import seen
from fedward_client.data.sample import Image
from fedward_client.predict.inputs import DicomSource, Source

_COLOURED: Final = frozenset({"OP", "XC", "SM"})  # modalities whose images are in colour
_KNOWN: Final = (
    "MONOCHROME1",
    "MONOCHROME2",
    "PALETTE COLOR",
    "RGB",
    "YBR_FULL",
    "YBR_FULL_422",
    "YBR_PARTIAL_420",
    "YBR_ICT",
    "YBR_RCT",
)
_MIDDLE: Final = 0.5  # of an image that a model must see at least


def by_header(source: Source, plan: Plan) -> Iterator[tuple[str, bool]]:
    """What the header says: each doubt, and whether it is one to refuse for."""
    wanted = plan.task.modality
    named = "" if "any" in wanted else ", ".join(wanted)
    if not isinstance(source, DicomSource):
        if named:
            yield f"the file states no modality; the model is for {named}", False
        return
    modality = source.header.modality
    if named and modality not in wanted:
        yield f"modality {modality or 'not stated'}; the model is for {named}", True
    path = source.stack.frames[0][0]
    patterns, values = plan.images.model_dump(), read_kind(path).values
    for key, own in patterns.items():
        if not accepts({key: own}, values):
            told = ", ".join(values.get(key, ())) or "not stated"
            yield f"{key} {told}; the model is for {', '.join(own)}", True
    photometric = str(open_dicom(path).header.get("PhotometricInterpretation") or "")
    if photometric not in _KNOWN:
        yield f"photometric interpretation {photometric or 'not stated'} is read as grey", False
    if source.header.synthetic:
        yield "the image says that it is synthetic", False


def by_image(image: Image, plan: Plan) -> Iterator[tuple[str, bool]]:
    """What the decoded image says."""
    prep, shape = plan.preprocessing, image.pixels.shape[1:]
    if image.region is not None:
        shape = image.pixels[(slice(None), *image.region)].shape[1:]
    if prep.spacing is not None and not image.measured:
        yield "the file states no spacing, and the plan resamples to one", True
    if prep.window is not None:
        low, high = prep.window
        if image.pixels.max() <= low or image.pixels.min() >= high:
            yield "no pixel lies inside the plan's window", True
    if image.pixels.max() == image.pixels.min():
        yield "all pixels have one value", True
    if prep.channel:
        there = image.names or tuple(one.name for one in prep.channel)
        if lacking := [one.name for one in prep.channel if one.name not in there]:
            yield f"the image lacks {', '.join(lacking)}", False
    elif len(image.pixels) > prep.channels:
        yield "the image is in colour; the model is for grey ones", False
    elif len(image.pixels) < prep.channels and _COLOURED.issuperset(plan.task.modality):
        yield "the image is grey; the model is for ones in colour", False
    if image.tilt and prep.gantry_tilt == "refuse":
        yield f"a gantry tilt of {image.tilt:.3g}°; the plan takes upright volumes", True
    if image.gap:
        yield f"slices up to {image.gap:.3g} mm apart were resampled to even ones", False
    if len(shape) == plan.task.dimensions and (share := seen(shape, image.spacing, prep)) < _MIDDLE:
        yield f"the model sees the middle {share:.0%} of the image", False
