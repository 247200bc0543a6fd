"""Segmentations that name no series, are label maps, or lie on another grid than their images."""

from __future__ import annotations

import time

import highdicom as hd
import numpy as np
import pydicom
import pytest

from fedward.errors import ConfigError, DataError
from fedward_client.data.options import MaskOptions
from fedward_client.data.readers.dicom import masks
from fedward_client.data.readers.dicom.pixels import Place
from fedward_client.data.readers.dicom.series import Slices

ROWS, COLUMNS, COUNT = 10, 12, 5
LABELMAP = hd.seg.SegmentationTypeValues.LABELMAP


@pytest.fixture
def images(tmp_path, make_ct):
    return make_ct(tmp_path / "ct")


def blocks() -> np.ndarray:
    """A label map ``(D, H, W)`` without symmetry; slice 1 is empty."""
    labels = np.zeros((COUNT, ROWS, COLUMNS), np.uint8)
    for k in (0, 2, 3, 4):
        labels[k, 1 + k : 4 + k, 1:4] = 1
        labels[k, 1 + k : 4 + k, 6 : 9 + k % 2] = 2
    return labels


def parts(labels: np.ndarray) -> np.ndarray:
    """One mask for each number: ``(D, H, W, S)``."""
    return np.stack([labels == k for k in range(1, labels.max() + 1)], -1).astype(np.uint8)


def edit(path, change) -> None:
    seg = pydicom.dcmread(path)
    change(seg)
    seg.save_as(path)


def unnamed(seg) -> None:
    for group in seg.PerFrameFunctionalGroupsSequence:
        del group.DerivationImageSequence


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_label_map(tmp_path, images, make_seg, read_masked, to_ras, dimensions):
    labels = blocks()
    make_seg(tmp_path / "s.dcm", images, labels, ["Back", "FRONT"], kind=LABELMAP)
    samples = read_masked(tmp_path, ("front", "back"), dimensions).samples
    wanted = np.array([0, 2, 1], np.uint8)[labels]
    if dimensions == 3:
        np.testing.assert_array_equal(samples[0].mask(), to_ras(wanted))
        return
    place = {image.pixel_array.tobytes(): k for k, image in enumerate(images)}
    for sample in samples:
        k = place[sample.load().pixels[0].astype(np.int16).tobytes()]
        np.testing.assert_array_equal(sample.mask(), wanted[k])


def test_a_label_map_with_a_value_that_it_does_not_describe(
    tmp_path, images, make_seg, read_masked
):
    make_seg(tmp_path / "s.dcm", images, blocks(), ["front", "back"], kind=LABELMAP)
    edit(tmp_path / "s.dcm", lambda seg: seg.SegmentSequence.pop(1))
    (sample,) = read_masked(tmp_path, ("front", "back")).samples
    with pytest.raises(DataError, match="unknown class in mask"):
        sample.mask()


@pytest.mark.parametrize("how", ["by image", "by frame of reference"])
def test_without_the_series(tmp_path, images, make_seg, read_masked, to_ras, how):
    labels = blocks()
    make_seg(tmp_path / "s.dcm", images, parts(labels), ["front", "back"])

    def change(seg):
        del seg.ReferencedSeriesSequence
        if how != "by image":
            unnamed(seg)

    edit(tmp_path / "s.dcm", change)
    dataset = read_masked(tmp_path, ("front", "back"))
    (sample,) = dataset.samples
    np.testing.assert_array_equal(sample.mask(), to_ras(labels))
    if how != "by image":  # the frame of reference alone is of that patient
        edit(tmp_path / "s.dcm", lambda seg: setattr(seg, "PatientID", "OTHER"))
        with pytest.raises(DataError, match="no image: 1, no mask: 1"):
            read_masked(tmp_path, ("front", "back"))


# --- another grid -----------------------------------------------------------------------------


def regrid(path, images, make_seg, labels, spacing, start, step=2.5, **more) -> None:
    """A label map on a grid of its own, ``(D, H, W)``."""
    count = len(labels)
    make_seg(
        path,
        [images[0]],
        parts(labels),
        ["front", "back"][: labels.max()],
        pixel_measures=hd.PixelMeasuresSequence(spacing, step, spacing_between_slices=step),
        plane_positions=[
            hd.PlanePositionSequence("PATIENT", [start[0], start[1], start[2] + step * k])
            for k in range(count)
        ],
        plane_orientation=hd.PlaneOrientationSequence("PATIENT", [1, 0, 0, 0, 1, 0]),
        **more,
    )
    edit(path, lambda seg: seg.pop("ReferencedSeriesSequence", None))


def nearest(labels, spacing, start, step) -> np.ndarray:
    """Independently, voxel by voxel: the nearest one of another grid to each pixel."""
    wanted = np.zeros((COUNT, ROWS, COLUMNS), np.uint8)
    for k, r, c in np.ndindex(wanted.shape):
        point = np.array([40 + 2.5 * k, 15 + 0.7 * r, -20 + 0.9 * c])
        index = (point - start[::-1]) / [step, *spacing]
        at = tuple(int(np.floor(v + 0.5)) for v in index)
        if all(0 <= v < size for v, size in zip(at, labels.shape, strict=True)):
            wanted[k, r, c] = labels[at]
    return wanted


GRIDS = {
    "finer": ((0.31, 0.43), (-20.2, 14.9, 39.4), 1.1, (11, 22, 26)),
    "coarser": ((1.3, 1.7), (-20.1, 15.2, 39.7), 3.1, (4, 6, 7)),
    "a part": ((0.7, 0.9), (-16.1, 17.3, 42.4), 2.4, (3, 4, 5)),
}


@pytest.mark.parametrize("case", GRIDS)
def test_another_grid(tmp_path, images, make_seg, read_masked, to_ras, case):
    spacing, start, step, shape = GRIDS[case]
    labels = np.zeros(shape, np.uint8)
    rng = np.random.default_rng(1)
    inner = tuple(slice(1, -1) for _ in shape) if case != "a part" else (slice(None),) * 3
    labels[inner] = rng.integers(0, 3, labels[inner].shape)
    labels[0, 1, 1] = 1
    regrid(tmp_path / "s.dcm", images, make_seg, labels, spacing, start, step)
    edit(tmp_path / "s.dcm", unnamed)
    (sample,) = read_masked(tmp_path, ("front", "back")).samples
    wanted = nearest(labels, spacing, start, step)
    assert wanted.any()
    np.testing.assert_array_equal(sample.mask(), to_ras(wanted))


def test_a_grid_with_other_axes(tmp_path, images, make_seg, read_masked, to_ras):
    # Sagittal planes of voxels of the very places of the images' own.
    labels = blocks()
    sagittal = labels.transpose(2, 0, 1)[:, ::-1]  # columns; slices downwards; rows to the back
    make_seg(
        tmp_path / "s.dcm",
        [images[0]],
        parts(sagittal),
        ["front", "back"],
        pixel_measures=hd.PixelMeasuresSequence((2.5, 0.7), 0.9, spacing_between_slices=0.9),
        plane_positions=[
            hd.PlanePositionSequence("PATIENT", [-20 + 0.9 * c, 15, 50]) for c in range(COLUMNS)
        ],
        plane_orientation=hd.PlaneOrientationSequence("PATIENT", [0, 1, 0, 0, 0, -1]),
    )
    edit(tmp_path / "s.dcm", unnamed)
    (sample,) = read_masked(tmp_path, ("front", "back")).samples
    np.testing.assert_array_equal(sample.mask(), to_ras(labels))


def test_another_grid_needs_the_same_frame_of_reference(tmp_path, images, make_seg, read_masked):
    labels = np.ones((3, 4, 5), np.uint8)
    regrid(tmp_path / "s.dcm", images, make_seg, labels, (0.9, 0.9), (-16, 17, 42))

    def change(seg):
        unnamed(seg)
        seg.FrameOfReferenceUID = "1.2.99"
        item = pydicom.Dataset()
        item.SeriesInstanceUID = "1.2.77"
        seg.ReferencedSeriesSequence = [item]

    edit(tmp_path / "s.dcm", change)
    (sample,) = read_masked(tmp_path, ("front",)).samples
    with pytest.raises(DataError, match="position of mask differs"):
        sample.mask()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_frame_between_slices_is_refused(tmp_path, images, make_seg, read_masked, dimensions):
    make_seg(tmp_path / "s.dcm", images, parts(blocks()), ["front", "back"])

    def change(seg):
        unnamed(seg)
        place = seg.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence[0]
        place.ImagePositionPatient[2] += 1.25

    edit(tmp_path / "s.dcm", change)
    for sample in read_masked(tmp_path, ("front", "back"), dimensions).samples:
        with pytest.raises(DataError, match="position of mask differs"):
            sample.mask()


def test_a_frame_that_names_an_image_and_lies_a_pixel_beside_it_is_refused(
    tmp_path, images, make_seg, read_masked
):
    labels = np.zeros((COUNT, ROWS, COLUMNS), np.uint8)
    labels[:, 4:6, 4:6] = 1  # far from every border: no mark is lost by the shift
    make_seg(tmp_path / "s.dcm", images, parts(labels), ["front"])

    def shift(seg):
        for group in seg.PerFrameFunctionalGroupsSequence:
            group.PlanePositionSequence[0].ImagePositionPatient[0] += 0.9

    edit(tmp_path / "s.dcm", shift)
    (sample,) = read_masked(tmp_path, ("front",)).samples
    with pytest.raises(DataError, match="position of mask differs"):
        sample.mask()


# --- what segments mean -----------------------------------------------------------------------


def test_segments_by_label_number_and_background(tmp_path, images, make_seg, read_masked, to_ras):
    labels = blocks()
    make_seg(tmp_path / "s.dcm", images, parts(labels), ["L1", "Zweites"])
    (sample,) = read_masked(
        tmp_path, ("front", "back"), segments={" l1": "Back", "2": "front"}
    ).samples
    np.testing.assert_array_equal(sample.mask(), to_ras(np.array([0, 2, 1], np.uint8)[labels]))
    (sample,) = read_masked(tmp_path, ("lung",), background=("zweites",)).samples
    np.testing.assert_array_equal(sample.mask(), to_ras((labels == 1).astype(np.uint8)))


@pytest.mark.parametrize("threshold", [0.1, 0.7, 1.0])
def test_the_threshold_of_a_fractional_segment(
    tmp_path, images, make_seg, read_masked, to_ras, threshold
):
    share = np.random.default_rng(1).integers(0, 201, (COUNT, ROWS, COLUMNS, 1)) / 200
    share[0, 0, 0] = 1.0
    share[np.abs(share - threshold) < 0.003] = threshold
    make_seg(
        tmp_path / "s.dcm",
        images,
        share,
        ["front"],
        kind=hd.seg.SegmentationTypeValues.FRACTIONAL,
        max_fractional_value=200,
    )
    (sample,) = read_masked(tmp_path, ("front",), threshold=threshold).samples
    wanted = (np.round(share[..., 0] * 200) >= round(threshold * 200)).astype(np.uint8)
    np.testing.assert_array_equal(sample.mask(), to_ras(wanted))


def test_options_by_themselves():
    found = [(1, "Background"), (2, "Tumor core"), (3, "liver")]
    assert MaskOptions().labels(found[:2], ["lesion"]) == ((2, 1),)
    assert MaskOptions().labels(found, ["spleen", "liver"]) == ((3, 2),)
    assert MaskOptions({"2": "liver"}).labels(found, ["liver"]) == ((2, 1), (3, 1))
    with pytest.raises(DataError, match="unknown class in mask"):
        MaskOptions().labels(found, ["lesion"])
    with pytest.raises(DataError, match="unknown class in mask"):
        MaskOptions({"x": "lesion"}).labels(found[:2], ["lesion"])
    with pytest.raises(ConfigError, match="class of the task"):
        MaskOptions({"x": "lesion"}).labels(found, ["liver"])


# --- many slices -------------------------------------------------------------------------------


def test_slices_are_found_as_one_by_one():
    rng = np.random.default_rng(0)
    axial, sagittal = np.array([[1.0, 0, 0], [0, 1, 0]]), np.array([[0, 1.0, 0], [0, 0, -1]])
    places = [
        Place((4, 4), (1, 1), rng.uniform(-9, 9, 3) * [1, 1, 0] + [0, 0, 2.0 * k], axial, f"a{k}")
        for k in rng.permutation(30)
    ] + [Place((4, 4), (1, 1), np.array([3.0 * k, 0, 0]), sagittal, f"s{k}") for k in range(7)]
    slices = Slices(places, [(None, 0)] * len(places))
    for point in rng.uniform(-5, 65, (300, 3)):
        for way, first, last, step in (([0, 0, 1.0], 0, 30, 2), ([-1.0, 0, 0], 30, 37, 3)):
            away = [abs((p.position - point) @ way) for p in places[first:last]]
            wanted = {first + k for k, one in enumerate(away) if one < 0.25 * step}
            found = slices.at(point, np.array(way))
            assert set(found.numbers) == wanted
            assert found.beside == (not wanted and min(away) < 0.75 * step)


def test_a_series_is_looked_at_once(tmp_path, images, make_seg, read_masked, monkeypatch):
    make_seg(tmp_path / "s.dcm", images, parts(blocks()), ["front", "back"])
    samples = read_masked(tmp_path, ("front", "back"), 2).samples
    asked: list = []
    real = masks.read_place
    monkeypatch.setattr(masks, "read_place", lambda *one: asked.append(one) or real(*one))
    for sample in samples:
        sample.mask()
        sample.mask.identity()
    assert len(asked) == COUNT


def test_a_thousand_slices_take_no_square_of_time():
    axial = np.array([[1.0, 0, 0], [0, 1, 0]])
    count = 20_000
    places = [Place((4, 4), (1, 1), np.array([0, 0, 2.0 * k]), axial, str(k)) for k in range(count)]
    slices, began = Slices(places, [(None, 0)] * count), time.monotonic()
    found = [slices.at(place.position, np.array([0, 0, 1.0])).numbers for place in places]
    assert found == [(k,) for k in range(count)]
    assert time.monotonic() - began < 10
