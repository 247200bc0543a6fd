"""``fedward-client explain``: a model that learnt a planted sign, and what is shown of it."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from browser import browser
from debian import dciodvfy
from PIL import Image as Pillow

from fedward.errors import PlanError
from fedward.integrity import about_model
from fedward.models import build_model, save_model, to_arrays
from fedward.models.finished import open_finished
from fedward.plan.load import plan_from
from fedward_client.data.dataset import DatasetSpec
from fedward_client.data.transforms import prepare_image
from fedward_client.explain.run import How, explain
from fedward_client.explain.truth import truths
from fedward_client.predict.inputs import find_inputs
from fedward_client.predict.run import Predictor, Wish
from fedward_client.training.runtime import Runtime

RNG = np.random.default_rng
SIDE, SIGN = 32, 8


def planted(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, in every second image with a bright square; and where that is."""
    rng = RNG(seed)
    pixels = rng.random((count, SIDE, SIDE), dtype=np.float32) * 0.5
    masks = np.zeros((count, SIDE, SIDE), bool)
    for k in range(1, count, 2):
        row, column = rng.integers(0, SIDE - SIGN, 2)
        masks[k, row : row + SIGN, column : column + SIGN] = True
    return pixels + masks * np.float32(0.5), masks


@pytest.fixture(scope="session")
def trained(make_plan: Any, tmp_path_factory: Any) -> Path:
    """A model that tells them apart."""
    plan = make_plan("classification", (SIDE, SIDE), "any", intensity="unit")
    content = plan.model_dump(exclude_defaults=True)
    content["model"]["channels"] = [8, 16]
    plan = plan_from(content)
    network = build_model(plan, 5)
    step = torch.optim.Adam(network.parameters(), 5e-3)
    images, labels = torch.from_numpy(planted(64, 0)[0])[:, None], torch.arange(64) % 2
    for _ in range(80):
        step.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        step.step()
    path: Path = tmp_path_factory.mktemp("trained") / "model.safetensors"
    save_model(path, to_arrays(network), about_model("study-1", plan, "shared"))
    return path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Pictures with labels, and masks of the signs; of the last no label is known."""
    pixels, masks = planted(8, 1)
    for name, arrays in (("images", pixels), ("masks", masks)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for k, one in enumerate(arrays):
            content = np.rint(one * 255).astype(np.uint8)
            Pillow.fromarray(content).save(tmp_path / "in" / name / f"{k}.png")
    rows = "".join(f"{k}.png,{('well', 'sick')[k % 2]}\n" for k in range(7))
    (tmp_path / "in" / "labels.csv").write_text("image,label\n" + rows)
    return tmp_path / "in"


def run(model: Path, path: Path, out: Path, **how: Any) -> dict[str, Any]:
    """Explain in this process; what ``explain.json`` then holds."""
    opened = open_finished(model)
    known = truths(DatasetSpec(path), opened.plan.task)
    found = find_inputs(path, opened.plan.task)
    explain(Wish(opened, path, out), found, Runtime(), How(truths=known, **how))
    told: dict[str, Any] = json.loads((out / "explain.json").read_text("utf-8"))
    return told


@pytest.mark.parametrize("method", ["grad-cam", "occlusion"])
def test_maps_point_at_what_the_model_learnt(
    tmp_path: Path, trained: Path, scans: Path, method: Any
) -> None:
    told = run(trained, scans, tmp_path / "out", method=method)
    trust = told["trust"]
    assert trust["points_at"] == {"mean": 1.0, "images": 4}
    sick = [one["images"][0] for one in told["inputs"][1::2]]
    for one in sick:
        assert one["prediction"] == [one["explained"]] == ["sick"]
        assert one["deletion"] < one["insertion"]
    for name in ("deletion", "insertion"):
        shown = [one["images"][0][name] for one in told["inputs"]]
        assert trust[name] == {"mean": pytest.approx(np.mean(shown)), "images": 8}
    assert trust["randomised"]["all"]["images"] == 8
    assert abs(trust["randomised"]["all"]["likeness"]) < 0.6
    assert [one["images"][0].get("label") for one in told["inputs"]] == [
        *([["well"], ["sick"]] * 3),
        ["well"],
        None,
    ]
    for one in told["inputs"][:7]:
        image = one["images"][0]
        (name,) = image["label"]
        assert image["error"] == pytest.approx(1 - image["probabilities"][name])
    # The map on the disk is the picture's size, and brighter in the sign.
    for k in range(1, 8, 2):
        shown = np.asarray(Pillow.open(tmp_path / "out" / told["inputs"][k]["files"]["map"]))
        mask = np.asarray(Pillow.open(scans / "masks" / f"{k}.png")) > 0
        assert shown.shape == mask.shape and shown.max() == 255
        # Grad-CAM's last feature map has 16 places a side, and is bright around the sign too.
        assert shown[mask].mean() > (2 if method == "occlusion" else 1) * shown[~mask].mean()


def test_a_class_may_be_named_and_the_figures_left_out(
    tmp_path: Path, trained: Path, scans: Path
) -> None:
    told = run(trained, scans, tmp_path / "out", shown=0, trust=False)
    images = [one["images"][0] for one in told["inputs"]]
    assert {one["explained"] for one in images} == {"well"}
    assert all(one["probability"] == one["probabilities"]["well"] for one in images)
    assert "deletion" not in images[0] and set(told["trust"]) == {"error_with_uncertainty"}


def test_a_bad_file_is_named_and_all_files_are_their_owner_s(
    tmp_path: Path, trained: Path, dx: Any
) -> None:
    for k in range(2):
        dx(
            tmp_path / "in" / f"{k}.dcm",
            RNG(k).integers(0, 4096, (20, 24)),
            SeriesInstanceUID=f"1.{k}",
        )
    (tmp_path / "in" / "letter.txt").write_text("Dear colleague")
    told = run(trained, tmp_path / "in", tmp_path / "out")
    assert [one["state"] for one in told["inputs"]] == ["predicted", "predicted", "refused"]
    shown = nib.load(tmp_path / "out" / told["inputs"][0]["files"]["map"])
    assert shown.shape == (20, 24, 1)
    for kind in ("sc", "sr"):
        said = dciodvfy(tmp_path / "out" / told["inputs"][0]["files"][kind])
        assert "Error" not in said and "Abort" not in said, said
    page = (tmp_path / "out" / "explain.html").read_text()
    assert "letter.txt: not DICOM" in page and "stays at the hospital" in page
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) in (0o600, 0o700)


def test_an_uncertain_mask_is_shown_on_its_volume(
    tmp_path: Path, make_plan: Any, make_model: Any
) -> None:
    """NIfTI of an odd orientation, with the truth beside it: entropy, Dice, and how they agree."""
    folder = tmp_path / "in"
    plan = make_plan("segmentation", (16, 8, 24), "any", intensity="unit")
    for name, values in (
        ("images", RNG(1).random((8, 16, 24)).astype(np.float32)),
        ("labels", RNG(2).integers(0, 3, (8, 16, 24)).astype(np.uint8)),
    ):
        (folder / name).mkdir(parents=True)
        affine = np.array([[0, 1.0, 0, 5], [-1.2, 0, 0, 9], [0, 0, 2.0, -4], [0, 0, 0, 1.0]])
        nib.save(nib.Nifti1Image(values, affine), folder / name / "a.nii.gz")
    model = make_model(tmp_path / "m.safetensors", plan)
    (one,) = run(model, folder, tmp_path / "out")["inputs"]
    image = one["images"][0]
    (source,) = find_inputs(folder, plan.task).sources
    (decoded,) = source.images()
    pixels = torch.from_numpy(prepare_image(decoded, None, plan.task, plan.preprocessing).pixels)[
        None
    ]
    network, mean = open_finished(model).build(), torch.zeros(3, 16, 8, 24)
    marked = torch.zeros(16, 8, 24, dtype=torch.bool)
    with torch.no_grad():
        for number in range(8):
            way = [axis + 1 for axis in range(3) if number >> axis & 1]
            back = network(pixels.flip([a + 1 for a in way])).softmax(1)[0].flip(way)
            mean += back / 8
            marked |= back.argmax(0) > 0
    expected = -(mean * mean.log()).sum(0) / np.log(3)
    assert image["uncertainty"] == pytest.approx(expected[marked].mean().item(), abs=1e-5)
    shown = nib.load(tmp_path / "out" / one["files"]["map"])
    np.testing.assert_allclose(shown.affine, affine)
    turned = np.asarray(nib.as_closest_canonical(shown).dataobj)
    np.testing.assert_allclose(turned, expected.numpy() * 255, atol=0.51)
    answer = Predictor(open_finished(model), Runtime())(decoded, plan.preprocessing)
    truth = np.asarray(nib.as_closest_canonical(nib.load(folder / "labels" / "a.nii.gz")).dataobj)
    for k, name in enumerate(plan.task.classes, start=1):
        both = np.sum((answer.labels == k) & (truth == k))
        dice = 2 * both / (np.sum(answer.labels == k) + np.sum(truth == k))
        assert image["dice"][name] == pytest.approx(dice)
    assert image["error"] == pytest.approx(1 - np.mean(list(image["dice"].values())))
    assert 0 < image["tells_wrong"] < 1


def explained(report: pydicom.Dataset) -> list[tuple[str, list[str]]]:
    """Of each group the finding, and the instances that it names as its visual explanation."""
    (whole,) = [item for item in report.ContentSequence if item.ValueType == "CONTAINER"]
    found: list[tuple[str, list[str]]] = []
    for group in whole.ContentSequence:
        finding, named = "", []
        for item in group.ContentSequence:
            code = item.ConceptNameCodeSequence[0].CodeValue
            if code == "121071":
                finding = item.ConceptCodeSequence[0].CodeMeaning
            if (code, item.ValueType) == ("130401", "IMAGE"):
                named.append(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        found.append((finding, named))
    return found


def test_the_map_of_an_image_is_a_picture_that_its_report_names(
    tmp_path: Path, trained: Path, dx: Any
) -> None:
    """One file with two frames, the second sick; read back by pydicom, and by a verifier."""
    pixels = np.rint(planted(2, 1)[0] * 4000).astype(int)
    clip = {"SOPClassUID": pydicom.uid.UltrasoundMultiFrameImageStorage, "Modality": "US"}
    place = dx(tmp_path / "in" / "a.dcm", pixels, **clip)
    (one,) = run(trained, tmp_path / "in", tmp_path / "out")["inputs"]
    assert set(one["files"]) == {"map", "sc", "sc2", "sr"} and one["state"] == "predicted"
    image, report, *shown = (
        pydicom.dcmread(path)
        for path in (place, *(tmp_path / "out" / one["files"][k] for k in ("sr", "sc", "sc2")))
    )
    assert [told["explained"] for told in one["images"]] == ["well", "sick"]
    assert explained(report) == [
        ("well", [shown[0].SOPInstanceUID]),
        ("sick", []),
        ("well", []),
        ("sick", [shown[1].SOPInstanceUID]),
    ]
    for number, picture in enumerate(shown, start=1):
        assert picture.PatientID == image.PatientID
        assert picture.StudyInstanceUID == image.StudyInstanceUID
        assert picture.SeriesInstanceUID != image.SeriesInstanceUID
        origin = picture.SourceImageSequence[0]
        assert origin.ReferencedSOPInstanceUID == image.SOPInstanceUID
        assert origin.ReferencedFrameNumber == number
        assert picture.DerivationDescription.startswith("Not for diagnosis. grad-cam of ")
        assert picture.pixel_array.shape == (SIDE, SIDE, 3)
    # Below the words the picture has a colour where the map is strong.
    values = np.asarray(nib.load(tmp_path / "out" / one["files"]["map"]).dataobj)
    rows = values[..., 1].astype(float)
    colours = shown[1].pixel_array.astype(float)
    tint = colours[..., 0] - colours[..., 2]
    assert np.corrcoef(rows[16:].ravel(), tint[16:].ravel())[0, 1] > 0.9
    for kind in ("sc", "sc2", "sr"):
        said = dciodvfy(tmp_path / "out" / one["files"][kind])
        assert "Error" not in said and "Abort" not in said, said


@pytest.mark.parametrize("frames", [False, True])
def test_the_map_of_a_volume_lies_in_its_slices(
    tmp_path: Path, make_plan: Any, make_model: Any, ct: Any, frames: bool
) -> None:
    """A parametric map, place by place against the NIfTI map as SimpleITK reads it."""
    turn = {"along": (0.8, 0.6, 0), "down": (-0.6, 0.8, 0)}
    folder = ct(tmp_path / "in", RNG(0).integers(0, 2000, (8, 16, 24)), frames=frames, **turn)
    plan = make_plan("segmentation", (24, 16, 8), "CT", intensity="unit")
    model = make_model(tmp_path / "m.safetensors", plan)
    (one,) = run(model, folder, tmp_path / "out")["inputs"]
    found = pydicom.dcmread(tmp_path / "out" / one["files"]["pm"])
    shown = sitk.ReadImage(str(tmp_path / "out" / one["files"]["map"]))
    values = sitk.GetArrayFromImage(shown)
    assert values.std() > 1
    assert found.NumberOfFrames == 8
    shared = found.SharedFunctionalGroupsSequence[0]
    scale = shared.RealWorldValueMappingSequence[0]
    assert (scale.RealWorldValueSlope, scale.RealWorldValueIntercept) == (1 / 255, 0)
    plane = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    along, down = np.array(plane[:3], float), np.array(plane[3:], float)
    per_row, per_column = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    groups = found.PerFrameFunctionalGroupsSequence
    for frame, group in zip(found.pixel_array, groups, strict=True):
        corner = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in ((0, 0), (3, 17), (15, 2), (9, 23)):
            place = corner + along * per_column * column + down * per_row * row
            x, y, z = shown.TransformPhysicalPointToIndex(place.tolist())
            assert frame[row, column] == values[z, y, x]
    report = pydicom.dcmread(tmp_path / "out" / one["files"]["sr"])
    assert explained(report) == [(name, [found.SOPInstanceUID]) for name in plan.task.classes]
    for kind in ("pm", "sr", "seg"):
        said = dciodvfy(tmp_path / "out" / one["files"][kind])
        assert "Error" not in said and "Abort" not in said, said


def test_an_unknown_class_is_refused(
    tmp_path: Path, trained: Path, scans: Path, commands: Any
) -> None:
    words = ("explain", trained, scans, "--out", tmp_path / "out", "--class", "tired")
    done = commands("fedward_client.cli", *words, cwd=tmp_path)
    assert done.returncode == PlanError.exit_code
    assert "Choose one of well, sick" in done.stderr and not (tmp_path / "out").exists()


def test_the_command_on_a_dataset(tmp_path: Path, site: Path, chest: Path, commands: Any) -> None:
    words = ("explain", chest, "chest", "--out", "out", "--no-trust", "--json")
    done = commands("fedward_client.cli", *words, cwd=tmp_path)
    assert done.returncode == 11, done.stderr
    told = json.loads(done.stdout)
    assert told["explained"] == 12 and told["refusals"]["odd/letter.txt"] == "not DICOM"
    written = json.loads((tmp_path / "out" / "explain.json").read_text())
    known = [i for one in written["inputs"] for i in one["images"] if "label" in i]
    assert len(known) == 12  # as the dataset's own table has them


def test_the_page_works_from_the_disk_by_keyboard(
    tmp_path: Path, trained: Path, scans: Path
) -> None:
    """In a real browser: nothing is asked for but the file, and no script or policy complains."""
    told = run(trained, scans, tmp_path / "out")
    page = tmp_path / "out" / "explain.html"
    assert not re.search(r"https?:", page.read_text())
    rows = "[...document.querySelectorAll('#cases tbody tr')].map(row => row.dataset.name.trim())"
    error = {one["name"]: one["images"][0].get("error", -1) for one in told["inputs"]}
    worst = sorted(error, key=lambda name: -error[name])
    with browser(page) as shown:
        assert shown.run("document.querySelector('[role=alert]').innerText").startswith("Not for")
        assert shown.run("[...document.images].every(one => one.naturalWidth === 32)")
        names = shown.run(rows)
        shown.press("e")
        assert shown.run(rows) == worst and worst[-1] == "images/7.png"  # without a label: last
        shown.press("e")
        assert shown.run(rows) == [*worst[-2::-1], worst[-1]]
        shown.press("ArrowDown")
        assert shown.run("document.activeElement.dataset.name").strip() == worst[-3]
        shown.press("m")
        assert (
            shown.run("getComputedStyle(document.querySelector('img.map')).visibility") == "hidden"
        )
        shown.run("document.querySelector('th[data-key=uncertainty] button').click()")
        values = shown.run(rows.replace("name.trim()", "uncertainty"))
        assert [float(v) for v in values] == sorted(map(float, values), reverse=True)
        shown.press("n")
        assert shown.run(rows) == names
        assert not shown.complaints
        asked = {address.split(":")[0] for address in shown.asked_for}
        assert (
            asked == {"file", "data"} and sum(a.startswith("file:") for a in shown.asked_for) == 1
        )
