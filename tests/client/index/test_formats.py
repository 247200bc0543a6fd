"""What is known of files of every format, against the arrays that they were made from."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from fedward_client.data.quiet import quiet
from fedward_client.index.extract import Extractor

SECRET = b"k" * 32


def facts_of(path: Path, format: str = "dicom"):
    return Extractor(path.parent, format, SECRET)(path)


def test_nifti(tmp_path):
    volume = np.arange(-60, 60, dtype=np.int16).reshape(4, 5, 6)
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "v.nii.gz")
    facts = facts_of(tmp_path / "v.nii.gz", "nifti")
    assert (facts.format, facts.reason) == ("nifti", "")
    assert (facts.rows, facts.columns, facts.frames, facts.bits) == (4, 5, 6, 16)
    assert facts.spacing == (0.7, 0.8, 2.5)
    assert (facts.low, facts.high) == (-60.0, 59.0)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16"])
def test_pictures(tmp_path, mode):
    grey = (np.arange(120, dtype=np.uint8) * 2).reshape(10, 12)
    image = Pillow.fromarray(grey.astype(np.uint16) * 256 if mode == "I;16" else grey)
    image.convert(mode).save(tmp_path / "a.png") if mode != "I;16" else image.save(
        tmp_path / "a.png"
    )
    facts = facts_of(tmp_path / "a.png", "folders")
    top = 238 * (256 if mode == "I;16" else 1)
    assert (facts.format, facts.reason) == ("picture", "")
    assert (facts.rows, facts.columns, facts.frames) == (10, 12, 1)
    assert facts.bits == (16 if mode == "I;16" else 8)
    assert (facts.low, facts.high) == (0.0, top)


def test_archives_and_tables(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-20])
    (tmp_path / "labels.csv").write_text("file,label\n")
    assert (facts_of(tmp_path / "a.npz", "npz").format, facts_of(tmp_path / "a.npz").reason) == (
        "npz",
        "",
    )
    assert facts_of(tmp_path / "cut.npz", "npz").reason == "not readable"
    assert facts_of(tmp_path / "labels.csv").format == "table"


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.png", "a.tif", "a.npz", "a.dcm"])
def test_broken_ones(tmp_path, name):
    for content in (b"", b"\0" * 500, b"\xff" * 500):
        (tmp_path / name).write_bytes(content)
        facts = facts_of(tmp_path / name, "nifti")
        assert facts.reason in {"not readable", "other format"}
        assert len(facts.digest) == 64


@pytest.mark.parametrize(
    ("name", "object_type", "syntax", "frames"),
    [
        ("CT_small.dcm", "CT Image Storage", "Explicit VR Little Endian", 1),
        ("MR_small_RLE.dcm", "MR Image Storage", "RLE Lossless", 1),
        ("JPEG2000.dcm", "Secondary Capture Image Storage", "JPEG 2000 Image Compression", 1),
        ("rtdose.dcm", "RT Dose Storage", "Implicit VR Little Endian", 15),
        ("emri_small.dcm", "Enhanced MR Image Storage", "Explicit VR Little Endian", 10),
    ],
)
def test_dicom(name, object_type, syntax, frames):
    path = Path(get_testdata_file(name))
    facts, header = facts_of(path), pydicom.dcmread(path, stop_before_pixels=True)
    assert facts.reason == ""
    assert (facts.object_type, facts.frames) == (object_type, frames)
    assert facts.syntax.startswith(syntax)
    assert (facts.rows, facts.columns, facts.bits) == (
        header.Rows,
        header.Columns,
        header.BitsStored,
    )
    assert facts.modality == header.Modality
    assert facts.low < facts.high


def test_the_spacing_is_that_of_the_first_frame_and_the_range_that_of_all(tmp_path, dx):
    groups = []
    for spacing, slope in ((0.25, 2), (0.75, 3)):
        group, measures, values = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing = [spacing, spacing]
        values.RescaleIntercept, values.RescaleSlope, values.RescaleType = -10, slope, "HU"
        group.PixelMeasuresSequence = [measures]
        group.PixelValueTransformationSequence = [values]
        groups.append(group)
    pixels = np.stack([np.arange(16).reshape(4, 4), np.arange(16).reshape(4, 4) * 10])
    facts = facts_of(dx(tmp_path / "a.dcm", pixels, PerFrameFunctionalGroupsSequence=groups))
    assert (facts.frames, facts.spacing) == (2, (0.25, 0.25))
    assert (facts.low, facts.high) == (-10.0, 150 * 3 - 10.0)


def test_the_same_pixels_have_one_hash_whatever_their_syntax():
    names = ("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm")
    found = [facts_of(Path(get_testdata_file(name))) for name in names]
    assert len({facts.pixels for facts in found}) == 1
    assert len({facts.digest for facts in found}) == len(names)


def test_words_that_are_no_codes_are_not_kept(tmp_path, dx):
    with quiet():
        path = dx(
            tmp_path / "a.dcm",
            np.ones((4, 4)),
            Manufacturer="DOE^JANE",
            BodyPartExamined="DOE^JANE",
            ImageType=["ORIGINAL", "PRIMARY", "1.2.826.0.99.4711", "19550712"] + ["AXIAL"] * 40,
        )
    facts = facts_of(path)
    assert (facts.manufacturer, facts.body_part) == ("other", "other")
    assert facts.image_type.startswith("ORIGINAL\\PRIMARY\\other\\other\\AXIAL")
    assert len(facts.image_type) < 120


def test_names_in_coded_fields_are_not_kept(tmp_path, dx):
    tags = {"PatientName": "Meyer^Anna^^Mr", "PatientID": "Q71"}
    planted = {
        "BodyPartExamined": ["MEYER ANNA", "SCHMIDT", "HAND Q71"],
        "Manufacturer": ["Meyer Anna", "room of ANNA", "unit-Q71", "annameyers", "MEYER"],
        "Modality": ["MEYER", "ANNA"],
        "BurnedInAnnotation": ["MEYER"],
        "PhotometricInterpretation": ["MEYER"],
    }
    columns = {
        "BodyPartExamined": "body_part",
        "Manufacturer": "manufacturer",
        "Modality": "modality",
        "BurnedInAnnotation": "burned_in",
        "PhotometricInterpretation": "photometric",
    }
    with quiet():
        for field, values in planted.items():
            for value in values:
                path = dx(tmp_path / "a.dcm", np.ones((4, 4)), **tags, **{field: value})
                assert getattr(facts_of(path), columns[field]) == "other", value
        image_type = ["DERIVED", "SECONDARY", "MEYER 1203", "Q71"]
        facts = facts_of(dx(tmp_path / "a.dcm", np.ones((4, 4)), **tags, ImageType=image_type))
    assert facts.image_type == "DERIVED\\SECONDARY\\other\\other"


@pytest.mark.parametrize(
    ("field", "column", "value"),
    [
        ("BodyPartExamined", "body_part", "WHOLE BODY"),
        ("BodyPartExamined", "body_part", "Chest"),
        ("Manufacturer", "manufacturer", "GE MEDICAL SYSTEMS"),
        ("Modality", "modality", "MR"),
        ("Manufacturer", "manufacturer", "Philips, Best 2019"),
    ],
)
def test_words_of_the_standard_and_of_makers_are_kept(tmp_path, dx, field, column, value):
    for name in ("Meyer^Anna^^Mr", "", "A^O"):
        with quiet():
            path = dx(tmp_path / "a.dcm", np.ones((4, 4)), PatientName=name, **{field: value})
        assert getattr(facts_of(path), column) == value


def test_a_file_of_many_frames_is_as_large_as_one_of_them(tmp_path, monkeypatch, dx):
    from fedward_client.index import extract

    monkeypatch.setattr(extract, "LARGEST", 8 * 64 * 2)
    path = dx(tmp_path / "tiles.dcm", np.arange(50 * 64).reshape(50, 8, 8) % 999)
    facts = extract.Extractor(tmp_path, "dicom", b"k" * 32)(path)
    assert (facts.reason, facts.frames, facts.high) == ("", 50, 998)


@pytest.mark.parametrize(
    ("format", "own", "reason"),
    [
        ("dicom", "a.dcm", "not DICOM"),
        ("nifti", "a.nii", "other format"),
        ("folders", "a.png", "other format"),
    ],
)
def test_files_of_another_format_are_no_images_of_the_dataset(tmp_path, dx, format, own, reason):
    dx(tmp_path / "a.dcm", np.arange(64).reshape(8, 8))
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii")
    Pillow.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "a.png")
    extract = Extractor(tmp_path, format, b"k" * 32)
    found = {path.name: extract(path).reason for path in tmp_path.iterdir()}
    assert found == {name: "" if name == own else reason for name in found}


def test_pictures_in_a_tree_of_dicom_are_masks_in_their_folder_alone(tmp_path, dx):
    (tmp_path / "masks").mkdir()
    for place in ("masks/a.png", "b.png"):
        Pillow.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / place)
    extract = Extractor(tmp_path, "dicom", b"k" * 32)
    assert extract(tmp_path / "masks" / "a.png").marked == '{"1": 8}'
    assert extract(tmp_path / "b.png").reason == "not DICOM"
