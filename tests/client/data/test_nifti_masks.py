"""NIfTI masks of DICOM images lie where their affine says, or are refused.

Masks are written by SimpleITK, which reads the images without any of the code that is tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from fedward.errors import DataError
from fedward_client.data.dataset import DatasetSpec, read_dataset

ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "SAR", "PIR", "ASL")
PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "axial, feet first": ((-1, 0, 0), (0, 1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "oblique": ((1, 0, 0), (0, np.cos(0.3), np.sin(0.3))),
}
SHAPE = (5, 7, 9)


def write(folder: Path, make_dicom: Any, plane: str, aside: float = 0.0) -> np.ndarray:
    """A series ``(D, H, W)`` without symmetry; each slice lies `aside` mm further to the right."""
    along, down = (np.array(v, float) for v in PLANES[plane])
    values = np.random.default_rng(5).integers(0, 1000, SHAPE).astype(np.int16)
    for k in range(SHAPE[0]):
        corner = np.cross(along, down) * 2.5 * k + along * aside * k + [-20, 15, 40]
        make_dicom(
            folder / f"{k}.dcm",
            values[k],
            SeriesInstanceUID="1.2.9",
            SOPInstanceUID=f"1.2.9.{k}",
            SOPClassUID="1.2.840.10008.5.1.4.1.1.2",
            PixelSpacing=[0.5, 0.75],
            ImageOrientationPatient=[*along, *down],
            ImagePositionPatient=[round(float(v), 6) for v in corner],
        )
    return values


def of_itk(files: list[Path]) -> Any:
    """The mask of all that is bright, on ITK's grid of these files."""
    if len(files) == 1:
        return sitk.Cast(sitk.ReadImage(str(files[0])) > 500, sitk.sitkUInt8)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(files[0].parent)))
    return sitk.Cast(reader.Execute() > 500, sitk.sitkUInt8)


def samples(root: Path, make_plan: Any, dimensions: int) -> Any:
    task = make_plan("segmentation", size=(8,) * dimensions).task
    return read_dataset(DatasetSpec(root, "dicom"), task).samples


def refusal(sample: Any) -> str:
    with pytest.raises(DataError) as caught:
        sample.mask()
    return caught.value.rule


@pytest.mark.parametrize("plane", PLANES)
def test_a_volumes_mask_in_any_order_hits_the_same_voxels(tmp_path, make_dicom, make_plan, plane):
    write(tmp_path / "images" / "s", make_dicom, plane)
    mask = of_itk(sorted((tmp_path / "images" / "s").iterdir()))
    (tmp_path / "masks").mkdir()
    for code in ORIENTATIONS:
        sitk.WriteImage(sitk.DICOMOrient(mask, code), str(tmp_path / "masks" / "1.2.9.nii.gz"))
        (sample,) = samples(tmp_path, make_plan, 3)
        np.testing.assert_array_equal(sample.mask(), sample.load().pixels[0] > 500, code)


@pytest.mark.parametrize("plane", PLANES)
def test_a_slices_mask_in_any_order_hits_the_same_pixels(tmp_path, make_dicom, make_plan, plane):
    values = write(tmp_path / "images", make_dicom, plane)
    mask = of_itk([tmp_path / "images" / "2.dcm"])
    (tmp_path / "masks").mkdir()
    for code in ORIENTATIONS:
        sitk.WriteImage(sitk.DICOMOrient(mask, code), str(tmp_path / "masks" / "2.nii.gz"))
        (sample,) = samples(tmp_path, make_plan, 2)
        np.testing.assert_array_equal(sample.mask(), values[2] > 500, code)


def moved(mask: Any, affine: np.ndarray) -> Any:
    return nib.Nifti1Image(np.asanyarray(mask.dataobj), affine)


ELSEWHERE = {
    "identity": lambda a: np.eye(4),
    "shifted": lambda a: a + np.pad([[0.3]] * 3, ((0, 1), (3, 0))),
    "of another patient": lambda a: a + np.pad([[100.0]] * 3, ((0, 1), (3, 0))),
    "other voxels": lambda a: a @ np.diag([2, 2, 3, 1.0]),
    "voxels a little larger": lambda a: a @ np.diag([1.09, 1.09, 1, 1]),
    "mirrored": lambda a: np.diag([-1, 1, 1, 1.0]) @ a,
    "back to front": lambda a: np.diag([1, -1, 1, 1.0]) @ a,
    "turned": lambda a: a[:, [1, 0, 2, 3]],
}


@pytest.mark.parametrize("case", ELSEWHERE)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_mask_that_lies_elsewhere_is_refused(tmp_path, make_dicom, make_plan, case, dimensions):
    folder = tmp_path / "images" / "s"
    write(folder, make_dicom, "axial")
    files = [folder / "1.dcm"] if dimensions == 2 else sorted(folder.iterdir())
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks" / ("1.2.9.1.nii.gz" if dimensions == 2 else "1.2.9.nii.gz")
    sitk.WriteImage(of_itk(files), str(path))
    (sample,) = samples(tmp_path, make_plan, dimensions)
    sample.mask()  # before it is moved
    mask = nib.Nifti1Image.from_bytes(nib.load(path).to_bytes())
    nib.save(moved(mask, ELSEWHERE[case](mask.affine)), path)
    (sample,) = samples(tmp_path, make_plan, dimensions)
    expected = {"position of mask differs"}
    assert refusal(sample) in expected | ({"shape of mask differs"} if case == "turned" else set())


def test_a_mask_of_another_shape_is_refused(tmp_path, make_dicom, make_plan):
    write(tmp_path / "images" / "s", make_dicom, "axial")
    (tmp_path / "masks").mkdir()
    mask = np.ones((9, 7, 4), np.uint8)
    affine = np.array([[-0.75, 0, 0, 20], [0, -0.5, 0, -15], [0, 0, 2.5, 40], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "masks" / "s.nii.gz")
    (sample,) = samples(tmp_path, make_plan, 3)
    assert refusal(sample) == "shape of mask differs"


@pytest.mark.parametrize("plane", ["axial", "oblique"])
def test_the_mask_of_a_leaning_gantry_moves_with_the_slices(tmp_path, make_dicom, make_plan, plane):
    # Two pixels aside a slice, so that whole pixels move and nothing is between two of them.
    values = write(tmp_path / "images" / "s", make_dicom, plane, aside=1.5)
    along, down = (np.array(v, float) for v in PLANES[plane])
    place = np.eye(4)  # of (column, row, slice), from the positions themselves
    place[:3, 0], place[:3, 1] = along * 0.75, down * 0.5
    place[:3, 2] = np.cross(along, down) * 2.5 + along * 1.5
    place[:3, 3] = [-20, 15, 40]
    place = np.diag([-1, -1, 1, 1.0]) @ place
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks" / "s.nii.gz"
    nib.save(nib.Nifti1Image((values > 500).astype(np.uint8).transpose(2, 1, 0), place), path)
    (sample,) = samples(tmp_path, make_plan, 3)
    image = sample.load()
    assert image.tilt > 10
    np.testing.assert_array_equal(sample.mask(), image.pixels[0] > 500)
    # Drawn on the upright volume it stays as it is; moved as well it would be beside the image.
    upright = place.copy()
    upright[:3, 2] = np.diag([-1, -1, 1.0]) @ np.cross(along, down) * 2.5
    upright[:3, 3] += np.diag([-1, -1, 1.0]) @ along * 3.0  # over the middle slice
    moved_image = nib.as_closest_canonical(nib.Nifti1Image(np.zeros(SHAPE[::-1]), upright))
    drawn = nib.Nifti1Image((image.pixels[0] > 700).astype(np.uint8), moved_image.affine)
    nib.save(drawn, path)
    (sample,) = samples(tmp_path, make_plan, 3)
    np.testing.assert_array_equal(sample.mask(), image.pixels[0] > 700)
    orthogonal = place.copy()
    orthogonal[:3, 2] = upright[:3, 2]
    nib.save(nib.Nifti1Image(np.ones(SHAPE[::-1], np.uint8), orthogonal), path)
    (sample,) = samples(tmp_path, make_plan, 3)
    assert refusal(sample) == "position of mask differs"


def test_the_mask_of_uneven_slices_lies_on_their_resampled_volume(tmp_path, make_dicom, make_plan):
    write(tmp_path / "images" / "s", make_dicom, "oblique")
    (tmp_path / "images" / "s" / "2.dcm").unlink()  # heights of 0, 2.5, 7.5 and 10 mm
    along, down = (np.array(v, float) for v in PLANES["oblique"])
    place = np.eye(4)
    place[:3, 0], place[:3, 1], place[:3, 2] = along * 0.75, down * 0.5, np.cross(along, down) * 2.5
    place[:3, 3] = [-20, 15, 40]
    place = np.diag([-1, -1, 1, 1.0]) @ place
    drawn = np.random.default_rng(1).integers(0, 2, SHAPE[::-1], np.uint8)
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks" / "s.nii.gz"
    nib.save(nib.Nifti1Image(drawn, place), path)
    (sample,) = samples(tmp_path, make_plan, 3)
    expected = np.asarray(nib.as_closest_canonical(nib.Nifti1Image(drawn, place)).dataobj)
    np.testing.assert_array_equal(sample.mask(), expected)
    assert sample.load().pixels.shape[1:] == expected.shape
    # A slice of the mask for each of the images, evenly apart, lies nowhere near them.
    place[:3, 2] *= 4 / 3
    nib.save(nib.Nifti1Image(drawn[..., [0, 1, 3, 4]], place), path)
    (sample,) = samples(tmp_path, make_plan, 3)
    assert refusal(sample) == "shape of mask differs"


def test_voxels_of_another_size_are_no_place_of_a_nifti_image(tmp_path, make_plan):
    """The same rule for NIfTI images: over forty voxels a fortieth more is a whole voxel."""
    for folder, size in (("images", 1.0), ("labels", 1.04)):
        (tmp_path / folder).mkdir()
        image = nib.Nifti1Image(np.ones((40, 4, 4), np.uint8), np.diag([size, size, size, 1]))
        nib.save(image, tmp_path / folder / "a.nii.gz")
    task = make_plan("segmentation", size=(8, 8, 8)).task
    (sample,) = read_dataset(DatasetSpec(tmp_path, "nifti"), task).samples
    assert refusal(sample) == "position of mask differs"
