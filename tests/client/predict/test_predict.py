"""``fedward-client predict``: the trainer's own answers, one input at a time, taken up again."""

from __future__ import annotations

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
import warm_start
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image as Pillow

from fedward import rule_codes
from fedward.errors import DataError, ModelError, OutputError, StudyError
from fedward.models import build_model, save_model, to_arrays
from fedward.models.finished import open_finished
from fedward.plan.load import canonical, plan_from, plan_hash
from fedward.protocol import RoundOrder
from fedward.signing import sign_model
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.options import ChannelOptions, LabelOptions
from fedward_client.data.prepare import prepare
from fedward_client.data.transforms import prepare_image
from fedward_client.kept_models import KeptModels
from fedward_client.predict.beside import channels_beside, rows_beside
from fedward_client.predict.inputs import find_inputs
from fedward_client.predict.run import Wish, predict
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

RNG = np.random.default_rng


def run(model: Path, path: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Predict in this process; what ``predictions.json`` then holds."""
    opened = open_finished(model)
    predict(Wish(opened, path, out, **more), find_inputs(path, opened.plan.task), Runtime())
    told: dict[str, Any] = json.loads((out / "predictions.json").read_text("utf-8"))
    return told


def radiographs(folder: Path, dx: Any, count: int = 4, **tags: Any) -> Path:
    for k in range(count):
        pixels = RNG(k).integers(0, 4096, (20, 24))
        dx(folder / f"{k}.dcm", pixels, PatientID=f"P{k}", SeriesInstanceUID=f"1.2.{k}", **tags)
    return folder


def test_probabilities_are_those_of_the_trainer_s_evaluation(
    tmp_path: Path, dx: Any, chest: Path
) -> None:
    folder = radiographs(tmp_path / "in", dx, 12)
    (folder / "labels.csv").write_text(
        "file,label\n" + "".join(f"{k}.dcm,{('well', 'sick')[k % 2]}\n" for k in range(12))
    )
    model = open_finished(chest)
    samples = read_dataset(DatasetSpec(folder, "dicom"), model.plan.task).samples
    site = prepare("site", samples, model.plan)
    order = RoundOrder(
        plan=canonical(model.plan), plan_hash=plan_hash(model.plan), round=1, part="test"
    )
    answers = Trainer(model.plan, site, Runtime()).answers(model.arrays, order)
    told = {one["patient"]: one for one in run(chest, folder, tmp_path / "out")["inputs"]}
    assert len(told) == 12  # the table of labels is no image
    number = {k: samples[k].patient.split("\\")[-1] for k in site.split["test"]}
    for row, k in enumerate(site.split["test"]):
        found = told[number[k]]["images"][0]["probabilities"]
        assert list(found.values()) == pytest.approx(answers.values[row], abs=1e-5)
    values = [one["images"][0]["probabilities"]["sick"] for one in told.values()]
    assert max(values) - min(values) > 1e-3  # a model that tells images apart


def test_a_model_that_reads_a_table_takes_each_image_s_row(
    tmp_path: Path, dx: Any, make_plan: Any, make_model: Any
) -> None:
    """DICOM by patient, pictures by name; without a usable row an image is refused by name."""
    plain = make_plan("classification", (16, 16), "DX")
    age = {"name": "age", "kind": "number", "range": [0, 100]}
    content = plain.model_dump(exclude_defaults=True) | {"table": {"column": [age], "hidden": 3}}
    plan = plan_from(content)
    model = make_model(tmp_path / "m.safetensors", plan)
    scans, pictures = radiographs(tmp_path / "dicom", dx), tmp_path / "png"
    pictures.mkdir()
    for k in range(4):
        Pillow.fromarray(np.full((16, 16), 40 * k, np.uint8)).save(pictures / f"{k}.png")
    ages = [10, 90, "", 990]
    rows = "".join(f"P{k},{age}\n" for k, age in enumerate(ages))
    (tmp_path / "t.csv").write_text("PatientID,Age\n" + rows)
    (pictures / "labels.csv").write_text("image,age\n" + rows.replace("P", ""))
    network = open_finished(model).build().eval()
    for folder, options in (
        (scans, LabelOptions(file=tmp_path / "t.csv")),
        (pictures, LabelOptions()),
    ):
        found = find_inputs(folder, plan.task)
        beside = rows_beside(plan.table, found, folder, options)
        told = run(model, folder, tmp_path / f"out-{folder.name}", rows=beside, force=True)
        told = told["inputs"]
        assert [one["state"] != "refused" for one in told] == [True, True, False, False]
        assert told[2]["reason"] == rule_codes.VALUE_MISSING
        assert told[3]["reason"] == rule_codes.VALUE_RANGE
        for k, one in enumerate(told[:2]):
            (image,) = found.sources[k].images()
            pixels = prepare_image(image, None, plan.task, plan.preprocessing).pixels
            row = torch.tensor([[2 * ages[k] / 100 - 1]])
            expected = network(torch.from_numpy(pixels[None]), row).softmax(1)[0].tolist()
            found_now = list(one["images"][0]["probabilities"].values())
            assert found_now == pytest.approx(expected, abs=1e-5)
    with pytest.raises(DataError, match="reads a table beside"):
        rows_beside(plan.table, find_inputs(scans, plan.task), scans, LabelOptions())


def test_named_channels_are_those_that_an_image_has(
    tmp_path: Path, make_plan: Any, make_model: Any
) -> None:
    plain = make_plan("segmentation", (16, 16), "any", intensity="zscore")
    content = plain.model_dump(exclude_defaults=True)
    names = [{"name": "flair"}, {"name": "t1", "missing": "drop"}]
    content["preprocessing"] |= {"channels": 2, "channel": names}
    plan = plan_from(content)
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    for k in range(3):
        values = RNG(k).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Pillow.fromarray(values).save(folder / "images" / f"{k}.png")
    (folder / "patients.csv").write_text(
        "image,patient,no t1,no flair\n0,a,0,0\n1,b,1,0\n2,c,0,1\n"
    )
    channels = {"t1": ChannelOptions(0, "no t1"), "flair": ChannelOptions(2, "no flair")}
    found = find_inputs(folder, plan.task)
    beside = channels_beside(channels, found, folder, LabelOptions())
    model = make_model(tmp_path / "m.safetensors", plan)
    told = run(model, folder, tmp_path / "out", channels=beside)["inputs"]
    assert [one["state"] for one in told] == ["predicted", "marked", "refused"]
    assert told[1]["marks"] == ["the image lacks t1"]
    assert told[2]["reason"] == rule_codes.CHANNEL_MISSING
    network = open_finished(model).build().eval()
    for k in range(2):
        colours = np.asarray(Pillow.open(folder / "images" / f"{k}.png"), np.float32)
        planes = [
            (colours[..., p] - colours[..., p].mean()) / colours[..., p].std() for p in (2, 0)
        ]
        planes[1] *= k == 0
        expected = network(torch.from_numpy(np.stack(planes)[None].astype(np.float32))).argmax(1)[0]
        made = np.asarray(Pillow.open(tmp_path / "out" / told[k]["files"]["mask"]))
        assert (made == expected.numpy()).mean() > 0.99


def test_a_dataset_s_files_of_one_case_are_one_image(
    tmp_path: Path, make_plan: Any, make_model: Any
) -> None:
    content = make_plan("segmentation", (16, 16, 16), "any").model_dump(exclude_defaults=True)
    content["preprocessing"] |= {"channels": 2, "channel": [{"name": "ct"}, {"name": "pet"}]}
    plan = plan_from(content)
    folder = tmp_path / "images"
    folder.mkdir()
    affine = np.diag([1.0, 1.2, 2.0, 1.0])
    for name in ("a_ct", "a_pet", "b_ct"):
        nib.save(nib.Nifti1Image(RNG(1).random((12, 10, 8)), affine), folder / f"{name}.nii.gz")
    channels = {name: ChannelOptions(suffix=f"_{name}") for name in ("ct", "pet")}
    found = find_inputs(tmp_path, plan.task, channels=channels)
    assert [one.name for one in found.sources] == ["images/a_ct.nii.gz", "images/b_ct.nii.gz"]
    beside = channels_beside(channels, found, tmp_path, LabelOptions())
    model, out = make_model(tmp_path / "m.safetensors", plan), tmp_path / "out"
    predict(Wish(open_finished(model), tmp_path, out, channels=beside), found, Runtime())
    told = json.loads((out / "predictions.json").read_text("utf-8"))["inputs"]
    assert [one["state"] for one in told] == ["predicted", "refused"]
    assert told[1]["reason"] == rule_codes.CHANNEL_MISSING
    assert nib.load(out / told[0]["files"]["mask"]).shape == (12, 10, 8)


PATCHES = {"patch": {"overlap": 0.25}, "spacing": [1.3, 1.1, 1.7]}


@pytest.mark.parametrize(("shape", "settings"), [((16,) * 3, {}), ((25, 18, 30), PATCHES)])
def test_masks_are_those_of_the_trainer_s_evaluation(
    tmp_path: Path, make_plan: Any, make_model: Any, shape: Any, settings: Any
) -> None:
    """NIfTI volumes of odd orientations: Dice of the written masks, against the trainer's."""
    folder = tmp_path / "in"
    plan = make_plan("segmentation", (16, 16, 16), "CT", intensity="unit", **settings)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    affines = [
        np.diag([1.0, 1.2, 2.0, 1.0]),
        np.array([[0, 1.0, 0, 5], [-1.2, 0, 0, 9], [0, 0, 2.0, -4], [0, 0, 0, 1.0]]),
        np.array([[-1.0, 0, 0, 5], [0, 0, 1.2, 9], [0, -2.0, 0, -4], [0, 0, 0, 1.0]]),
    ]
    for k in range(9):
        values = RNG(k).random(shape).astype(np.float32)
        truth = RNG(k + 90).integers(0, 3, shape).astype(np.uint8)
        for name, array in (("images", values), ("labels", truth)):
            nib.save(nib.Nifti1Image(array, affines[k % 3]), folder / name / f"{k}.nii.gz")
    model = open_finished(make_model(tmp_path / "m.safetensors", plan))
    samples = read_dataset(DatasetSpec(folder, "nifti"), plan.task).samples
    site = prepare("site", samples, plan)
    order = RoundOrder(plan=canonical(plan), plan_hash=plan_hash(plan), round=1, part="test")
    dice = Trainer(plan, site, Runtime()).answers(model.arrays, order, surface=False).values[0]
    told = run(tmp_path / "m.safetensors", folder, tmp_path / "out")["inputs"]
    assert len(told) == 9
    for row, k in enumerate(site.split["test"]):
        mask = nib.load(tmp_path / "out" / told[k]["files"]["mask"])
        truth = nib.load(folder / "labels" / f"{k}.nii.gz")
        np.testing.assert_allclose(mask.affine, truth.affine)
        guess, right = np.asarray(mask.dataobj), np.asarray(truth.dataobj)
        for number in (1, 2):
            both = np.sum((guess == number) & (right == number))
            expected = 2 * both / (np.sum(guess == number) + np.sum(right == number))
            assert dice[row, number - 1] == pytest.approx(expected, abs=1e-5)
            voxels = told[k]["images"][0]["voxels"][plan.task.classes[number - 1]]
            assert voxels == np.sum(guess == number) > 0
            ml = told[k]["images"][0]["ml"][plan.task.classes[number - 1]]
            assert ml == pytest.approx(voxels * 2.4 / 1000)


def test_a_picture_gets_a_mask_of_its_size(tmp_path: Path, make_plan: Any, make_model: Any) -> None:
    plan = make_plan("segmentation", (16, 16), "XC", channels=3)
    (tmp_path / "in").mkdir()
    Pillow.fromarray(RNG(0).integers(0, 255, (31, 47), np.uint8)).save(tmp_path / "in" / "a.png")
    told = run(make_model(tmp_path / "m.safetensors", plan), tmp_path / "in", tmp_path / "out")
    (one,) = told["inputs"]
    mask = np.asarray(Pillow.open(tmp_path / "out" / one["files"]["mask"]))
    assert mask.shape == (31, 47)
    assert one["images"][0]["voxels"] == {"lung": np.sum(mask == 1), "heart": np.sum(mask == 2)}
    assert one["state"] == "marked"  # no spacing, no modality: told, not hidden
    assert one["marks"] == [
        "the file states no modality; the model is for XC",
        "the image is grey; the model is for ones in colour",
    ]


def test_a_slice_of_nifti_comes_back_to_its_own_axes(
    tmp_path: Path, make_plan: Any, make_model: Any
) -> None:
    plan = make_plan("segmentation", (16, 8), "MR", intensity="unit")
    affine = np.array([[0, 0, 3.0, 1], [-1.0, 0, 0, 2], [0, 2.0, 0, 3], [0, 0, 0, 1.0]])
    (tmp_path / "in").mkdir()
    image = RNG(1).random((8, 16, 1)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "in" / "a.nii")
    run(make_model(tmp_path / "m.safetensors", plan), tmp_path / "in", tmp_path / "out")
    (file,) = (tmp_path / "out" / "masks").iterdir()
    mask = nib.load(file)
    np.testing.assert_allclose(mask.affine, affine)
    assert mask.shape == (8, 16, 1)
    # Shown as radiologists do, the mask is the network's own choice on the image so shown.
    (source,) = find_inputs(tmp_path / "in", plan.task).sources
    (shown,) = source.images()
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj), affine), tmp_path / "mask.nii")
    (again,) = find_inputs(tmp_path / "mask.nii", plan.task).sources
    (labels,) = again.images()
    assert labels.pixels.shape == shown.pixels.shape == (1, 16, 8)
    opened = open_finished(tmp_path / "m.safetensors")
    from fedward_client.predict.run import Predictor

    answer = Predictor(opened, Runtime())(shown, plan.preprocessing)
    np.testing.assert_array_equal(labels.pixels[0], answer.labels)


def test_a_bad_file_is_named_and_the_others_go_on(tmp_path: Path, dx: Any, chest: Path) -> None:
    folder = radiographs(tmp_path / "in", dx)
    (folder / "letter.txt").write_text("Dear colleague")
    whole = (folder / "2.dcm").read_bytes()
    (folder / "2.dcm").write_bytes(whole[:-300])
    told = {one["name"]: one for one in run(chest, folder, tmp_path / "out")["inputs"]}
    assert {name: one["state"] for name, one in told.items()} == {
        "0.dcm": "predicted",
        "1.dcm": "predicted",
        "2.dcm": "refused",
        "3.dcm": "predicted",
        "letter.txt": "refused",
    }
    assert told["2.dcm"]["reason"] == "not readable"
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines()))
    assert [row["input"] for row in rows if not row["probabilities sick"]] == [
        "2.dcm",
        "letter.txt",
    ]
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) in (0o600, 0o700)
    (folder / "2.dcm").write_bytes(whole)  # mended: it alone is predicted now
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "dicom").iterdir()}
    again = {one["name"]: one for one in run(chest, folder, tmp_path / "out")["inputs"]}
    assert again["2.dcm"]["state"] == "predicted"
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
    assert again["0.dcm"] == told["0.dcm"]


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Modality": "MG"}, "modality MG; the model is for DX"),
        ({"BodyPartExamined": "HAND"}, "body_part HAND; the model is for CHEST"),
        ({"PixelSpacing": None}, "the file states no spacing, and the plan resamples to one"),
    ],
)
def test_what_the_model_was_not_trained_for_is_refused_or_marked(
    tmp_path: Path, dx: Any, make_plan: Any, make_model: Any, tags: Any, reason: str
) -> None:
    plan = make_plan("classification", (40, 40), "DX", spacing=[0.6, 0.6])
    plan = plan.model_copy(
        update={"images": plan.images.model_copy(update={"body_part": ("CHEST",)})}
    )
    model = make_model(tmp_path / "m.safetensors", plan)
    folder = radiographs(tmp_path / "in", dx, 1)
    dx(folder / "odd.dcm", RNG(9).integers(0, 4096, (20, 24)), **tags)
    told = {one["name"]: one for one in run(model, folder, tmp_path / "out")["inputs"]}
    assert told["0.dcm"]["state"] == "predicted"
    assert told["odd.dcm"]["state"] == "refused" and told["odd.dcm"]["reason"] == reason
    assert not told["odd.dcm"]["images"]
    forced = run(model, folder, tmp_path / "forced", force=True)["inputs"]
    told = {one["name"]: one for one in forced}
    assert told["0.dcm"]["state"] == "predicted"
    assert told["odd.dcm"]["state"] == "marked" and told["odd.dcm"]["marks"] == [reason]
    report = pydicom.dcmread(tmp_path / "forced" / told["odd.dcm"]["files"]["sr"])
    assert reason in report.to_json()  # whoever reads the report sees it too


def test_values_outside_the_window_are_refused(
    tmp_path: Path, dx: Any, make_plan: Any, make_model: Any
) -> None:
    plan = make_plan("classification", (16, 16), "DX", window=[-1000.0, -1.0])
    folder = radiographs(tmp_path / "in", dx, 1)
    (one,) = run(make_model(tmp_path / "m.safetensors", plan), folder, tmp_path / "out")["inputs"]
    assert one["reason"] == "no pixel lies inside the plan's window"


def test_a_folder_of_results_is_of_one_model_and_input(
    tmp_path: Path, dx: Any, chest: Path, make_model: Any
) -> None:
    folder = radiographs(tmp_path / "in", dx, 1)
    run(chest, folder, tmp_path / "out")
    other = make_model(tmp_path / "other.safetensors", open_finished(chest).plan, 2)
    with pytest.raises(OutputError, match="another model_sha256"):
        run(other, folder, tmp_path / "out")
    with pytest.raises(OutputError, match="another input"):
        run(chest, folder / "0.dcm", tmp_path / "out")


def test_a_torn_line_of_the_journal_costs_one_prediction(
    tmp_path: Path, dx: Any, chest: Path
) -> None:
    folder = radiographs(tmp_path / "in", dx, 3)
    first = run(chest, folder, tmp_path / "out")
    journal = tmp_path / "out" / "progress.jsonl"
    journal.write_text(journal.read_text()[:-40])
    assert run(chest, folder, tmp_path / "out") == first
    assert len(journal.read_text().splitlines()) == 4


def test_a_model_without_its_plan_or_with_another_is_refused(
    tmp_path: Path, chest: Path, make_plan: Any
) -> None:
    plan = open_finished(chest).plan
    arrays = to_arrays(build_model(plan, 1))
    bare = tmp_path / "old" / "model.safetensors"
    save_model(bare, arrays, {"study": "s", "plan_sha256": plan_hash(plan)})
    with pytest.raises(ModelError, match="must come with its plan"):
        open_finished(bare)
    (bare.parent / "plan.json").write_text(canonical(plan))
    assert open_finished(bare).plan == plan  # as earlier releases delivered it
    other = make_plan("classification", (32, 32), "DX")
    (bare.parent / "plan.json").write_text(canonical(other))
    with pytest.raises(ModelError, match="must have the SHA-256 that the file names"):
        open_finished(bare)


def test_a_kept_model_is_found_by_its_study(tmp_path: Path, chest: Path) -> None:
    model, kept = open_finished(chest), KeptModels(tmp_path / "state")
    kept.keep("study-1", model.plan, "shared", model.arrays)
    assert open_finished(kept.path("study-1", None)).which == "shared"
    kept.keep("study-1", model.plan, "own", model.arrays)
    assert open_finished(kept.path("study-1", None)).which == "own"
    assert open_finished(kept.path("study-1", "shared")).study == "study-1"
    with pytest.raises(StudyError, match="shared of other; kept of it: none"):
        kept.path("other", None)


def test_the_command_on_a_dataset_with_a_kept_model(
    tmp_path: Path, site: Path, chest: Path, commands: Any
) -> None:
    """The export of a hospital with all that lies beside the images, by the dataset's name."""
    model, delivered = open_finished(chest), tmp_path / "delivered.safetensors"
    about = sign_model(Ed25519PrivateKey.generate(), model.about, model.arrays)
    save_model(delivered, model.arrays, about)
    state = tmp_path / "state"
    text = site.read_text().replace("[site]", f'[site]\nstate = "{state}"')
    site.write_text(text + "[policy]\nany_coordinator = true\n")
    done = commands("fedward_client.cli", "model", "fetch", delivered, cwd=tmp_path)
    assert done.stdout.startswith("Kept the model of lungs (study-1)"), done.stderr
    for words in (("study-1",), ("study-1", "--from", delivered)):
        again = commands("fedward_client.cli", "model", "fetch", *words, cwd=tmp_path)
        assert again.stdout == done.stdout, again.stderr
    done = commands("fedward_client.cli", "model", "fetch", "study-9", cwd=tmp_path)
    assert done.returncode == StudyError.exit_code and "give it with --from" in done.stderr
    words = ("predict", "study-1", "chest", "--out", "out", "--json")
    done = commands("fedward_client.cli", *words, cwd=tmp_path)
    assert done.returncode == 11, done.stderr
    told = json.loads(done.stdout)
    assert (told["predicted"], told["marked"]) == (12, 0)
    assert told["refusals"]["odd/letter.txt"] == "not DICOM"
    assert set(told["refusals"]) >= {"odd/cut.dcm", "odd/huge.dcm", "odd/empty.dcm"}
    for path in (tmp_path / "ward-7-doe" / "odd").iterdir():
        path.unlink()
    done = commands("fedward_client.cli", *words[:-1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "12 predicted, 0 marked, 0 refused: out/predictions.csv. Not for diagnosis.\n"
    )


def test_a_folder_without_an_image_is_an_error(tmp_path: Path, chest: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"must hold images.*no images"):
        find_inputs(tmp_path / "nothing", open_finished(chest).plan.task)


@pytest.mark.integration
def test_ctrl_c_keeps_what_is_done_and_the_next_call_goes_on(
    tmp_path: Path, dx: Any, chest: Path, environment: Any
) -> None:
    folder = radiographs(tmp_path / "in", dx, 120)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedward_client.cli", "predict", str(chest), str(folder)]
    command += ["--out", str(out)]
    pipe = subprocess.PIPE
    working = warm_start.popen(command, stdout=pipe, stderr=pipe, text=True)
    journal = out / "progress.jsonl"
    end = time.monotonic() + 240
    while not (journal.exists() and len(journal.read_bytes().splitlines()) > 4):
        assert working.poll() is None and time.monotonic() < end, working.communicate()
        time.sleep(0.02)
    os.kill(working.pid, signal.SIGINT)
    printed = working.communicate(timeout=240)
    assert working.returncode == 130, printed
    assert "interrupted" in printed[1] and "Traceback" not in printed[1]
    done = json.loads((out / "predictions.json").read_text())["inputs"]
    assert 4 <= len(done) < 120
    for path in sorted(folder.iterdir())[10:]:
        path.unlink()
    again = run(chest, folder, out)["inputs"]
    fresh = run(chest, folder, tmp_path / "fresh")["inputs"]
    assert again == fresh and len(again) == 10
