"""Synthetic hospitals: what is written, that it says what it is, and that it can be read."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image as Picture

from fedward.errors import DataError, OutputError
from fedward.plan import load_plan
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.readers.dicom.pixels import read_frame
from fedward_client.data.sample import Dataset
from fedward_simulation.cohort import CohortFacts, write_cohort
from fedward_simulation.cohort.phantom import View, density, draw_anatomy
from fedward_simulation.cohort.scanner import SCANNERS
from fedward_simulation.partition import partition

STUDIES = Path(__file__).parents[3] / "studies" / "demo"
HOSPITALS = [f"hospital-{n}" for n in (1, 2, 3, 4)]
Cohort = tuple[Path, CohortFacts]


@pytest.fixture(scope="module")
def classification(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    out = tmp_path_factory.mktemp("cohort") / "classification"
    return out, write_cohort(out, 3, "classification", patients=12)


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    out = tmp_path_factory.mktemp("cohort") / "segmentation"
    return out, write_cohort(out, 3, "segmentation", patients=6)


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.dcm"))


def digest(root: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        found.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return found.hexdigest()


def read(root: Path, plan: str) -> Dataset:
    task = load_plan(STUDIES / plan).task
    return read_dataset(DatasetSpec(root, None, "folders"), task)


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_same_seed_same_bytes(kind: str, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_cohort(tmp_path / name, seed, kind, patients=2)  # type: ignore[arg-type]
        digests.append(digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


def test_facts_are_what_lies_there(classification: Cohort) -> None:
    root, facts = classification
    said = json.loads((root / "synthetic.json").read_text())
    assert said["synthetic"] is True
    assert (said["seed"], said["kind"]) == (3, "classification")
    assert said["patients"] == facts.patients == 48
    assert said["images"] == facts.images == len(files(root))
    for hospital, told in zip(facts.hospitals, said["hospitals"], strict=True):
        with (root / hospital.name / "labels.csv").open() as file:
            labels = {row["PatientID"]: row["label"] for row in csv.DictReader(file)}
        ill = sum(label == "opacity" for label in labels.values())
        assert set(labels.values()) == {"clear", "opacity"}
        assert (len(labels), ill) == (told["patients"], told["diseased"]) == (12, hospital.diseased)
        assert ill == round(12 * hospital.scanner.prevalence)


def test_every_file_says_that_it_is_synthetic(classification: Cohort) -> None:
    root, _ = classification
    for file in files(root):
        ds = pydicom.dcmread(file)
        assert ds.SyntheticData == "YES"
        assert ds.ImageType[0] == "DERIVED"
        for value in (
            ds.PatientName.family_name,
            ds.PatientID,
            ds.InstitutionName,
            ds.ImageComments,
        ):
            assert str(value).startswith("SYNTHETIC")
    for folder in (root, *(root / name for name in HOSPITALS)):
        assert "SYNTHETIC" in (folder / "README.txt").read_text()


def test_scanners_differ(classification: Cohort) -> None:
    root, _ = classification
    first = [pydicom.dcmread(files(root / name)[0]) for name in HOSPITALS]
    assert [ds.Modality for ds in first] == ["CR", "DX", "CT", "CR"]
    assert [ds.BitsStored for ds in first] == [10, 12, 16, 8]
    assert [ds.PhotometricInterpretation == "MONOCHROME1" for ds in first] == [0, 1, 0, 0]
    assert [ds.file_meta.TransferSyntaxUID.name for ds in first][3] == "RLE Lossless"
    assert len({(float(ds.RescaleSlope), float(ds.RescaleIntercept)) for ds in first}) == 3
    assert (
        len(
            {
                tuple(ds.ImagerPixelSpacing if "ImagerPixelSpacing" in ds else ds.PixelSpacing)
                for ds in first
            }
        )
        == 4
    )
    assert len({ds.SOPClassUID for ds in first}) == 3


def test_names_and_uids_are_unique_and_valid(classification: Cohort) -> None:
    headers = [pydicom.dcmread(f, stop_before_pixels=True) for f in files(classification[0])]
    uids = [ds.SOPInstanceUID for ds in headers]
    assert len(set(uids)) == len(uids)
    assert all(uid.is_valid and len(uid) <= 64 for uid in uids)
    assert all(ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID for ds in headers)
    studies = {ds.PatientID: ds.StudyInstanceUID for ds in headers}
    assert len(set(studies.values())) == len(studies) == 48


def test_pixels_use_the_bits_and_hu_are_plausible(classification: Cohort) -> None:
    root, _ = classification
    for name, scanner in zip(HOSPITALS, SCANNERS, strict=True):
        for file in files(root / name)[:3]:
            stored = pydicom.dcmread(file).pixel_array
            assert stored.shape == (scanner.rows, scanner.columns)
            assert np.ptp(stored) > 0.04 * scanner.largest
            assert stored.max() <= scanner.largest
    ct = np.stack([read_frame(f).image.pixels[0] for f in files(root / "hospital-3")])
    assert ct.min() == pytest.approx(-1000, abs=30)
    middle = ct[:, 40:55, 47:49]  # spine and heart
    assert 0 < middle.mean() < 400


def test_bright_is_dense_at_every_hospital(segmentation: Cohort) -> None:
    root, _ = segmentation
    for file in files(root):
        image = read_frame(file).image.pixels[0]
        mask = np.asarray(Picture.open(file.parents[1] / "masks" / f"{file.stem}.png"))
        assert mask.shape == image.shape
        assert set(np.unique(mask)) == {0, 1}
        assert 0.1 < mask.mean() < 0.4
        rows = slice(*np.flatnonzero(mask.any(axis=1))[[0, -1]])
        beside = image[rows, image.shape[1] // 2 - 3 : image.shape[1] // 2 + 3]
        assert image[mask == 1].mean() < beside.mean()


def test_the_data_room_reads_all_of_a_classification_cohort(classification: Cohort) -> None:
    root, facts = classification
    dataset = read(root, "classification.toml")
    assert dataset.left_out == ()
    assert len(dataset.samples) == facts.images
    assert dataset.samples[0].load().pixels.shape == (1, 96, 96)
    sites = partition(dataset.samples, "folders", 4, 0)
    assert list(sites) == HOSPITALS
    for hospital in facts.hospitals:
        ill = {s.patient for s in sites[hospital.name] if s.label == (1,)}
        assert len(ill) == hospital.diseased


def test_the_data_room_reads_all_of_a_segmentation_cohort(segmentation: Cohort) -> None:
    root, facts = segmentation
    dataset = read(root, "segmentation.toml")
    assert dataset.left_out == ()
    assert len(dataset.samples) == facts.images
    for sample in dataset.samples[:: len(dataset.samples) // 8]:
        assert sample.mask is not None
        assert sample.mask().shape == sample.load().pixels.shape[1:]


def test_disease_is_what_differs() -> None:
    """The same patient with and without it: denser, in the lungs and nowhere else."""
    places = np.linspace(-1, 1, 96)
    view = View(places, places)
    for seed in range(10):
        ill, well = (draw_anatomy(np.random.default_rng(seed), flag) for flag in (True, False))
        (with_it, lungs), (without, _) = density(ill, view), density(well, view)
        more = with_it - without
        assert more.min() > -1e-9
        assert more.max() > 0.03
        assert more[lungs < 0.01].max() < 0.02


def test_images_of_a_patient_are_alike_and_not_the_same(classification: Cohort) -> None:
    root = classification[0] / "hospital-3" / "images"
    pair = next(
        [read_frame(f).image.pixels[0] for f in (first, second)]
        for first in sorted(root.glob("*-1.dcm"))
        if (second := first.with_name(first.name.replace("-1.dcm", "-2.dcm"))).is_file()
    )
    assert 0.6 < np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1] < 0.9999


def test_more_than_four_hospitals_use_the_scanners_again(tmp_path: Path) -> None:
    facts = write_cohort(tmp_path / "c", 0, "classification", patients=2, hospitals=5)
    assert facts.hospitals[4].scanner == facts.hospitals[0].scanner
    assert all(h.diseased == 1 for h in facts.hospitals)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("mine")
    with pytest.raises(OutputError, match="must be empty"):
        write_cohort(tmp_path, 0, "classification", patients=2)
    with pytest.raises(OutputError, match="must be writable"):
        write_cohort(tmp_path / "there.txt" / "c", 0, "classification", patients=2)
    for wrong in ({"patients": 1}, {"hospitals": 0}):
        with pytest.raises(DataError, match="needs at least"):
            write_cohort(tmp_path / "new", 0, "classification", **wrong)
    with pytest.raises(DataError, match="seed"):
        write_cohort(tmp_path / "new", -1, "classification")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["classification", "segmentation"])
def test_demo_plans_load(name: str) -> None:
    plan = load_plan(STUDIES / f"{name}.toml")
    assert plan.study.name == f"demo-{name}"
    assert plan.participation.sites == 4
    assert plan.preprocessing.size == (64, 64)
