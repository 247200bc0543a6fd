"""Structure sets (RTSTRUCT) as label maps of the images that they are of."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Outline

from fedward.errors import DataError
from fedward_client.data.readers.dicom import rtstruct

ROWS, COLUMNS, COUNT = 40, 48, 5


def in_mm(pixels: np.ndarray, k: float) -> np.ndarray:
    """Rows and columns ``(N, 2)`` of slice `k` of the axial series to mm."""
    columns, rows = pixels[:, 1], pixels[:, 0]
    return np.stack([-20 + 0.9 * columns, 15 + 0.7 * rows, np.full(len(rows), 40 + 2.5 * k)], 1)


def blob(seed: int, middle: tuple[float, float], size: float = 8) -> np.ndarray:
    """A ragged outline around a point, corners in pixels."""
    angle = np.linspace(0, 2 * np.pi, 25, endpoint=False)
    radius = size * np.random.default_rng(seed).uniform(0.6, 1.3, 25)
    return np.array(middle) + radius[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1)


def inside(pixels: np.ndarray) -> np.ndarray:
    """Independently, by matplotlib: whether each pixel's centre is inside."""
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    found = Outline(pixels).contains_points(np.column_stack([rows.ravel(), columns.ravel()]))
    return found.reshape(ROWS, COLUMNS)


@pytest.fixture
def images(tmp_path, make_ct):
    return make_ct(tmp_path / "ct", COUNT, ROWS, COLUMNS)


def drawn(images, *, named: bool = True):
    """Regions and the label map ``(D, H, W)`` that they stand for; slice 1 is empty."""
    labels = np.zeros((COUNT, ROWS, COLUMNS), np.uint8)
    regions: dict = {"Heart": [], "LUNG ": [], "skin": []}
    for k in (0, 2, 3, 4):
        image = images[k] if named else None
        heart, hole = blob(k, (14, 15), 11), blob(k + 50, (14, 15), 3)
        lung, second = blob(k + 10, (28, 33), 9), blob(k + 20, (7, 38), 5)
        regions["Heart"] += [(in_mm(one, k), image) for one in (heart, hole)]
        regions["LUNG "] += [(in_mm(one, k), image) for one in (lung, second)]
        labels[k][inside(heart) & ~inside(hole)] = 1
        labels[k][inside(lung) | inside(second)] = 2
        regions["skin"] += [(in_mm(blob(k, (20, 24), 14), k), image)]
    return regions, labels


@pytest.mark.parametrize("named", [True, False], ids=["by image", "by place"])
def test_regions_of_a_volume(tmp_path, images, make_structures, read_masked, to_ras, named):
    regions, labels = drawn(images, named=named)
    make_structures(tmp_path / "rt" / "s.dcm", images, regions)
    dataset = read_masked(tmp_path, ("heart", "lung"))
    (sample,) = dataset.samples
    np.testing.assert_array_equal(sample.mask(), to_ras(labels))
    assert sample.mask().shape == sample.load().pixels.shape[1:]
    assert not dataset.left_out


def test_each_slice_of_a_2d_task(tmp_path, images, make_structures, read_masked):
    regions, labels = drawn(images)
    make_structures(tmp_path / "masks" / "s.dcm", images, regions)
    samples = read_masked(tmp_path, ("heart", "lung"), 2).samples
    assert len(samples) == COUNT
    place = {image.pixel_array.tobytes(): k for k, image in enumerate(images)}
    for sample in samples:
        k = place[sample.load().pixels[0].astype(np.int16).tobytes()]
        np.testing.assert_array_equal(sample.mask(), labels[k])


def test_the_volume_of_a_ball(tmp_path, make_ct, make_structures, read_masked):
    images = make_ct(tmp_path / "ct", 21, 80, 80, PixelSpacing=[1, 1])
    middle, radius = np.array([20.0, 55.0, 65.0]), 22.0
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    contours = []
    for image in images:
        height = float(image.ImagePositionPatient[2]) - middle[2]
        if abs(height) < radius:
            across = np.sqrt(radius**2 - height**2)
            ring = across * np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
            contours.append((middle + [0, 0, height] + ring, image))
    make_structures(tmp_path / "s.dcm", images, {"ball": contours})
    (sample,) = read_masked(tmp_path, ("ball",)).samples
    volume = sample.mask().sum() * 2.5
    assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.01)


def test_tilted_axes(tmp_path, make_ct, make_structures, read_masked):
    # Coronal slices, rows going down: the normal runs to the back.
    images = make_ct(tmp_path / "ct", 3, ROWS, COLUMNS, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    for k, image in enumerate(images):
        image.ImagePositionPatient = [-20, 15 + 2.5 * k, 40]
        image.save_as(tmp_path / "ct" / f"{k}.dcm")
    for old in (tmp_path / "ct").glob("00*.dcm"):
        old.unlink()
    outline = blob(3, (18, 22))
    points = np.stack([-20 + 0.9 * outline[:, 1], np.full(25, 17.5), 40 - 0.7 * outline[:, 0]], 1)
    make_structures(tmp_path / "s.dcm", images, {"x": [points]})
    (sample,) = read_masked(tmp_path, ("x",)).samples
    wanted = np.zeros((3, ROWS, COLUMNS), np.uint8)
    wanted[1] = inside(outline)
    # Columns run left, slices to the back, rows downwards.
    np.testing.assert_array_equal(sample.mask(), wanted.transpose(2, 0, 1)[::-1, ::-1, ::-1])


def test_frames_of_a_multi_frame_image(
    tmp_path, make_dicom, make_group, make_structures, read_masked, to_ras
):
    pixels = np.random.default_rng(2).integers(0, 900, (COUNT, ROWS, COLUMNS)).astype(np.int16)
    shared = make_group(
        PixelMeasuresSequence={"PixelSpacing": [0.7, 0.9]},
        PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
    )
    each = [
        make_group(PlanePositionSequence={"ImagePositionPatient": [-20, 15, 40 + 2.5 * k]})
        for k in range(COUNT)
    ]
    path = make_dicom(
        tmp_path / "ct.dcm",
        pixels,
        frames=COUNT,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=each,
        FrameOfReferenceUID="1.2.78",
    )
    image, outlines = pydicom.dcmread(path), [blob(k, (18, 22)) for k in range(2)]
    make_structures(
        tmp_path / "s.dcm",
        [image],
        {"x": [(in_mm(outlines[0], 3), image), (in_mm(outlines[1], 4), image)]},
    )
    structures = pydicom.dcmread(tmp_path / "s.dcm")
    second = structures.ROIContourSequence[0].ContourSequence[1]
    second.ContourImageSequence[0].ReferencedFrameNumber = 5
    structures.save_as(tmp_path / "s.dcm")
    labels = np.zeros((COUNT, ROWS, COLUMNS), np.uint8)
    labels[3], labels[4] = inside(outlines[0]), inside(outlines[1])
    (sample,) = read_masked(tmp_path, ("x",)).samples
    np.testing.assert_array_equal(sample.mask(), to_ras(labels))


def test_points_and_open_lines_enclose_nothing(tmp_path, images, make_structures, read_masked):
    outline = in_mm(blob(1, (20, 20)), 2)
    make_structures(
        tmp_path / "s.dcm",
        images,
        {
            "x": [
                outline,
                (outline + [9, 9, 0], images[2], "OPEN_PLANAR"),
                (outline[:1], images[2], "POINT"),
                outline[:2],
            ]
        },
    )
    (sample,) = read_masked(tmp_path, ("x",)).samples
    assert sample.mask().sum() == inside(blob(1, (20, 20))).sum()
    make_structures(tmp_path / "s.dcm", images, {"x": [(outline[:1], images[2], "POINT")]})
    with pytest.raises(DataError, match="no closed contour: 1"):
        read_masked(tmp_path, ("x",))


def test_the_same_contour_twice_does_not_take_itself_away(
    tmp_path, images, make_structures, read_masked
):
    outline = in_mm(blob(1, (20, 20)), 2)
    make_structures(tmp_path / "s.dcm", images, {"x": [outline, (outline, images[2])]})
    (sample,) = read_masked(tmp_path, ("x",)).samples
    assert sample.mask().sum() == inside(blob(1, (20, 20))).sum()


def refused(tmp_path, images, make_structures, read_masked, contours, reason, dimensions=3) -> None:
    make_structures(tmp_path / "s.dcm", images, {"x": contours})
    for sample in read_masked(tmp_path, ("x",), dimensions).samples:
        with pytest.raises(DataError, match=re.escape(reason)):
            sample.mask()


GOOD = in_mm(blob(1, (20, 20)), 2)
ASLANT = GOOD + np.linspace(0, 2, 25)[:, None] * [0, 0, 1]
OFF = {
    "between slices": (GOOD + [0, 0, 1.2], "position of mask differs"),
    "aslant": (ASLANT, "position of mask differs"),
    "beside": (GOOD + [300, 0, 0], "position of mask differs"),
    "absurd": (GOOD * [1e30, 1, 1], "position of mask differs"),
    "not a number": (np.where(np.arange(75).reshape(25, 3) == 7, np.nan, GOOD), "not readable"),
    "infinite": (np.where(np.arange(75).reshape(25, 3) == 7, np.inf, GOOD), "not readable"),
}


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("case", OFF)
def test_contours_off_the_slices(tmp_path, images, make_structures, read_masked, case, dimensions):
    points, reason = OFF[case]
    refused(tmp_path, images, make_structures, read_masked, [GOOD, points], reason, dimensions)


def test_a_contour_that_names_another_image_than_it_lies_on(
    tmp_path, images, make_structures, read_masked
):
    contours = [GOOD, (GOOD, images[3])]
    refused(tmp_path, images, make_structures, read_masked, contours, "position of mask differs")


def test_contours_of_slices_that_are_not_here(
    tmp_path, images, make_structures, read_masked, to_ras
):
    regions, labels = drawn(images)
    make_structures(tmp_path / "s.dcm", images, regions)
    for image in images[3:]:
        Path(image.filename).unlink()
    (sample,) = read_masked(tmp_path, ("heart", "lung")).samples
    np.testing.assert_array_equal(sample.mask(), to_ras(labels[:3]))


def test_another_frame_of_reference(tmp_path, images, make_structures, read_masked):
    make_structures(tmp_path / "s.dcm", images, {"x": [GOOD]})
    structures = pydicom.dcmread(tmp_path / "s.dcm")
    structures.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.99"
    structures.save_as(tmp_path / "s.dcm")
    (sample,) = read_masked(tmp_path, ("x",)).samples
    with pytest.raises(DataError, match="position of mask differs"):
        sample.mask()


@pytest.mark.parametrize("named", [True, False], ids=["by image", "by frame of reference"])
def test_without_the_series(tmp_path, images, make_structures, read_masked, to_ras, named):
    regions, labels = drawn(images, named=named)
    path = make_structures(tmp_path / "s.dcm", images, regions)
    structures = pydicom.dcmread(path)
    if not named:
        del structures.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    else:
        del structures.ReferencedFrameOfReferenceSequence
    structures.save_as(path)
    (sample,) = read_masked(tmp_path, ("heart", "lung")).samples
    np.testing.assert_array_equal(sample.mask(), to_ras(labels))


def test_a_structure_set_of_no_image_here(tmp_path, images, make_structures, read_masked, make_ct):
    others = make_ct(tmp_path / "gone", SeriesInstanceUID="1.2.55", FrameOfReferenceUID="1.2.56")
    make_structures(tmp_path / "s.dcm", others, {"x": [GOOD]})
    for one in (tmp_path / "gone").iterdir():
        one.unlink()
    with pytest.raises(DataError, match="no image: 1, no mask: 1"):
        read_masked(tmp_path, ("x",))


def edit_contour(name: str, value: object):
    def edit(file):
        contour = file.ROIContourSequence[0].ContourSequence[0]
        if value is None:
            delattr(contour, name)
        else:
            setattr(contour, name, value)

    return edit


def drop(name: str):
    return lambda file: delattr(file, name)


BROKEN = {
    "more points declared": (edit_contour("NumberOfContourPoints", 2_000_000_000), "not readable"),
    "fewer points declared": (edit_contour("NumberOfContourPoints", 3), "not readable"),
    "half a point": (edit_contour("ContourData", ["1", "2", "3", "4"]), "not readable"),
    "no points": (edit_contour("ContourData", None), "not readable"),
    "no type": (edit_contour("ContourGeometricType", None), "no closed contour"),
    "no regions": (drop("StructureSetROISequence"), "not readable"),
    "no contours": (drop("ROIContourSequence"), "no closed contour"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_structure_sets(tmp_path, images, make_structures, read_masked, case):
    edit, reason = BROKEN[case]
    path = make_structures(tmp_path / "s.dcm", images, {"x": [GOOD]})
    structures = pydicom.dcmread(path)
    edit(structures)
    structures.save_as(path)
    with pytest.raises(DataError, match=reason):
        read_masked(tmp_path, ("x",)).samples[0].mask()


def test_a_drawing_with_too_many_points(
    tmp_path, images, make_structures, read_masked, monkeypatch
):
    make_structures(tmp_path / "s.dcm", images, {"x": [GOOD, GOOD + [1, 0, 0]]})
    monkeypatch.setattr(rtstruct, "_POINTS", 40)
    (sample,) = read_masked(tmp_path, ("x",)).samples
    with pytest.raises(DataError, match="too large"):
        sample.mask()


@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "DeflatedExplicitVRLittleEndian"])
def test_other_codings(tmp_path, images, make_structures, read_masked, to_ras, syntax):
    regions, labels = drawn(images)
    make_structures(tmp_path / "s.dcm", images, regions, syntax=getattr(pydicom.uid, syntax))
    (sample,) = read_masked(tmp_path, ("heart", "lung")).samples
    np.testing.assert_array_equal(sample.mask(), to_ras(labels))
