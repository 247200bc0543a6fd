"""SEG and SR of predictions: where masks lie, by readers that share nothing with ours."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from debian import dciodvfy, need

from fedward.models.finished import open_finished
from fedward.plan.schema import Plan
from fedward_client.predict.inputs import find_inputs
from fedward_client.predict.run import Wish, predict
from fedward_client.training.runtime import Runtime

TURN, LEAN = 0.3, 0.2
OBLIQUE = (
    (np.cos(TURN), np.sin(TURN), 0),
    (-np.sin(TURN) * np.cos(LEAN), np.cos(TURN) * np.cos(LEAN), np.sin(LEAN)),
)
CASES: dict[str, dict[str, Any]] = {
    "axial": {},
    "oblique": {"along": OBLIQUE[0], "down": OBLIQUE[1]},
    "sagittal": {"along": (0, 1, 0), "down": (0, 0, -1)},
    "flipped rows": {"down": (0, -1, 0)},
    "multi-frame": {"frames": True},
    "multi-frame oblique": {"frames": True, "along": OBLIQUE[0], "down": OBLIQUE[1]},
    "gantry tilt": {"aside": (0, 1.4, 0)},
}
D, H, W = 8, 16, 24


def run(model: Path, path: Path, out: Path) -> dict[str, Any]:
    opened = open_finished(model)
    predict(Wish(opened, path, out), find_inputs(path, opened.plan.task), Runtime())
    (told,) = json.loads((out / "predictions.json").read_text("utf-8"))["inputs"]
    return told  # type: ignore[no-any-return]


def blobs() -> np.ndarray:
    """``(D, H, W)`` without any symmetry, and with structure to which a random network answers."""
    z, y, x = np.mgrid[:D, :H, :W]
    far = (z - 2) ** 2 * 6 + (y - 4) ** 2 + (x - 15) ** 2
    return (np.where(far < 40, 1200, 60) + 20 * z + 9 * y + 5 * x).astype(np.int16)


def prepared_choice(plan: Plan, model: Path, volume: np.ndarray) -> np.ndarray:
    """The network's own choice on a volume ``(x, y, z)`` of the plan's size, in HU."""
    low, high = plan.preprocessing.window or (0, 1)
    images = torch.from_numpy(np.clip((volume - low) / (high - low), 0, 1).astype(np.float32))
    with torch.no_grad():
        logits = open_finished(model).build()(images[None, None])
    return np.asarray(logits[0].argmax(0).numpy())


def marked_places(seg: pydicom.Dataset, number: int) -> Counter[tuple[float, ...]]:
    """Patient coordinates (mm) of the marked pixels of a segment, by PS3.3 C.7.6.2.1.1 alone."""
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    frames = bits[: seg.NumberOfFrames * seg.Rows * seg.Columns]
    frames = frames.reshape(seg.NumberOfFrames, seg.Rows, seg.Columns)
    shared = seg.SharedFunctionalGroupsSequence[0]
    plane = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    along, down = np.array(plane[:3], float), np.array(plane[3:], float)
    per_row, per_column = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    found: Counter[tuple[float, ...]] = Counter()
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber != number:
            continue
        corner = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(frame):
            place = corner + along * per_column * column + down * per_row * row
            found[tuple(np.round(place, 2) + 0.0)] += 1
    return found


def itk_places(image: sitk.Image, labels: np.ndarray, number: int) -> Counter[tuple[float, ...]]:
    """The same of a label map ``(z, y, x)`` on the grid of an image of ITK."""
    return Counter(
        tuple(np.round(image.TransformIndexToPhysicalPoint((int(x), int(y), int(z))), 2) + 0.0)
        for z, y, x in np.argwhere(labels == number)
    )


def near(one: Counter[Any], other: Counter[Any]) -> bool:
    """Whether two sets of places are the same up to the rounding of their coordinates."""
    a, b = (np.array(sorted(c.elements())) for c in (one, other))
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 0.0201)


@pytest.mark.parametrize("case", [name for name in CASES if name != "gantry tilt"])
def test_a_mask_lies_on_the_voxels_that_the_network_chose(
    tmp_path: Path, make_plan: Any, make_model: Any, ct: Any, case: str
) -> None:
    """Images read by SimpleITK, the network asked directly, the results read back by others."""
    folder = ct(tmp_path / "in", blobs(), **CASES[case])
    reader = sitk.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names if len(names) > 1 else names[0])
    ras = sitk.DICOMOrient(image, "RAS")
    volume = sitk.GetArrayFromImage(ras).transpose(2, 1, 0)
    plan = make_plan("segmentation", volume.shape, "CT", window=[-1024.0, 400.0], intensity="unit")
    model = make_model(tmp_path / "m.safetensors", plan)
    choice = prepared_choice(plan, model, volume).transpose(2, 1, 0)
    told = run(model, folder, tmp_path / "out")
    assert told["state"] == "predicted"
    seg = pydicom.dcmread(tmp_path / "out" / told["files"]["seg"])
    mask = sitk.ReadImage(str(tmp_path / "out" / told["files"]["mask"]))
    values = sitk.GetArrayFromImage(mask)
    for number in (1, 2):
        expected = itk_places(ras, choice, number)
        assert 0 < len(expected) < D * H * W
        assert near(marked_places(seg, number), expected)
        assert near(itk_places(mask, values, number), expected)
    assert seg.PatientID == "MRN4711" and seg.StudyInstanceUID == "1.2.76"
    assert seg.FrameOfReferenceUID == "1.2.78"
    first = pydicom.dcmread(next(folder.iterdir()))
    assert seg.SeriesInstanceUID != first.SeriesInstanceUID


def test_a_mask_of_a_leaning_gantry_lies_in_the_slices_as_they_were_taken(
    tmp_path: Path, make_plan: Any, make_model: Any, ct: Any
) -> None:
    """Two pixels a slice: what is upright in the patient is found again, slice by slice."""
    values = blobs()
    values[:, [0, -1]] = 0  # at the edge a slice is filled with its darkest value
    folder = ct(tmp_path / "in", values, **CASES["gantry tilt"])
    plan = make_plan(
        "segmentation",
        (W, H, D),
        "CT",
        window=[-1024.0, 400.0],
        intensity="unit",
        gantry_tilt="correct",
    )
    model = make_model(tmp_path / "m.safetensors", plan)
    # By hand: slices moved upright around the middle one, and columns and rows turned to RAS.
    stored = values - 1024.0
    upright = np.empty_like(stored)
    for k, one in enumerate(stored):
        shift = 2 * k - (D - 1)
        moved = np.full(one.shape, one.min())
        rows = np.arange(H) - shift
        inside = (rows >= 0) & (rows < H)
        moved[inside] = one[rows[inside]]
        upright[k] = moved
    choice = prepared_choice(plan, model, upright.transpose(2, 1, 0)[::-1, ::-1].copy())
    choice = choice[::-1, ::-1].transpose(2, 1, 0)
    expected = np.zeros_like(choice)
    for k in range(D):
        rows = np.arange(H) + 2 * k - (D - 1)
        inside = (rows >= 0) & (rows < H)
        expected[k][inside] = choice[k][rows[inside]]
    told = run(model, folder, tmp_path / "out")
    seg = pydicom.dcmread(tmp_path / "out" / told["files"]["seg"])
    for number in (1, 2):
        places: Counter[tuple[float, ...]] = Counter()
        for k, row, column in np.argwhere(expected == number):
            place = np.array([-20.0, 15.0, 40.0]) + [0.9 * column, 0.7 * row + 1.4 * k, 2.5 * k]
            places[tuple(np.round(place, 2) + 0.0)] += 1
        assert places and near(marked_places(seg, number), places)
    mask = nib.load(tmp_path / "out" / told["files"]["mask"])
    values = np.asarray(mask.dataobj)
    left, back, up = np.diag([-1, -1, 1]) @ (mask.affine @ [3, 5, 6, 1])[:3]
    assert (left, back, up) == pytest.approx((-20 + 0.9 * 5, 15 + 0.7 * 3 + 1.4 * 6, 55), abs=1e-3)
    np.testing.assert_array_equal(values, expected.transpose(1, 2, 0))


def test_a_mask_of_uneven_slices_lies_on_even_ones_and_in_the_slices_as_they_were_taken(
    tmp_path: Path, make_plan: Any, make_model: Any, ct: Any
) -> None:
    values = blobs()
    folder = ct(tmp_path / "in", values)
    for path in folder.iterdir():
        if pydicom.dcmread(path).ImagePositionPatient[2] == 40 + 2.5 * 3:
            path.unlink()
    plan = make_plan("segmentation", (W, H, D), "CT", window=[-1024.0, 400.0], intensity="unit")
    model = make_model(tmp_path / "m.safetensors", plan)
    even = values - 1024.0
    even[3] = (even[2] + even[4]) / 2
    choice = prepared_choice(plan, model, even.transpose(2, 1, 0)[::-1, ::-1].copy())
    choice = choice[::-1, ::-1].transpose(2, 1, 0)
    told = run(model, folder, tmp_path / "out")
    assert any("5 mm apart" in doubt for doubt in told["marks"])
    mask = nib.load(tmp_path / "out" / told["files"]["mask"])
    np.testing.assert_array_equal(np.asarray(mask.dataobj), choice.transpose(1, 2, 0))
    np.testing.assert_allclose(mask.affine @ [3, 5, 3, 1], [20 - 0.9 * 5, -15 - 2.1, 47.5, 1])
    seg = pydicom.dcmread(tmp_path / "out" / told["files"]["seg"])
    for number in (1, 2):
        places: Counter[tuple[float, ...]] = Counter()
        for k, row, column in np.argwhere(choice == number):
            if k != 3:
                place = [-20 + 0.9 * column, 15 + 0.7 * row, 40 + 2.5 * k]
                places[tuple(np.round(place, 2) + 0.0)] += 1
        assert places and near(marked_places(seg, number), places)


@pytest.mark.parametrize("case", ["axial", "gantry tilt", "multi-frame"])
def test_objects_of_volumes_break_no_rule_of_dicom(
    tmp_path: Path, make_plan: Any, make_model: Any, ct: Any, case: str
) -> None:
    plan = make_plan("segmentation", (16, 16, 16), "CT", gantry_tilt="correct")
    folder = ct(tmp_path / "in", blobs(), **CASES[case])
    told = run(make_model(tmp_path / "m.safetensors", plan), folder, tmp_path / "out")
    for kind in ("seg", "sr"):
        said = dciodvfy(tmp_path / "out" / told["files"][kind])
        assert "Error" not in said and "Abort" not in said, said


def test_objects_of_single_images_break_no_rule_of_dicom(
    tmp_path: Path, make_plan: Any, make_model: Any, dx: Any, chest: Path
) -> None:
    dx(tmp_path / "in" / "a.dcm", np.random.default_rng(0).integers(0, 4096, (20, 24)))
    told = run(chest, tmp_path / "in", tmp_path / "out")
    assert set(told["files"]) == {"sr"} and not told["marks"]
    plan = make_plan("segmentation", (16, 16), "DX")
    model = make_model(tmp_path / "m.safetensors", plan)
    masks = run(model, tmp_path / "in", tmp_path / "masks")
    assert set(masks["files"]) == {"sr", "seg", "mask"} and not masks["marks"]
    found = [tmp_path / "out" / told["files"]["sr"]]
    found += [tmp_path / "masks" / masks["files"][kind] for kind in ("sr", "seg")]
    for path in found:
        said = dciodvfy(path)
        assert "Error" not in said and "Abort" not in said, said


def test_a_time_of_another_form_costs_no_object(tmp_path: Path, dx: Any, chest: Path) -> None:
    path = dx(
        tmp_path / "in" / "a.dcm",
        np.random.default_rng(0).integers(0, 4096, (20, 24)),
        StudyTime="140438.0",
    )
    path.write_bytes(path.read_bytes().replace(b"140438.0", b"14:04:38"))
    told = run(chest, tmp_path / "in", tmp_path / "out")
    report = pydicom.dcmread(tmp_path / "out" / told["files"]["sr"])
    assert not report.StudyTime and report.StudyDate == "19550712"


def test_the_report_says_what_the_model_said(tmp_path: Path, dx: Any, chest: Path) -> None:
    """As pydicom reads it, and as dcmtk prints it."""
    dx(tmp_path / "in" / "a.dcm", np.random.default_rng(0).integers(0, 4096, (20, 24)))
    told = run(chest, tmp_path / "in", tmp_path / "out")
    model, path = open_finished(chest), tmp_path / "out" / told["files"]["sr"]
    report = pydicom.dcmread(path)
    assert (report.PatientID, report.StudyInstanceUID) == ("MRN4711", "1.2.826.0.99.4711.1")
    assert report.VerificationFlag == "UNVERIFIED" and report.PreliminaryFlag == "PRELIMINARY"
    assert report.ContentQualification == "RESEARCH"
    text = report.to_json()
    for said in (model.sha256, model.plan_sha256, "Not for diagnosis.", "1500"):
        assert said in text
    program = need("dsrdump", "dcmtk")
    command = [program, "+Pl", str(path)]  # long values whole
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for name, value in told["images"][0]["probabilities"].items():
        assert f'"{name}")' in printed
        assert f'NUM:(,,"Probability")="{value:.6f}'[:30] in printed
    assert model.sha256 in printed


def test_the_same_prediction_has_the_same_uids_and_pixels(
    tmp_path: Path, make_plan: Any, make_model: Any, ct: Any
) -> None:
    plan = make_plan("segmentation", (16, 16, 8), "CT")
    folder = ct(tmp_path / "in", blobs())
    model = make_model(tmp_path / "m.safetensors", plan)
    told = [run(model, folder, tmp_path / name) for name in ("one", "two")]
    assert told[0] == told[1]
    for kind in ("seg", "sr"):
        one, two = (pydicom.dcmread(tmp_path / n / told[0]["files"][kind]) for n in ("one", "two"))
        for file in (one, two):
            for name in ("ContentDate", "ContentTime", "InstanceCreationTime"):
                if name in file:
                    del file[name]
            file.pop("InstanceCreationDate", None)
        assert one.SOPInstanceUID == two.SOPInstanceUID
        assert one.get("PixelData") == two.get("PixelData")
    other = make_model(tmp_path / "other.safetensors", plan, 2)
    third = run(other, folder, tmp_path / "three")
    seg = pydicom.dcmread(tmp_path / "three" / third["files"]["seg"])
    assert seg.SeriesInstanceUID != two.SeriesInstanceUID


def test_frames_without_a_place_get_a_report_and_are_told(
    tmp_path: Path, make_plan: Any, make_model: Any, dx: Any
) -> None:
    """Of several frames in no frame of reference no SEG can be made; nothing else is lost."""
    pixels = np.random.default_rng(0).integers(0, 4096, (3, 20, 24))
    dx(tmp_path / "in" / "a.dcm", pixels)
    plan = make_plan("segmentation", (16, 16), "DX")
    told = run(make_model(tmp_path / "m.safetensors", plan), tmp_path / "in", tmp_path / "out")
    assert told["marks"] == [
        "no SEG can be made of the image: its frames do not say where they lie"
    ]
    assert len(told["images"]) == 3
    assert set(told["files"]) == {"mask", "sr"}
    assert nib.load(tmp_path / "out" / told["files"]["mask"]).shape == (20, 24, 3)
