"""Labels that do not fit: what is there, what is sought, and what to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data.dataset import DatasetSpec, hints, read_dataset

TASK = Task(kind="classification", classes=("normal", "opacity"))


def pictures(folder: Path, count: int = 12) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(count):
        pixels = np.random.default_rng(place).integers(0, 255, (16, 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"scan_{place}.png")


def table(folder: Path, header: str, row: str, count: int = 12) -> None:
    rows = [row.format(k=k, word=("normal", "opacity")[k % 2]) for k in range(count)]
    (folder / "labels.csv").write_text("\n".join([header, *rows]), "utf-8")


def told(folder: Path, task: Task = TASK) -> str:
    with pytest.raises(DataError) as failed:
        read_dataset(DatasetSpec(folder), task)
    return str(failed.value)


def test_another_column_of_labels_is_named(tmp_path: Path) -> None:
    pictures(tmp_path)
    table(tmp_path, "image,Diagnosis,Age", "scan_{k}.png,{word},{k}")
    text = told(tmp_path)
    assert "no label: 12" in text
    assert "columns image, Diagnosis, Age; sought is `label`" in text
    assert 'Did you mean labels.column = "Diagnosis"?' in text


def test_another_column_of_names_is_named(tmp_path: Path) -> None:
    pictures(tmp_path)
    table(tmp_path, "image,png,label", "{k},scan_{k}.png,{word}")
    text = told(tmp_path)
    assert 'set labels.key = "png"' in text and "scan_3" not in text


def test_words_without_a_class_are_named_with_what_may_be_meant(tmp_path: Path) -> None:
    pictures(tmp_path)
    table(tmp_path, "image,label", "scan_{k}.png,No Finding")
    text = (tmp_path / "labels.csv").read_text("utf-8").replace("2.png,No Finding", "2.png,Opacty")
    (tmp_path / "labels.csv").write_text(text, "utf-8")
    text = told(tmp_path)
    assert "No Finding (" in text and "labels.unlabelled" in text
    assert '"Opacty" = "opacity"' in text


def test_what_is_left_out_of_the_rest_is_explained_too(tmp_path: Path) -> None:
    pictures(tmp_path)
    table(tmp_path, "image,label", "scan_{k}.png,{word}", 11)
    with (tmp_path / "labels.csv").open("a") as file:
        file.write("\nscan_11.png,No Finding\n")
    spec = DatasetSpec(tmp_path)
    found = read_dataset(spec, TASK)
    assert len(found.samples) == 11
    (hint,) = hints(spec, TASK, found.left_out)
    assert hint.startswith("words without a class: No Finding (1)")


def test_folders_that_are_no_classes_are_named(tmp_path: Path) -> None:
    for name in ("NORMAL", "opacities"):
        pictures(tmp_path / name, 3)
    spec = DatasetSpec(tmp_path)
    found = read_dataset(spec, TASK)
    first, second = hints(spec, TASK, found.left_out)
    assert "sub-folders are NORMAL, opacities" in first
    assert '"opacities" = "opacity"' in second


def test_folders_of_patients_are_not_named(tmp_path: Path) -> None:
    for place in range(30):
        pictures(tmp_path / f"MILLER{place}", 1)
    assert "MILLER" not in told(tmp_path)


@pytest.mark.parametrize("names", [("normal", "opacity"), ("images", "masks"), ("train", "test")])
def test_folders_of_one_dataset_are_no_hospitals(
    tmp_path: Path, names: tuple[str, ...], commands: Any, plan_file: Path
) -> None:
    text = plan_file.read_text("utf-8").replace('["no", "yes"]', '["normal", "opacity"]')
    plan_file.write_text(text, "utf-8")
    for name in names:
        pictures(tmp_path / "data" / name, 3)
    done = commands(
        "fedward_simulation.cli", "run", plan_file, "--data", tmp_path / "data", cwd=tmp_path
    )
    assert done.returncode == 11, done.stderr
    assert "classes or parts of one dataset" in done.stderr
    assert "Choose --partition iid" in done.stderr


def test_left_out_files_are_named_at_the_hospital_alone(tmp_path: Path, commands: Any) -> None:
    pictures(tmp_path / "data")
    table(tmp_path / "data", "image,label", "scan_{k}.png,{word}", 11)
    (tmp_path / "data" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "site.toml").write_text(
        'version = 1\n[site]\nname = "north"\n[datasets.chest]\nroot = "data"\n'
        'task = "classification"\nclasses = ["normal", "opacity", "mass"]\n',
        "utf-8",
    )
    client = "fedward_client.cli"
    plain = commands(client, "data", "report", "chest", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert "broken.png" not in plain.stdout
    named = commands(client, "data", "report", "chest", "--files", cwd=tmp_path)
    assert "not readable: broken.png" in named.stdout
    assert "no label: scan_11.png" in named.stdout
    # A class that no image has is told before a study comes across it.
    frozen = commands(client, "data", "freeze", "chest", cwd=tmp_path)
    assert frozen.returncode == 0 and "no image of mass" in " ".join(frozen.stdout.split())


def test_masks_may_be_gif_and_share_an_ending(tmp_path: Path, commands: Any) -> None:
    """Through index, report and freeze, as a hospital would use them."""
    pictures(tmp_path / "data" / "images", 6)
    (tmp_path / "data" / "masks").mkdir()
    for place in range(6):
        mask = np.zeros((16, 16), np.uint8)
        mask[2 : 4 + place] = 255
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"scan_{place}_mask.gif")
    (tmp_path / "site.toml").write_text(
        'version = 1\n[site]\nname = "north"\n[datasets.chest]\nroot = "data"\n'
        'task = "segmentation"\nclasses = ["lesion"]\n',
        "utf-8",
    )
    done = commands("fedward_client.cli", "data", "freeze", "chest", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (note,) = json.loads(done.stdout)["notes"]
    assert note.startswith('names of masks end in "_mask" (6)')
    task = Task(kind="segmentation", classes=("lesion",))
    found = read_dataset(DatasetSpec(tmp_path / "data"), task)
    assert len(found.samples) == 6 and not found.left_out
    marked = [int((sample.mask() > 0).sum()) for sample in found.samples if sample.mask]
    assert marked == [16 * (2 + place) for place in range(6)]
    report = commands("fedward_client.cli", "data", "report", "chest", "--json", cwd=tmp_path)
    assert '"lesion": 6' in report.stdout, report.stdout


def test_an_ending_that_is_not_everywhere_counts_for_nothing(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 3)
    pictures(tmp_path / "masks", 3)
    for place, ending in enumerate(("_mask", "_mask", "_other")):
        old = tmp_path / "masks" / f"scan_{place}.png"
        old.rename(old.with_name(f"scan_{place}{ending}.png"))
    with pytest.raises(DataError, match="no mask: 3"):
        read_dataset(DatasetSpec(tmp_path), Task(kind="segmentation", classes=("lesion",)))


def test_words_in_the_columns_of_classes_are_told(tmp_path: Path) -> None:
    pictures(tmp_path)
    table(tmp_path, "image,normal,opacity", "scan_{k}.png,,-1.0")
    text = told(tmp_path)
    assert "neither 1 nor 0: empty (12), -1.0 (12)" in text and "labels.no" in text


def test_masks_among_the_images_of_a_class_are_no_images(tmp_path: Path) -> None:
    for name in TASK.classes:
        pictures(tmp_path / name, 2)
        (tmp_path / name / "scan_1.png").rename(tmp_path / name / "scan_0_mask_1.png")
    found = read_dataset(DatasetSpec(tmp_path), TASK)
    assert [sample.patient for sample in found.samples] == [
        "normal/scan_0.png",
        "opacity/scan_0.png",
    ]
    assert [item.reason for item in found.left_out] == ["not selected"] * 2
    assert found.notes == ("2 files are masks by their names (P1_mask beside P1), and no images",)


def test_a_table_of_another_name_is_told(tmp_path: Path) -> None:
    pictures(tmp_path / "png")
    table(tmp_path, "image,label", "scan_{k}.png,{word}")
    (tmp_path / "labels.csv").rename(tmp_path / "findings.csv")
    assert 'set labels.file = "findings.csv"' in told(tmp_path)


def test_rows_of_patients_that_name_no_image_are_told(tmp_path: Path) -> None:
    for name in TASK.classes:
        pictures(tmp_path / name, 2)
    patients = tmp_path / "patients.csv"
    patients.write_text("image,patient\nscan 0,anna\nnormal/scan_1.png,berta\n", "utf-8")
    found = read_dataset(DatasetSpec(tmp_path), TASK)
    (hint,) = hints(DatasetSpec(tmp_path), TASK, found.left_out)
    assert "1 of 2 rows of patients.csv name no image" in hint and "anna" not in hint
    patients.write_text("image,MRN\nnormal/scan_1.png,berta\n", "utf-8")
    assert "columns image, MRN, and none is called patient: set labels.patient_column" in told(
        tmp_path
    )
    patients.write_text("name,patient\nnormal/scan_1.png,berta\n", "utf-8")
    assert told(tmp_path).endswith("needs a column image or file. Name its key column so.")
