"""Volumes of real scanners, against SimpleITK: series as they came, and NIfTI made into CT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file

from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.quiet import quiet
from fedward_client.data.sample import Dataset, Image

SERIES = Path(get_testdata_file("DICOMDIR")).parent  # real ones, their pixels thinned out


def volumes(root: Path, make_plan: Any, patient: str) -> Dataset:
    (root / "labels.csv").write_text(f"PatientID,label\n{patient},sick\n")
    task = make_plan(size=(8, 8, 8)).task
    return read_dataset(DatasetSpec(root, "dicom"), task, empty=True)


def others(files: list[str]) -> sitk.Image:
    """What SimpleITK reads, in our order of axes: to the right, the front and the top."""
    image = sitk.ReadImage(files if len(files) > 1 else files[0])
    return sitk.DICOMOrient(image, "RAS")


def assert_same(image: Image, other: sitk.Image) -> None:
    np.testing.assert_allclose(image.pixels[0], sitk.GetArrayFromImage(other).transpose(2, 1, 0))
    assert image.spacing == pytest.approx(other.GetSpacing(), rel=1e-3)


def in_order(folder: Path) -> list[str]:
    return list(sitk.ImageSeriesReader().GetGDCMSeriesFileNames(str(folder)))


def copy(names: str, to: Path) -> str:
    """A series under names that tell no order; returns whose it is."""
    to.mkdir()
    for k, path in enumerate(sorted((SERIES / names).iterdir(), reverse=True)):
        shutil.copy(path, to / f"{k}.dcm")
    return str(pydicom.dcmread(to / "0.dcm").PatientID)


def test_a_ct_series_of_a_scanner(tmp_path, make_plan):
    patient = copy("98892001/CT5N", tmp_path / "s")
    (sample,) = volumes(tmp_path, make_plan, patient).samples
    assert sample.columns["slice_distance"] == "2.5"
    image = sample.load()
    assert image.pixels.shape == (1, 16, 16, 5)
    assert_same(image, others(in_order(tmp_path / "s")))


def test_a_ct_series_that_lacks_slices(tmp_path, make_plan):
    patient = copy("77654033/CT2", tmp_path / "s")
    found = volumes(tmp_path, make_plan, patient)
    assert not found.samples
    assert [item.reason for item in found.left_out] == ["slices missing"]


def test_a_multi_frame_ct_of_a_scanner(tmp_path, make_plan):
    path = shutil.copy(get_testdata_file("eCT_Supplemental.dcm"), tmp_path / "e.dcm")
    patient = str(pydicom.dcmread(path, stop_before_pixels=True).PatientID)
    (sample,) = volumes(tmp_path, make_plan, patient).samples
    assert sample.columns["slice_distance"] == "10"
    assert_same(sample.load(), others([str(path)]))


@pytest.mark.parametrize("placed", [True, False])
def test_a_multi_frame_mr_of_a_scanner(tmp_path, make_plan, make_group, placed):
    """Its functional groups were taken out; ten frames of one head, 2.2 mm apart."""
    file = pydicom.dcmread(get_testdata_file("emri_small.dcm"))
    file.PatientID = "P1"
    if placed:
        file.SharedFunctionalGroupsSequence = [
            make_group(
                PixelMeasuresSequence={"PixelSpacing": [1.5, 1.25], "SliceThickness": 2.2},
                PlaneOrientationSequence={"ImageOrientationPatient": [0.8, 0.6, 0, 0, 0, -1]},
            )
        ]
        file.PerFrameFunctionalGroupsSequence = [
            make_group(
                PlanePositionSequence={
                    "ImagePositionPatient": [-20 - 0.6 * 2.2 * k, 5 + 0.8 * 2.2 * k, 30]
                }
            )
            for k in range(file.NumberOfFrames)
        ]
    file.save_as(tmp_path / "e.dcm")
    found = volumes(tmp_path, make_plan, "P1")
    if not placed:
        assert [item.reason for item in found.left_out] == ["shape does not fit the task"]
        return
    (sample,) = found.samples
    assert sample.columns["slice_distance"] == "2.2"
    assert_same(sample.load(), others([str(tmp_path / "e.dcm")]))


def as_ct(volume: nib.Nifti1Image, folder: Path, make_dicom: Any) -> None:
    """A NIfTI volume as the CT series of a scanner: columns to the left, rows to the back."""
    turned = nib.as_closest_canonical(volume)
    values = np.asarray(turned.dataobj).astype(np.int16)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ turned.affine  # to left, posterior, superior
    units = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    mm = np.linalg.norm(affine[:3, :3], axis=0)
    last = np.array(values.shape[:2]) - 1
    for k in np.random.default_rng(1).permutation(values.shape[2]):
        corner = affine @ [last[0], last[1], k, 1]  # the most right and most anterior comes first
        make_dicom(
            folder / f"{(7 * k) % 101:03d}-{k}.dcm",
            np.ascontiguousarray(values[::-1, ::-1, k].T),
            Modality="CT",
            PatientID="P1",
            SOPClassUID=pydicom.uid.CTImageStorage,
            SeriesInstanceUID="1.2.7",
            StudyInstanceUID="1.2.8",
            FrameOfReferenceUID="1.2.9",
            RescaleSlope=1,
            RescaleIntercept=-1024,
            PixelSpacing=[float(mm[1]), float(mm[0])],
            ImageOrientationPatient=[round(float(v), 8) for v in [*-units[:, 0], *-units[:, 1]]],
            ImagePositionPatient=[round(float(v), 6) for v in corner[:3]],
        )


def test_real_volumes_made_into_ct_series(tmp_path, real_data, make_plan, make_dicom):
    paths = sorted((real_data / "hippocampus" / "images").rglob("*.nii*"))[:3]
    for number, path in enumerate(paths):
        root = tmp_path / str(number)
        volume = nib.load(path)
        with quiet():
            as_ct(volume, root / "s", make_dicom)
        (sample,) = volumes(root, make_plan, "P1").samples
        image = sample.load()
        expected = np.asarray(nib.as_closest_canonical(volume).dataobj).astype(np.int16) - 1024.0
        np.testing.assert_allclose(image.pixels[0], expected)
        assert_same(image, others(in_order(root / "s")))
