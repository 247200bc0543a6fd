"""A bundle's transforms give what a hospital's client gives, from the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from PIL import Image as Pillow
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

from fedward_client.data.prepare import prepare
from fedward_client.data.readers.dicom.reader import DicomFrame
from fedward_client.data.readers.images import Picture
from fedward_client.data.readers.nifti import NiftiImage
from fedward_client.data.sample import Sample
from fedward_client.data.transforms import prepare_image
from fedward_client.training.evaluate import evaluate
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Source
from fedward_server.artifacts.bundle_config import inference_config

# MONAI tells that it has no NVIDIA decoder; it needs none.
pytestmark = [
    pytest.mark.filterwarnings("ignore:NvImgCodec"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]
Make = Callable[..., Any]
TOLERANCE = 1e-4
OWN = "fedward_server.artifacts."


def transforms(plan: Any) -> Compose:
    """The preprocessing as ``ConfigParser`` makes it, with the bundle's script."""
    text = json.dumps(inference_config(plan)).replace('"scripts.', f'"{OWN}scripts.')
    parser = ConfigParser(json.loads(text))
    return parser.get_parsed_content("preprocessing")


def test_windows_over_a_whole_volume_give_what_the_trainer_gives(
    plan_of: Make, trained: Make, tmp_path: Path
) -> None:
    """The mask of a bundle's steps is the one that a site's figures are of."""
    patch = {"flips": ["vertical", "depth"]}
    prep = {"size": [16, 16, 16], "spacing": [1.5, 1.1, 2.0], "patch": patch}
    plan = plan_of("unet", 3, preprocessing=prep, model={"channels": [4, 8]})
    values = np.random.default_rng(1).normal(0, 5, (21, 15, 31)).astype(np.float32)
    path = tmp_path / "v.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([1.2, 0.9, 1.5, 1.0])), path)
    net, image = trained(plan), NiftiImage(path, 3)
    text = json.dumps(inference_config(plan)).replace('"scripts.', f'"{OWN}scripts.')
    parser = ConfigParser({**json.loads(text), "device": "cpu"})
    steps, inferer = map(parser.get_parsed_content, ("preprocessing", "inferer"))
    data = steps({"image": str(path)})["image"]
    mask = np.zeros(values.shape, np.uint8)
    samples = [Sample(name, image, None, lambda: mask) for name in "pq"]
    site = prepare("x", samples, plan)
    np.testing.assert_allclose(data.numpy(), site.images[0], atol=TOLERANCE)
    with torch.no_grad():
        likely = inferer(data[None], net)[0].softmax(0)
    found = steps.inverse({"image": data.clone().set_array(likely)})["image"].numpy()
    assert found.shape == (2, *values.shape)
    source, seen = Source(plan, site, Runtime(), None, ""), []
    task = type(plan.task.spec)
    kept = task.answers_of_masks

    def spied(self: Any, task: Any, masks: Any, *more: Any, **options: Any) -> Any:
        seen.append(masks[0])
        return kept(self, task, masks, *more, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(task, "answers_of_masks", spied)
        evaluate(plan, net, source, site, np.arange(1), Runtime(), surface=False)
    # Where the two classes are as likely, rounding decides.
    clear = np.abs(found[0] - found[1]) > TOLERANCE
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found.argmax(0)[clear], seen[0][clear])
    assert 0.01 < seen[0].mean() < 0.99


def picture(folder: Path, kind: str) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"grey": (37, 52), "colour": (37, 52, 3), "deep": (37, 52)}
    values = rng.integers(20, 220, shapes[kind])
    values[5:20, 8:30] = 200
    path = folder / f"{kind}.png"
    Pillow.fromarray(values.astype(np.uint16 if kind == "deep" else np.uint8)).save(path)
    return path


WAYS: list[dict[str, Any]] = [
    {"intensity": "unit"},
    {"intensity": "zscore"},
    {"intensity": "imagenet", "channels": 3},
    {"intensity": "unit", "percentiles": [2.0, 97.0]},
    {"intensity": "zscore", "window": [30.0, 150.0], "resize": "fit"},
    {"intensity": "zscore", "resize": "fit"},
    {"intensity": "unit", "spacing": [0.7, 2.3]},
]


@pytest.mark.parametrize("kind", ["grey", "colour", "deep"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_pictures(way: dict[str, Any], kind: str, plan_of: Make, tmp_path: Path) -> None:
    plan = plan_of("cnn", preprocessing={"size": [24, 32], **way})
    path = picture(tmp_path, kind)
    wanted = prepare_image(Picture(path)(), None, plan.task, plan.preprocessing).pixels
    found = transforms(plan)({"image": str(path)})["image"]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, atol=TOLERANCE)


VOLUMES: list[dict[str, Any]] = [
    {"intensity": "zscore", "window": [-1000.0, 400.0], "spacing": [1.5, 1.1, 2.0]},
    {"intensity": "zscore", "resize": "fit"},
    {"intensity": "unit", "percentiles": [1.0, 99.0]},
    {"intensity": "unit"},
    {"intensity": "zscore", "spacing": [3.0, 3.0, 3.0]},
]


def volume(path: Path) -> nib.Nifti1Image:
    """Stored left to right reversed, with its axes exchanged and a NaN."""
    values = np.random.default_rng(1).normal(0, 500, (18, 23, 14)).astype(np.float32)
    values[3:9, 4:12, 5:9] += 900
    values[0, 0, 0] = np.nan
    affine = np.array([[0, -1.2, 0, 9], [0.9, 0, 0, -4], [0, 0, 2.5, 3], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(values, affine), path)
    return nib.load(path)


@pytest.mark.parametrize("way", VOLUMES, ids=lambda way: "-".join(map(str, way.values())))
def test_volumes(way: dict[str, Any], plan_of: Make, tmp_path: Path) -> None:
    plan = plan_of("unet", 3, preprocessing={"size": [16, 24, 16], **way})
    volume(path := tmp_path / "v.nii.gz")
    wanted = prepare_image(NiftiImage(path, 3)(), None, plan.task, plan.preprocessing)
    found = transforms(plan)({"image": str(path)})["image"]
    np.testing.assert_allclose(found.numpy(), wanted.pixels, atol=TOLERANCE)
    np.testing.assert_allclose(found.pixdim.numpy(), wanted.spacing, rtol=1e-5)


@pytest.mark.parametrize("way", VOLUMES, ids=lambda way: "-".join(map(str, way.values())))
def test_what_is_marked_on_the_models_grid_comes_back_to_its_place(
    way: dict[str, Any], plan_of: Make, tmp_path: Path
) -> None:
    plan = plan_of("unet", 3, preprocessing={"size": [32, 32, 32], **way})
    stored = volume(path := tmp_path / "v.nii.gz")
    steps = transforms(plan)
    image = steps({"image": str(path)})["image"]
    # The world's x coordinate of each voxel, made on the model's grid from its affine.
    places = torch.stack(torch.meshgrid(*map(torch.arange, image.shape[1:]), indexing="ij"), -1)
    world = places.to(torch.float64) @ image.affine[:3, :3].T + image.affine[:3, 3]
    image[:] = world[..., 0]
    back = steps.inverse({"image": image})["image"]
    assert tuple(back.shape[1:]) == stored.shape
    np.testing.assert_allclose(back.affine.numpy(), stored.affine, atol=1e-4)
    grid = np.stack(np.meshgrid(*map(np.arange, stored.shape), indexing="ij"), -1)
    wanted = (grid @ stored.affine[:3, :3].T + stored.affine[:3, 3])[..., 0]
    inner = (slice(4, -4),) * 3
    np.testing.assert_allclose(back[0].numpy()[inner], wanted[inner], atol=0.8)


def ultrasound(path: Path, values: np.ndarray, *regions: Dataset) -> Path:
    """An 8-bit image in DICOM."""
    file = Dataset()
    file.SOPClassUID, file.SOPInstanceUID = UltrasoundImageStorage, generate_uid()
    file.Modality, file.PatientID = "US", "p"
    file.Rows, file.Columns = values.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 8
    file.HighBit, file.PixelRepresentation = 7, 0
    file.PixelData = values.tobytes()
    if regions:
        file.SequenceOfUltrasoundRegions = list(regions)
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.filterwarnings("ignore:PydicomReader")  # that a flat image has no place in space
def test_an_ultrasound_image_is_never_taken_with_what_training_cut_off(
    plan_of: Make, tmp_path: Path
) -> None:
    plan = plan_of("cnn", preprocessing={"size": [24, 32], "window": [0.0, 255.0]})
    values = np.random.default_rng(0).integers(0, 255, (40, 56)).astype(np.uint8)
    place = {"MinX0": 8, "MinY0": 5, "MaxX1": 45, "MaxY1": 30}
    region = Dataset()
    region.RegionSpatialFormat = 1
    for name, value in place.items():
        setattr(region, f"RegionLocation{name}", value)
    path = ultrasound(tmp_path / "us.dcm", values, region)
    plain = ultrasound(tmp_path / "other.dcm", values)
    wanted = prepare_image(DicomFrame(path, 0)(), None, plan.task, plan.preprocessing).pixels
    whole = prepare_image(DicomFrame(plain, 0)(), None, plan.task, plan.preprocessing).pixels
    steps = transforms(plan)
    np.testing.assert_allclose(steps({"image": str(plain)})["image"], whole, atol=TOLERANCE)
    with pytest.raises(RuntimeError) as refused:
        steps({"image": str(path)})
    assert "ultrasound image must be cut to its regions" in str(refused.value.__cause__)
    # What the message advises gives what training saw.
    Pillow.fromarray(values[5:31, 8:46]).save(tmp_path / "us.png")
    found = steps({"image": str(tmp_path / "us.png")})["image"]
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
