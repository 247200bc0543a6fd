"""Stacks of slices: which ones make a volume, and where its voxels lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy.interpolate import interp1d

from fedward.errors import DataError
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.readers.dicom.pixels import read_frame
from fedward_client.data.readers.dicom.series import geometry, stack
from fedward_client.data.transforms import prepare_image

AXIAL = (np.array([1.0, 0, 0]), np.array([0, 1.0, 0]))
_TURN = 0.3
OBLIQUE = (
    np.array([np.cos(_TURN), np.sin(_TURN), 0]),
    np.array([-np.sin(_TURN) * np.cos(0.2), np.cos(_TURN) * np.cos(0.2), np.sin(0.2)]),
)


def write(
    folder: Path,
    make_dicom: Any,
    values: np.ndarray,
    *,
    plane: Any = AXIAL,
    gap: float = 2.5,
    aside: Any = (0.0, 0.0, 0.0),
    heights: Any = None,
    **tags: Any,
) -> list[Path]:
    """A CT series ``(D, H, W)`` whose file names and instance numbers say nothing of the place."""
    along, down = plane
    normal = np.cross(along, down)
    order = np.random.default_rng(3).permutation(len(values))
    paths = []
    for name, k in enumerate(order):
        height = gap * k if heights is None else heights[k]
        corner = np.array([-20.0, 15.0, 40.0]) + normal * height + np.array(aside) * k
        paths.append(
            make_dicom(
                folder / f"{name:03d}.dcm",
                values[k],
                **{
                    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
                    "SeriesInstanceUID": "1.2.77",
                    "StudyInstanceUID": "1.2.76",
                    "FrameOfReferenceUID": "1.2.78",
                    "PixelSpacing": [0.7, 0.9],
                    "ImageOrientationPatient": [*along, *down],
                    "ImagePositionPatient": [round(float(v), 6) for v in corner],
                    "RescaleSlope": 1,
                    "RescaleIntercept": -1024,
                    "InstanceNumber": name + 1,
                    **tags,
                },
            )
        )
    return paths


def voxels(count: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2000, (count, 10, 12)).astype(np.int16)


def volumes(folder: Path, make_plan: Any) -> list[Any]:
    (folder / "labels.csv").write_text("PatientID,label\nP1,sick\n")
    return list(read_dataset(DatasetSpec(folder, "dicom"), make_plan(size=(8, 8, 8)).task).samples)


def refusal(sample: Any) -> str:
    with pytest.raises(DataError) as caught:
        sample.load()
    return caught.value.rule


@pytest.mark.parametrize("plane", [AXIAL, OBLIQUE], ids=["axial", "oblique"])
def test_a_volume_is_that_of_an_independent_reader(tmp_path, make_dicom, make_plan, plane):
    write(tmp_path / "s", make_dicom, voxels(), plane=plane)
    (sample,) = volumes(tmp_path, make_plan)
    image = sample.load()
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    # RAI in ITK's words names where axes come from: the axes then run to left, back and top.
    other = sitk.DICOMOrient(reader.Execute(), "RAS")
    np.testing.assert_allclose(image.pixels[0], sitk.GetArrayFromImage(other).transpose(2, 1, 0))
    assert image.spacing == pytest.approx(other.GetSpacing(), abs=1e-4)
    assert image.tilt == 0


def test_world_places_are_those_of_an_independent_reader(tmp_path, make_dicom):
    paths = write(tmp_path / "s", make_dicom, voxels(), plane=OBLIQUE)
    frames = [read_frame(path) for path in paths]
    affine = geometry(frames, frames[0].image.spacing).affine
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    other = reader.Execute()
    for row, column, place in ((0, 0, 0), (9, 11, 6), (3, 7, 2)):
        left, back, up = other.TransformIndexToPhysicalPoint((column, row, place))
        found = affine @ [row, column, place, 1]
        np.testing.assert_allclose(found[:3], [-left, -back, up], atol=1e-3)


def test_scouts_are_left_out(tmp_path, make_dicom, make_plan):
    write(tmp_path / "s", make_dicom, voxels())
    make_dicom(tmp_path / "scout.dcm", voxels(1)[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    make_dicom(
        tmp_path / "tiles.dcm", voxels(1)[0], ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    )
    (tmp_path / "labels.csv").write_text("PatientID,label\nP1,sick\n")
    dataset = read_dataset(DatasetSpec(tmp_path, "dicom"), make_plan(size=(8, 8, 8)).task)
    assert len(dataset.samples) == 1
    assert [item.reason for item in dataset.left_out] == ["scout or localizer", "mosaic of slices"]


def test_planes_of_one_series_are_volumes_of_their_own(tmp_path, make_dicom, make_plan):
    axial, other = voxels(5, 1), voxels(6, 2)
    write(tmp_path / "a", make_dicom, axial)
    write(tmp_path / "b", make_dicom, other, plane=OBLIQUE)
    depths = sorted(sample.load().pixels.shape[-1] for sample in volumes(tmp_path, make_plan))
    assert depths == [5, 6]


def test_times_of_one_series_are_volumes_of_their_own(tmp_path, make_dicom, make_plan):
    early, late = voxels(5, 1), voxels(5, 2)
    write(tmp_path / "a", make_dicom, early, AcquisitionNumber=1)
    write(tmp_path / "b", make_dicom, late, AcquisitionNumber=2)
    means = sorted(float(sample.load().pixels.mean()) for sample in volumes(tmp_path, make_plan))
    assert means == pytest.approx(sorted([early.mean() - 1024, late.mean() - 1024]))


def test_an_acquisition_number_per_slice_divides_nothing(tmp_path, make_dicom, make_plan):
    for k, path in enumerate(write(tmp_path / "s", make_dicom, voxels())):
        file = pydicom.dcmread(path)
        file.AcquisitionNumber = k + 1
        file.save_as(path)
    (sample,) = volumes(tmp_path, make_plan)
    assert sample.load().pixels.shape[-1] == 7


def test_the_same_slice_twice_counts_once_and_another_in_its_place_is_refused(
    tmp_path, make_dicom, make_plan
):
    values = voxels(4)
    write(
        tmp_path / "same" / "s",
        make_dicom,
        np.concatenate([values, values[1:2]]),
        heights=[0, 2, 4, 6, 2],
    )
    (sample,) = volumes(tmp_path / "same", make_plan)
    np.testing.assert_array_equal(sample.load().pixels.shape, (1, 12, 10, 4))
    write(tmp_path / "other" / "s", make_dicom, voxels(5), heights=[0, 2, 4, 6, 2])
    (sample,) = volumes(tmp_path / "other", make_plan)
    assert refusal(sample) == "duplicate slices"


@pytest.mark.parametrize(
    ("heights", "reason"),
    [
        ([0, 3, 6, 12, 15], "slices missing"),  # 6 mm
        ([0, 3, 6, 11.2, 14], "slices uneven"),
        ([0, 0.3, 0.6, 2.4, 2.7], "slices missing"),  # six times the others
        ([0, 2, 4, 4.3, 6], "slices uneven"),
    ],
)
def test_gaps_that_are_too_wide_to_be_interpolated(
    tmp_path, make_dicom, make_plan, heights, reason
):
    paths = write(tmp_path / "s", make_dicom, voxels(5), heights=heights)
    with pytest.raises(DataError, match=f"{reason}: 1"):  # from the headers
        volumes(tmp_path, make_plan)
    with pytest.raises(DataError, match=reason):  # and where the pixels are read
        stack([read_frame(path) for path in paths])


STRETCHES = [0, 1.25, 2.5, 3.75, 6.25, 8.75, 13.75]  # of 1.25, 2.5 and 5 mm
UNEVEN = {
    "stretches": STRETCHES,
    "a slice is missing": [0, 2, 4, 8, 10],
    "none fits a grid": [0, 2, 4.7, 6.1, 8.3],
    "one decimal, a slice is missing": [0, 0.6, 1.2, 2.5, 3.1, 3.7],
    "one decimal, one is further off": [0, 0.6, 1.2, 1.8, 2.7, 3.3, 3.9],
    "nothing is rounded": [0, 0.62, 1.31, 1.86, 2.5],
    "one decimal, tenths": [0, 0.1, 0.2, 0.3, 0.5, 0.6],
}


@pytest.mark.parametrize("plane", [AXIAL, OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize("case", UNEVEN)
def test_uneven_slices_are_resampled_by_their_positions(
    tmp_path, make_dicom, make_plan, case, plane
):
    heights = np.array(UNEVEN[case])
    values = voxels(len(heights))
    paths = write(tmp_path / "s", make_dicom, values, heights=heights, plane=plane)
    (sample,) = volumes(tmp_path, make_plan)
    assert sample.columns["uneven"] == "yes"
    image = sample.load()
    assert image.gap == pytest.approx(np.diff(heights).max(), abs=1e-5)
    # Independently: SciPy's linear interpolation at whole parts of the length of the stack.
    places = np.linspace(0, heights[-1], round(heights[-1] / np.diff(heights).min()) + 1)
    step = places[1]
    expected = interp1d(heights, values - 1024.0, axis=0)(places)
    # Places count to a hundredth of a step, and values of neighbours are up to 2,000 apart.
    turned = expected.transpose(2, 1, 0)[::-1, ::-1]
    np.testing.assert_allclose(image.pixels[0], turned, atol=0.005 * 2 * 2000)
    assert image.spacing[2] == pytest.approx(step, abs=1e-5)
    assert sample.columns["slice_distance"] == f"{step:.3g}"
    # And each slice on a whole step is as it was taken.
    frames = [read_frame(path) for path in paths]
    made = geometry(frames, frames[0].image.spacing)
    for height, taken in zip(heights, values, strict=True):
        k = round(height / step)
        if abs(height - places[k]) < 1e-4:
            here = image.pixels[0].transpose(2, 1, 0)[k, ::-1, ::-1]
            np.testing.assert_array_equal(here, taken - 1024)
            normal = np.cross(*plane)
            left, back, up = np.array([-20, 15, 40]) + normal * height
            found = made.affine @ [0, 0, k, 1]
            np.testing.assert_allclose(found[:3], [-left, -back, up], atol=1e-3)


def test_labels_of_uneven_slices_are_those_of_the_nearer_and_go_back(tmp_path, make_dicom):
    paths = write(tmp_path / "s", make_dicom, voxels(7), heights=STRETCHES)
    frames = [read_frame(path) for path in paths]
    labels = [np.random.default_rng(k).integers(0, 5, (10, 12), np.uint8) for k in range(7)]
    made = geometry(frames, frames[0].image.spacing)
    volume, spacing = made.volume(labels, labels=True)
    places = np.arange(12) * 1.25
    order = np.argsort([frame.position[2] for frame in frames])
    nearest = interp1d(STRETCHES, np.arange(7), kind="nearest")(places).astype(int)
    expected = np.stack([labels[order[k]] for k in nearest])
    np.testing.assert_array_equal(volume, expected.transpose(2, 1, 0)[::-1, ::-1])
    assert spacing[2] == pytest.approx(1.25)
    for own, back in zip(labels, made.slices(volume), strict=True):
        np.testing.assert_array_equal(back, own)


def test_uneven_slices_of_a_leaning_gantry_are_set_upright_first(tmp_path, make_dicom, make_plan):
    # A rod along the normal, whose slices are pushed to the back in proportion to their heights.
    heights = np.array([0, 1, 2, 3, 4, 6, 8, 10.0])
    values = np.zeros((8, 24, 20), np.int16)
    for k, height in enumerate(heights):
        values[k, 15 - int(height) : 18 - int(height), 9:12] = 1024
    paths = write(tmp_path / "s", make_dicom, values, heights=heights)
    for path in paths:
        file = pydicom.dcmread(path)
        file.ImagePositionPatient[1] += 0.7 * (file.ImagePositionPatient[2] - 40)
        file.save_as(path)
    (sample,) = volumes(tmp_path, make_plan)
    image = sample.load()
    assert image.tilt == pytest.approx(np.degrees(np.arctan2(0.7, 1)), abs=1e-3)
    rod = image.pixels[0] == 0
    assert rod.shape == (20, 24, 11)
    np.testing.assert_array_equal(rod, np.repeat(rod[..., :1], 11, axis=-1))


def test_a_leaning_gantry_is_refused_or_set_upright(tmp_path, make_dicom, make_plan):
    # A ball, scanned by a gantry whose slices are pushed to the back by two pixels each.
    depth, rows, columns = 13, 48, 40
    z, y, x = np.mgrid[:depth, :rows, :columns].astype(float)

    def ball(shift: np.ndarray) -> np.ndarray:
        far = ((z - 6) * 2.5) ** 2 + ((y + shift - 24) * 0.7) ** 2 + ((x - 20) * 0.9) ** 2
        return np.where(far < 10**2, 1000, 0).astype(np.int16)

    steps = 2.0 * (np.arange(depth) - 6)[:, None, None]
    write(tmp_path / "s", make_dicom, ball(steps), aside=(0, 2 * 0.7, 0))
    (sample,) = volumes(tmp_path, make_plan)
    assert sample.columns["tilted"] == "yes"
    image = sample.load()
    assert image.tilt == pytest.approx(np.degrees(np.arctan2(1.4, 2.5)), abs=1e-3)
    upright = ball(np.zeros_like(steps)).transpose(2, 1, 0)[::-1, ::-1] - 1024.0
    assert np.mean(np.abs(image.pixels[0] - upright) > 1) < 0.002
    plan = make_plan(size=(8, 8, 8))
    with pytest.raises(DataError, match="gantry tilt"):
        prepare_image(image, None, plan.task, plan.preprocessing)
    correct = plan.preprocessing.model_copy(update={"gantry_tilt": "correct"})
    assert prepare_image(image, None, plan.task, correct).pixels.shape == (1, 8, 8, 8)


def test_one_slice_is_no_volume(tmp_path, make_dicom):
    frame = read_frame(write(tmp_path, make_dicom, voxels(1))[0])
    with pytest.raises(DataError, match="shape does not fit"):
        stack([frame])


def each(paths: list[Path], change: Any) -> None:
    """Change every file, told by its slice's number from the bottom."""
    for path in paths:
        file = pydicom.dcmread(path)
        change(file, round((float(file.ImagePositionPatient[2]) - 40) / 2.5))
        file.save_as(path)


def test_jitter_of_axes_and_spacing_divides_nothing(tmp_path, make_dicom, make_plan):
    # 0.015 and 0.725 are where two decimals, and three, are rounded either way.
    def jitter(file: Any, k: int) -> None:
        s = 0.015 + (3e-8 if k % 3 else -3e-8)
        c = (1 - s * s) ** 0.5
        file.ImageOrientationPatient = [f"{v:.9f}" for v in (c, s, 0, -s, c, 0)]
        file.PixelSpacing = ["0.7245", "0.7245"] if k % 2 else ["0.72449999", "0.7245"]

    values = voxels(9)
    each(write(tmp_path / "s", make_dicom, values), jitter)
    (sample,) = volumes(tmp_path, make_plan)
    image = sample.load()
    np.testing.assert_array_equal(image.pixels[0], values.transpose(2, 1, 0)[::-1, ::-1] - 1024)
    assert image.spacing == pytest.approx((0.7245, 0.7245, 2.5))


def test_spacings_and_axes_that_differ_do_divide(tmp_path, make_dicom, make_plan):
    write(tmp_path / "a", make_dicom, voxels(5))
    write(tmp_path / "b", make_dicom, voxels(6), PixelSpacing=[0.705, 0.905])
    steep = (np.array([np.cos(0.05), np.sin(0.05), 0]), np.array([-np.sin(0.05), np.cos(0.05), 0]))
    write(tmp_path / "c", make_dicom, voxels(7), plane=steep)
    depths = sorted(sample.load().pixels.shape[-1] for sample in volumes(tmp_path, make_plan))
    assert depths == [5, 6, 7]


def means_of(samples: list[Any]) -> list[float]:
    return sorted(float(sample.load().pixels.mean()) for sample in samples)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("DiffusionBValue", 0.0, 800.0),
        ("EchoTime", 4.6, 9.2),
        ("InversionTime", 150.0, 900.0),
        ("ImageType", ["DERIVED", "PRIMARY", "DIXON", "W"], ["DERIVED", "PRIMARY", "DIXON", "F"]),
        ("KVP", 80, 140),
        ("TriggerTime", 0.0, 41.5),
        ("AcquisitionTime", "101500", "101730.25"),
        ("SeriesDescription", "before", "after"),
        (0x0019100C, 50, 1000),
    ],
)
def test_whatever_tells_volumes_in_one_place_apart(
    tmp_path, make_dicom, make_plan, name, first, second
):
    parts = [voxels(5, 1), voxels(5, 2)]
    for folder, values, value in zip("ab", parts, (first, second), strict=True):

        def mark(file: Any, k: int, value: Any = value) -> None:
            if isinstance(name, int):
                file.add_new(0x00190010, "LO", "SIEMENS MR HEADER")
                file.add_new(name, "IS", value)
            else:
                setattr(file, name, value)

        each(write(tmp_path / folder, make_dicom, values), mark)
    assert means_of(volumes(tmp_path, make_plan)) == pytest.approx(
        sorted(values.mean() - 1024 for values in parts)
    )


def test_two_attributes_together_tell_four_volumes_apart(tmp_path, make_dicom, make_plan):
    parts = [voxels(4, k) for k in range(4)]
    for k, values in enumerate(parts):
        tags = {"EchoTime": [5, 50][k // 2], "ImageType": ["ORIGINAL", "PRIMARY", "MP"[k % 2]]}
        write(tmp_path / f"{k}", make_dicom, values, **tags)
    assert means_of(volumes(tmp_path, make_plan)) == pytest.approx(
        sorted(values.mean() - 1024 for values in parts)
    )


def test_slices_that_are_taken_one_after_the_other_are_volumes_by_time(
    tmp_path, make_dicom, make_plan
):
    parts = [voxels(4, k) for k in range(3)]
    for k, values in enumerate(parts):
        paths = write(tmp_path / f"{k}", make_dicom, values)
        each(paths, lambda f, z, k=k: setattr(f, "AcquisitionTime", f"1010{10 * k + z:02d}.5"))
    assert means_of(volumes(tmp_path, make_plan)) == pytest.approx(
        sorted(values.mean() - 1024 for values in parts)
    )


def test_no_volume_is_torn_apart_for_one_slice_that_is_there_twice(tmp_path, make_dicom, make_plan):
    # Odd slices were taken in one acquisition and even ones in another; slice 2 was taken again.
    paths = write(tmp_path / "s", make_dicom, voxels(8))
    each(paths, lambda file, k: setattr(file, "AcquisitionNumber", 1 + k % 2))
    again = write(tmp_path / "t", make_dicom, voxels(1, 9), heights=[5.0])
    each(again, lambda file, k: setattr(file, "AcquisitionNumber", 2))
    (sample,) = volumes(tmp_path, make_plan)
    assert len(sample.load.frames) == 9
    assert refusal(sample) == "duplicate slices"


def test_what_is_taken_of_one_place_beside_a_volume_is_no_part_of_it(
    tmp_path, make_dicom, make_plan
):
    write(tmp_path / "s", make_dicom, voxels(6), AcquisitionNumber=1)
    for k in range(4):  # where the contrast agent is watched
        write(tmp_path / f"t{k}", make_dicom, voxels(1, k), heights=[5.0], AcquisitionNumber=2 + k)
    (sample,) = volumes(tmp_path, make_plan)
    assert sample.load().pixels.shape[-1] == 6


@pytest.mark.parametrize("gap", [0.625, 0.33, 0.75])
def test_positions_with_one_decimal_are_even(tmp_path, make_dicom, make_plan, gap):
    heights = [round(gap * k, 1) for k in range(12)]
    write(tmp_path / "s", make_dicom, voxels(12), heights=heights)
    (sample,) = volumes(tmp_path, make_plan)
    image = sample.load()
    assert image.pixels.shape[-1] == 12
    assert image.spacing[2] == pytest.approx(gap, abs=0.01)


def test_what_is_no_image_is_of_one_value_in_a_volume(tmp_path, make_dicom, make_plan):
    values = voxels(5) % 900 + np.arange(5, dtype=np.int16)[:, None, None] * 100
    values[:, :3] = -2000
    values[2] = -2000  # a slice without any image
    write(tmp_path / "s", make_dicom, values, PixelPaddingValue=-2000)
    (sample,) = volumes(tmp_path, make_plan)
    made = sample.load().pixels[0].transpose(2, 1, 0)[:, ::-1, ::-1]
    lowest = values[values > -2000].min()
    np.testing.assert_array_equal(made, np.where(values == -2000, lowest, values) - 1024.0)


def test_a_long_gap_makes_no_slices_of_one_place(tmp_path, make_dicom, make_plan):
    # Neither does jitter make two places of one, where each slice is an acquisition.
    heights = [-200.0, 0, 1.25, 2.5, 3.75]
    paths = write(tmp_path / "s", make_dicom, voxels(5), heights=heights)
    for k, path in enumerate(paths):
        file = pydicom.dcmread(path)
        file.AcquisitionNumber = 1 + k // 2
        file.save_as(path)
    with pytest.raises(DataError, match="slices missing: 1"):
        volumes(tmp_path, make_plan)
    write(tmp_path / "t", make_dicom, voxels(4, 1), SeriesInstanceUID="1.2.9", EchoTime=5)
    write(
        tmp_path / "u",
        make_dicom,
        voxels(4, 2),
        SeriesInstanceUID="1.2.9",
        EchoTime=9,
        aside=(0, 0, 0.001),
    )
    assert [len(sample.load.frames) for sample in volumes(tmp_path, make_plan)] == [4, 4]
