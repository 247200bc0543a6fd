"""Whatever the format, an opened cohort reads what the reader would, and its file names nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow
from pydicom.sr.codedict import codes

from fedward.errors import DataError
from fedward_client.cohort.freeze import make_cohort, save, usable
from fedward_client.cohort.open import open_cohort
from fedward_client.cohort.report import make_report
from fedward_client.data.channels import names_of
from fedward_client.data.prepare import prepare
from fedward_client.secret import site_secret

SITE = """
version = 1
[site]
name = "st-mary"
[datasets.one]
root = "data-doe"
format = "{format}"
task = "{task}"
dimensions = {dimensions}
classes = {classes}
"""
RNG = np.random.default_rng(3)


def grey(*shape: int) -> np.ndarray:
    return RNG.integers(0, 255, shape).astype(np.uint8)


def npz(root: Path) -> None:
    root.mkdir()
    np.savez(
        root / "DOE.npz",
        train_images=grey(6, 9, 8),
        train_labels=np.arange(6)[:, None] % 2,
        test_images=grey(2, 9, 8),
        test_labels=np.array([[0], [1]]),
    )


def folders(root: Path) -> None:
    for kind in ("well", "sick"):
        (root / kind).mkdir(parents=True)
        for k in range(3):
            Pillow.fromarray(grey(9, 8)).save(root / kind / f"DOE-{k}.png")


def masked_folders(root: Path) -> None:
    for kind, values in (("images", 255), ("masks", 2)):
        (root / kind).mkdir(parents=True)
        for k in range(3):
            Pillow.fromarray((grey(9, 8) % values).astype(np.uint8)).save(root / kind / f"D{k}.png")


def nifti(root: Path) -> None:
    for kind, values in (("images", 255), ("labels", 2)):
        (root / kind).mkdir(parents=True)
        for k in range(3):
            volume = (grey(6, 5, 4) % values).astype(np.int16)
            nib.save(nib.Nifti1Image(volume, np.diag([-1, 2, 3, 1])), root / kind / f"D{k}.nii.gz")


def ct(root: Path, patient: str, series: str, take: int) -> list[Any]:
    """Four slices; another `take` lies in the same places."""
    made = []
    for k in range(4):
        file = pydicom.Dataset()
        file.SOPClassUID, file.SOPInstanceUID = pydicom.uid.CTImageStorage, hd.UID()
        file.PatientID, file.PatientName, file.PatientBirthDate = patient, "DOE^JANE", "19550712"
        file.PatientSex, file.StudyID, file.AccessionNumber = "", "1", "ACC99123"
        file.StudyInstanceUID, file.SeriesInstanceUID = "1.2.826.0.99.4711", series
        file.FrameOfReferenceUID, file.Modality = "1.2.826.0.99.4711.5", "CT"
        file.StudyDate, file.StudyTime, file.ReferringPhysicianName = "19550712", "101010", ""
        file.Rows, file.Columns, file.SamplesPerPixel = 7, 6, 1
        file.PhotometricInterpretation = "MONOCHROME2"
        file.BitsAllocated = file.BitsStored = 16
        file.HighBit, file.PixelRepresentation = 15, 1
        file.PixelSpacing, file.SliceThickness = [0.7, 0.9], 2.5
        file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        file.ImagePositionPatient = [-20, 15, 40 + 2.5 * k]
        file.AcquisitionNumber, file.InstanceNumber = take, 4 * take + k
        file.PixelData = RNG.integers(0, 900, (7, 6)).astype(np.int16).tobytes()
        file.file_meta = pydicom.dataset.FileMetaDataset()
        file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        path = root / patient / f"{series[-1]}-{take}-{k}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        file.save_as(path, enforce_file_format=True)
        made.append(pydicom.dcmread(path))
    return made


def segmentation(path: Path, images: list[Any]) -> None:
    """A DICOM-SEG of one segment, another one in each slice."""
    masks = np.zeros((4, 7, 6), np.uint8)
    for k in range(4):
        masks[k, k : k + 3, 1:5] = 1
    tool = hd.AlgorithmIdentificationSequence("t", codes.DCM.ArtificialIntelligence, "1")
    described = hd.seg.SegmentDescription(
        1,
        "lung",
        codes.SCT.Tissue,
        codes.SCT.Tissue,
        hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        tool,
    )
    hd.seg.Segmentation(
        images,
        masks,
        hd.seg.SegmentationTypeValues.BINARY,
        [described],
        hd.UID(),
        2,
        hd.UID(),
        1,
        "m",
        "m",
        "1",
        "1",
    ).save_as(path)


def scans(root: Path) -> None:
    for k in range(2):
        images = ct(root, f"MRN4711{k}", f"1.2.826.0.99.4711.9.{k}", 1)
        segmentation(root / f"MRN4711{k}" / "seg.dcm", images)


def nifti_of(root: Path, name: str, image: Any, depth: int) -> None:
    """A NIfTI label map in the place of some slices of `ct`, of which `image` is the first."""
    x, y, z = (float(v) for v in image.ImagePositionPatient)
    affine = np.array([[-0.9, 0, 0, -x], [0, -0.7, 0, -y], [0, 0, 2.5, z], [0, 0, 0, 1]])
    values = np.zeros((6, 7, depth), np.uint8)
    values[1:3, 2:5] = 1
    (root / "masks").mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), root / "masks" / f"{name}.nii.gz")


def scans_with_nifti(root: Path) -> None:
    for k in range(2):
        images = ct(root, f"MRN4711{k}", f"1.2.826.0.99.4711.9.{k}", 1)
        nifti_of(root, images[0].SeriesInstanceUID, images[0], 4)


def slices_with_nifti(root: Path) -> None:
    for k in range(2):
        for image in ct(root, f"MRN4711{k}", f"1.2.826.0.99.4711.9.{k}", 1):
            nifti_of(root, image.SOPInstanceUID, image, 1)


def _contours(images: list[Any]) -> dict[str, list[Any]]:
    corners = np.array([[-19.5, 15.5], [-16.5, 15.5], [-16.5, 18.5], [-19.5, 18.5]])
    return {
        "Lung_L": [
            (np.column_stack([corners, np.full(4, 40 + 2.5 * k)]), image)
            for k, image in enumerate(images)
        ],
        "skin": [np.column_stack([corners + 0.6, np.full(4, 40)])],
    }


def contoured(root: Path, make_structures: Any) -> None:
    for k in range(2):
        images = ct(root, f"MRN4711{k}", f"1.2.826.0.99.4711.9.{k}", 1)
        make_structures(root / f"MRN4711{k}" / "rt.dcm", images, _contours(images))


def other_grid(root: Path) -> None:
    """A label map of voxels of another size, of which the site says what they mean."""
    for k in range(2):
        image = ct(root, f"MRN4711{k}", f"1.2.826.0.99.4711.9.{k}", 1)[0]
        labels = np.full((3, 3, 4), k + 1, np.uint8)
        tool = hd.AlgorithmIdentificationSequence("t", codes.DCM.ArtificialIntelligence, "1")
        described = [
            hd.seg.SegmentDescription(
                number,
                name,
                codes.SCT.Tissue,
                codes.SCT.Tissue,
                hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                tool,
            )
            for number, name in ((1, "a"), (2, "Lung_L"))
        ]
        hd.seg.Segmentation(
            [image],
            labels,
            hd.seg.SegmentationTypeValues.LABELMAP,
            described,
            hd.UID(),
            2,
            hd.UID(),
            1,
            "m",
            "m",
            "1",
            "1",
            pixel_measures=hd.PixelMeasuresSequence((0.8, 0.8), 2, spacing_between_slices=2),
            plane_positions=[
                hd.PlanePositionSequence("PATIENT", [-19, 16, 40.3 + 2 * z]) for z in range(3)
            ],
            plane_orientation=hd.PlaneOrientationSequence("PATIENT", [1, 0, 0, 0, 1, 0]),
        ).save_as(root / f"MRN4711{k}" / "seg.dcm")


CASES = {
    "npz": (npz, "npz", "classification", 2, 8, 2),
    "folders": (folders, "folders", "classification", 2, 6, 6),
    "masked folders": (masked_folders, "folders", "segmentation", 2, 3, 6),
    "nifti": (nifti, "nifti", "segmentation", 3, 3, 6),
    "dicom volumes": (scans, "dicom", "segmentation", 3, 2, 10),
    "dicom slices": (scans, "dicom", "segmentation", 2, 8, 10),
    "NIfTI masks of volumes": (scans_with_nifti, "dicom", "segmentation", 3, 2, 10),
    "NIfTI masks of slices": (slices_with_nifti, "dicom", "segmentation", 2, 8, 16),
    "contoured volumes": (contoured, "dicom", "segmentation", 3, 2, 10),
    "contoured slices": (contoured, "dicom", "segmentation", 2, 8, 10),
    "another grid": (other_grid, "dicom", "segmentation", 3, 2, 10),
}


def write_site(folder: Path, format: str, task: str, dimensions: int) -> Path:
    classes = '["lung"]' if task == "segmentation" else '["well", "sick"]'
    path = folder / "site.toml"
    text = SITE.format(format=format, task=task, dimensions=dimensions, classes=classes)
    if task == "segmentation":
        text += '[datasets.one.masks]\nsegments = { "lung_l" = "lung", "1" = "lung" }\n'
    path.write_text(text)
    return path


def check_balance(report: Any, found: Any, case: str) -> None:
    """The report's classes are those that the masks hold when they are read."""
    masks = [sample.mask() for sample in found.samples]
    assert report.images_by_class == {"lung": len(masks)}
    assert report.patients_by_class == {"lung": len({s.patient for s in found.samples})}
    if case.startswith("contoured"):
        assert report.pixels_by_class == {}
    elif case == "another grid":  # as they are stored: of voxels of another size
        assert report.pixels_by_class == {"lung": 2 * 3 * 3 * 4}
    else:
        assert report.pixels_by_class == {"lung": sum(int((m > 0).sum()) for m in masks)}


@pytest.mark.integration
@pytest.mark.parametrize("case", CASES)
def test_an_opened_cohort_reads_what_the_reader_does(tmp_path, working, make_structures, case):
    write, format, task, dimensions, count, files = CASES[case]
    write(tmp_path / "data-doe", *([make_structures] if write is contoured else []))
    site = write_site(tmp_path, format, task, dimensions)
    with working(site, "one") as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("one", work.dataset, found, work.index, work.extract)
        path = save(cohort, work.site.site.state)
        opened = open_cohort(work.site, "one", secret=site_secret(work.site.site.state))
        if task == "segmentation":
            check_balance(make_report("one", work.dataset, work.index, work.extract), found, case)
    assert len(opened.dataset.samples) == len(found.samples) == count
    assert len(cohort.files) == (1 if format == "npz" else files)
    for one, other in zip(opened.dataset.samples, found.samples, strict=True):
        assert (one.label, one.split) == (other.label, other.split)
        image, wanted = one.load(), other.load()
        np.testing.assert_array_equal(image.pixels, wanted.pixels)
        assert (image.spacing, image.window) == (wanted.spacing, wanted.window)
        if task == "segmentation":
            np.testing.assert_array_equal(one.mask(), other.mask())
            assert one.mask().any()
    groups = {}
    for one, other in zip(opened.dataset.samples, found.samples, strict=True):
        assert groups.setdefault(one.patient, other.patient) == other.patient
    identities = [one.load.identity() for one in opened.dataset.samples]
    assert len(set(identities)) == count
    if case in ("dicom slices", "contoured slices"):
        series = {id(one.mask.load.series) for one in opened.dataset.samples}
        assert len(series) == 2  # shared, or memory would grow with the square of the slices
    text = path.read_text()
    for planted in ("DOE", "MRN4711", "1.2.826.0.99", "19550712", "ACC99123", "data-doe"):
        assert planted not in text


@pytest.mark.integration
def test_a_mask_of_another_time_is_never_taken(tmp_path, working):
    # Two times in one series, in the same places; the segmentation names slices of the first.
    root = tmp_path / "data-doe"
    first = ct(root, "MRN47110", "1.2.826.0.99.4711.9.0", 1)
    ct(root, "MRN47110", "1.2.826.0.99.4711.9.0", 2)
    segmentation(root / "seg.dcm", first)
    site = write_site(tmp_path, "dicom", "segmentation", 3)
    with working(site, "one") as work:
        found = usable(work.dataset, work.index, work.extract)
        save(
            make_cohort("one", work.dataset, found, work.index, work.extract), work.site.site.state
        )
        opened = open_cohort(work.site, "one", secret=site_secret(work.site.site.state))
    outcomes = []
    for sample in opened.dataset.samples:
        try:
            outcomes.append(int(sample.mask().sum()))
        except DataError as error:
            outcomes.append(error.rule)
    assert sorted(map(str, outcomes)) == ["48", "position of mask differs"]


@pytest.mark.integration
@pytest.mark.parametrize(("dimensions", "left"), [(2, 7), (3, 1)])
def test_a_slice_that_cannot_be_read_costs_no_other_slice_its_mask(
    tmp_path, working, dimensions, left
):
    root = tmp_path / "data-doe"
    scans(root)
    cut = next(iter(sorted(root.glob("MRN47110/*-1-1.dcm"))))
    cut.write_bytes(cut.read_bytes()[:-30])
    with working(write_site(tmp_path, "dicom", "segmentation", dimensions), "one") as work:
        found = usable(work.dataset, work.index, work.extract)
        report = make_report("one", work.dataset, work.index, work.extract)
        make_cohort("one", work.dataset, found, work.index, work.extract)
    assert len(found.samples) == left
    volume = {"slices missing": 1} if dimensions == 3 else {}
    assert report.left_out == {"not readable": 1, **volume}
    assert all(sample.mask().any() for sample in found.samples)


@pytest.mark.integration
def test_a_mask_that_cannot_be_read_is_told_for_each_of_its_images(tmp_path, working):
    scans(tmp_path / "data-doe")
    cut = tmp_path / "data-doe" / "MRN47110" / "seg.dcm"
    cut.write_bytes(cut.read_bytes()[:-16])
    with working(write_site(tmp_path, "dicom", "segmentation", 2), "one") as work:
        report = make_report("one", work.dataset, work.index, work.extract)
    assert report.samples == 4
    assert report.left_out == {"not readable": 1, "no mask": 4}


def half_masks(root: Path) -> None:
    """Masks of half the size of their images."""
    for kind, shape in (("images", (8, 12)), ("masks", (4, 6))):
        (root / kind).mkdir(parents=True)
        for k in range(3):
            values = grey(*shape) % (255 if kind == "images" else 2)
            Pillow.fromarray(values.astype(np.uint8)).save(root / kind / f"D{k}.png")


@pytest.mark.integration
def test_a_cohort_keeps_whether_masks_are_resized(tmp_path, working, make_plan):
    half_masks(tmp_path / "data-doe")
    site = write_site(tmp_path, "folders", "segmentation", 2)
    plain = site.read_text()
    site.write_text(plain.replace("[datasets.one.masks]", "[datasets.one.masks]\nresize = true"))
    with working(site, "one") as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("one", work.dataset, found, work.index, work.extract)
        text = save(cohort, work.site.site.state).read_text()
    site.write_text(plain)
    with working(site, "one") as work:
        before = usable(work.dataset, work.index, work.extract)
        other = make_cohort("one", work.dataset, before, work.index, work.extract)
        secret = site_secret(work.site.site.state)
        opened = open_cohort(work.site, "one", secret=secret).dataset
    assert other.sha256 != cohort.sha256 and "data-doe" not in text
    plan = make_plan(
        task={"kind": "segmentation", "classes": ["lung"]},
        model={"name": "unet", "channels": [4, 8]},
        preprocessing={"size": [8, 12]},
        training={"loss": "dice_ce"},
        metrics={"report": ["dice"], "primary": "dice"},
        split={"given": False, "validation": 0.0, "test": 0.0},
    )
    site_ = prepare("north", opened.samples, plan)
    wanted = [one.mask().repeat(2, 0).repeat(2, 1) for one in before.samples]
    assert sorted(m.tobytes() for m in wanted) == sorted(m.tobytes() for m in site_.targets)
    with pytest.raises(DataError, match="image"):
        prepare("north", before.samples, plan)


@pytest.mark.integration
def test_a_cohort_keeps_what_segments_meant_when_it_was_frozen(tmp_path, working, make_structures):
    contoured(tmp_path / "data-doe", make_structures)
    site = write_site(tmp_path, "dicom", "segmentation", 3)
    with working(site, "one") as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("one", work.dataset, found, work.index, work.extract)
        save(cohort, work.site.site.state)
    assert {(s.kind, s.labels) for one in cohort.series for s in one.segmentations} == {
        ("contours", ((1, 1),))
    }
    before = found.samples[0].mask()
    site.write_text(site.read_text().replace('"lung_l"', '"skin"').replace('"1"', '"2"'))
    with working(site, "one") as work:
        now = usable(work.dataset, work.index, work.extract).samples[0].mask()
        secret = site_secret(work.site.site.state)
        opened = open_cohort(work.site, "one", secret=secret).dataset.samples[0].mask()
    np.testing.assert_array_equal(opened, before)
    assert not np.array_equal(now, before)


@pytest.mark.integration
def test_contours_through_the_commands(tmp_path, make_structures, commands):
    contoured(tmp_path / "data-doe", make_structures)
    site = write_site(tmp_path, "dicom", "segmentation", 3)
    answers = {}
    for name, *more in (("freeze",), ("report",), ("preview", "--out", str(tmp_path / "p.html"))):
        done = commands(
            "fedward_client.cli",
            "data",
            name,
            "one",
            "--config",
            site,
            "--json",
            *more,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        answers[name] = json.loads(done.stdout)
    assert (answers["freeze"]["images"], answers["freeze"]["files"]) == (2, 10)
    assert answers["report"]["samples"] == answers["preview"]["shown"] == 2
    assert answers["report"]["left_out"] == {}
    assert not any(word in json.dumps(answers) for word in ("DOE", "MRN4711", "1.2.826.0.99"))


@pytest.mark.integration
def test_a_cohort_keeps_which_channels_an_image_has(tmp_path, working):
    root = tmp_path / "data-doe"
    masked_folders(root)
    for k in range(3):
        Pillow.fromarray(grey(9, 8, 3)).save(root / "images" / f"D{k}.png")
    (root / "patients.csv").write_text("image,patient,gone\nD0,DOE,1\nD1,b,0\nD2,c,\n")
    site = write_site(tmp_path, "folders", "segmentation", 2)
    with site.open("a") as file:
        file.write('[datasets.one.channels.t1]\nplane = 2\nmissing = "gone"\n')
        file.write("[datasets.one.channels.flair]\nplane = 0\n")
    with working(site, "one") as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("one", work.dataset, found, work.index, work.extract)
        path = save(cohort, work.site.site.state)
        opened = open_cohort(work.site, "one", secret=site_secret(work.site.site.state))
    assert (
        sorted(names_of(s) for s in opened.dataset.samples) == [("flair",)] + [("t1", "flair")] * 2
    )
    for one, other in zip(opened.dataset.samples, found.samples, strict=True):
        image, wanted = one.load(), other.load()
        assert image.names == wanted.names == names_of(one)
        np.testing.assert_array_equal(image.pixels, wanted.pixels)
    assert len({one.load.identity() for one in opened.dataset.samples}) == 3
    assert "DOE" not in path.read_text()


@pytest.mark.integration
def test_a_cohort_keeps_the_files_of_each_channel(tmp_path, working):
    root = tmp_path / "data-doe"
    nifti(root)
    for k in range(2):  # the third lacks it
        volume = nib.Nifti1Image(grey(4, 4, 4).astype(np.int16), np.diag([-2, 3, 4, 1]))
        nib.save(volume, root / "images" / f"D{k}_pet.nii.gz")
    for k in range(3):
        (root / "images" / f"D{k}.nii.gz").rename(root / "images" / f"D{k}_ct.nii.gz")
    site = write_site(tmp_path, "nifti", "segmentation", 3)
    with site.open("a") as file:
        for name in ("ct", "pet"):
            file.write(f'[datasets.one.channels.{name}]\nsuffix = "_{name}"\n')
    with working(site, "one") as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("one", work.dataset, found, work.index, work.extract)
        save(cohort, work.site.site.state)
        opened = open_cohort(work.site, "one", secret=site_secret(work.site.site.state))
        (root / "images" / "D1_pet.nii.gz").write_bytes(b"changed")
        with pytest.raises(DataError, match="1 changed"):
            open_cohort(work.site, "one", secret=site_secret(work.site.site.state))
    names = [names_of(sample) for sample in opened.dataset.samples]
    assert names == [("ct", "pet"), ("ct", "pet"), ("ct",)] and len(cohort.files) == 8
    for one, other in zip(opened.dataset.samples[::2], found.samples[::2], strict=True):
        np.testing.assert_array_equal(one.load().pixels, other.load().pixels)
