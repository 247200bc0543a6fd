"""DICOM segmentations, written by highdicom, as label maps of the images they refer to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from fedward.errors import DataError
from fedward_client.data.dataset import DatasetSpec, read_dataset

ROWS, COLUMNS = 10, 12
AXIAL = [1, 0, 0, 0, 1, 0]


def write_ct(folder: Path, make_dicom: Any, count: int = 5, series: str = "1.2.77") -> list[Any]:
    """A CT series in order of position; file names and instance numbers are in another one."""
    values = np.random.default_rng(0).integers(0, 900, (count, ROWS, COLUMNS)).astype(np.int16)
    names = np.random.default_rng(4).permutation(count)
    for k in range(count):
        make_dicom(
            folder / f"{names[k]:03d}.dcm",
            values[k],
            SOPClassUID=pydicom.uid.CTImageStorage,
            SeriesInstanceUID=series,
            StudyInstanceUID="1.2.76",
            FrameOfReferenceUID="1.2.78",
            PixelSpacing=[0.7, 0.9],
            SliceThickness=2.5,
            ImageOrientationPatient=AXIAL,
            ImagePositionPatient=[-20, 15, 40 + 2.5 * k],
            InstanceNumber=int(names[k]) + 1,
            PatientName="",
            PatientBirthDate="",
            PatientSex="",
            StudyID="1",
            StudyDate="20200101",
            StudyTime="101010",
            ReferringPhysicianName="",
            AccessionNumber="",
        )
    files = [pydicom.dcmread(path) for path in folder.glob("*.dcm")]
    return sorted(files, key=lambda file: float(file.ImagePositionPatient[2]))


def write_seg(
    path: Path, images: list[Any], masks: np.ndarray, names: list[str], **more: Any
) -> Any:
    """Masks ``(D, H, W, S)`` as a segmentation with these segment labels."""
    kind = more.pop("kind", hd.seg.SegmentationTypeValues.BINARY)
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
        for number, name in enumerate(names, start=1)
    ]
    seg = hd.seg.Segmentation(
        images, masks, kind, described, hd.UID(), 2, hd.UID(), 1, "m", "m", "1", "1", **more
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)
    return seg


def blobs(count: int = 5, classes: int = 2) -> np.ndarray:
    """Separate masks ``(D, H, W, S)`` without symmetry; slice 1 is empty."""
    masks = np.zeros((count, ROWS, COLUMNS, classes), np.uint8)
    for k in range(count):
        for s in range(classes):
            if k != 1:
                masks[k, 1 + k : 4 + k, 1 + 5 * s : 4 + 5 * s + k % 2, s] = 1
    return masks


def expected_volume(masks: np.ndarray) -> np.ndarray:
    """Independently: axial slices to RAS, where columns run to the left and rows to the back."""
    labels = (masks * np.arange(1, masks.shape[-1] + 1)).max(axis=-1)
    return labels.transpose(2, 1, 0)[::-1, ::-1]


@pytest.fixture
def volume_of(make_plan):
    def find(root: Path, classes: tuple[str, ...] = ("front", "back")) -> Any:
        plan = make_plan("segmentation", size=(8, 8, 8))
        task = plan.task.model_copy(update={"classes": classes})
        return read_dataset(DatasetSpec(root, "dicom"), task)

    return find


def test_a_binary_segmentation_of_a_volume(tmp_path, make_dicom, volume_of):
    images, masks = write_ct(tmp_path / "ct", make_dicom), blobs()
    write_seg(tmp_path / "seg" / "s.dcm", images, masks, ["Front", "BACK"])
    (sample,) = volume_of(tmp_path).samples
    np.testing.assert_array_equal(sample.mask(), expected_volume(masks))
    assert sample.mask().shape == sample.load().pixels.shape[1:]


def test_segments_go_by_label_not_by_number(tmp_path, make_dicom, volume_of):
    images, masks = write_ct(tmp_path / "ct", make_dicom), blobs(classes=3)
    write_seg(tmp_path / "s.dcm", images, masks, ["other", "back", "front"])
    (sample,) = volume_of(tmp_path).samples
    np.testing.assert_array_equal(sample.mask(), expected_volume(masks[..., [2, 1]]))


def test_each_slice_of_a_2d_task_finds_its_own_frame(tmp_path, make_dicom, make_plan):
    images, masks = write_ct(tmp_path / "ct", make_dicom), blobs(classes=1)
    write_seg(tmp_path / "s.dcm", images, masks, ["anything"])
    task = make_plan("segmentation").task.model_copy(update={"classes": ("lung",)})
    dataset = read_dataset(DatasetSpec(tmp_path, "dicom"), task)
    assert len(dataset.samples) == 5
    place = {tuple(image.pixel_array.ravel()): k for k, image in enumerate(images)}
    for sample in dataset.samples:
        k = place[tuple(sample.load().pixels[0].astype(np.int16).ravel())]
        np.testing.assert_array_equal(sample.mask(), masks[k, ..., 0])


def test_a_fractional_segmentation_is_cut_at_half(tmp_path, make_dicom, volume_of):
    images = write_ct(tmp_path / "ct", make_dicom)
    share = np.random.default_rng(1).random((5, ROWS, COLUMNS, 1))
    share[np.abs(share - 0.5) < 0.01] = 0.9
    write_seg(
        tmp_path / "s.dcm",
        images,
        share,
        ["front"],
        kind=hd.seg.SegmentationTypeValues.FRACTIONAL,
        max_fractional_value=200,
    )
    (sample,) = volume_of(tmp_path).samples
    np.testing.assert_array_equal(sample.mask(), expected_volume((share >= 0.5).astype(np.uint8)))


def test_frames_without_a_reference_go_by_place(tmp_path, make_dicom, volume_of):
    images, masks = write_ct(tmp_path / "ct", make_dicom), blobs()
    write_seg(tmp_path / "s.dcm", images, masks, ["front", "back"])
    seg = pydicom.dcmread(tmp_path / "s.dcm")
    for group in seg.PerFrameFunctionalGroupsSequence:
        del group.DerivationImageSequence
    seg.save_as(tmp_path / "s.dcm")
    (sample,) = volume_of(tmp_path).samples
    np.testing.assert_array_equal(sample.mask(), expected_volume(masks))


def test_a_frame_that_lies_elsewhere_than_its_image_is_refused(tmp_path, make_dicom, volume_of):
    images = write_ct(tmp_path / "ct", make_dicom)
    write_seg(tmp_path / "s.dcm", images, blobs(), ["front", "back"])
    seg = pydicom.dcmread(tmp_path / "s.dcm")
    for group in seg.PerFrameFunctionalGroupsSequence:
        group.PlanePositionSequence[0].ImagePositionPatient[0] += 3
    seg.save_as(tmp_path / "s.dcm")
    (sample,) = volume_of(tmp_path).samples
    with pytest.raises(DataError, match="position of mask differs"):
        sample.mask()


def test_two_files_of_one_series_are_laid_together(tmp_path, make_dicom, volume_of):
    images, masks = write_ct(tmp_path / "ct", make_dicom), blobs()
    write_seg(tmp_path / "masks" / "a.dcm", images, masks[..., :1], ["front"])
    write_seg(tmp_path / "masks" / "b.dcm", images, masks[..., 1:], ["back"])
    (sample,) = volume_of(tmp_path).samples
    np.testing.assert_array_equal(sample.mask(), expected_volume(masks))


def test_a_series_without_segmentation_and_a_foreign_one_are_counted(
    tmp_path, make_dicom, volume_of
):
    images = write_ct(tmp_path / "ct", make_dicom)
    write_ct(tmp_path / "other", make_dicom, series="1.2.99")
    write_seg(tmp_path / "a.dcm", images, blobs(), ["front", "back"])
    write_seg(tmp_path / "b.dcm", images, blobs(), ["liver", "spleen"])
    (tmp_path / "c.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:900])
    dataset = volume_of(tmp_path)
    assert len(dataset.samples) == 1
    assert sorted(item.reason for item in dataset.left_out) == [
        "no mask",
        "not readable",
        "unknown class in mask",
    ]


def test_a_leaning_stack_and_its_segmentation_move_together(tmp_path, make_dicom, volume_of):
    images, masks = write_ct(tmp_path / "ct", make_dicom), blobs()
    write_seg(tmp_path / "s.dcm", images, masks, ["front", "back"])
    for file in (*(tmp_path / "ct").glob("*"), tmp_path / "s.dcm"):
        data = pydicom.dcmread(file)
        places = (
            [data]
            if "ImagePositionPatient" in data
            else [group.PlanePositionSequence[0] for group in data.PerFrameFunctionalGroupsSequence]
        )
        for place in places:
            height = (float(place.ImagePositionPatient[2]) - 40) / 2.5
            place.ImagePositionPatient[1] = 15 + 0.7 * height
        data.save_as(file)
    (sample,) = volume_of(tmp_path).samples
    assert sample.load().tilt > 0
    moved = np.zeros_like(masks)  # one row a slice, about the middle one
    for k in range(5):
        by = k - 2
        rows = np.arange(ROWS)
        inside = (rows - by >= 0) & (rows - by < ROWS)
        moved[k, rows[inside]] = masks[k, rows[inside] - by]
    np.testing.assert_array_equal(sample.mask(), expected_volume(moved))


def test_a_segmentation_is_resampled_as_its_uneven_slices_are(tmp_path, make_dicom, volume_of):
    heights = [0, 1, 2, 5, 9]
    images, masks = write_ct(tmp_path / "ct", make_dicom), blobs()
    write_seg(tmp_path / "s.dcm", images, masks, ["front", "back"])
    for file in (*(tmp_path / "ct").glob("*"), tmp_path / "s.dcm"):
        data = pydicom.dcmread(file)
        groups = data.get("PerFrameFunctionalGroupsSequence")
        for place in [group.PlanePositionSequence[0] for group in groups] if groups else [data]:
            k = round((float(place.ImagePositionPatient[2]) - 40) / 2.5)
            place.ImagePositionPatient[2] = 40 + heights[k]
        data.save_as(file)
    (sample,) = volume_of(tmp_path).samples
    nearest = [0, 1, 2, 2, 3, 3, 3, 3, 4, 4]  # of 0 to 9 mm; the middle (7) falls to the lower one
    np.testing.assert_array_equal(sample.mask(), expected_volume(masks[nearest]))
    assert sample.load().pixels.shape[1:] == sample.mask().shape


# --- wrong places and cut pixels: never an empty or made-up mask --------------------------------


def change(path: Path, edit: Any) -> None:
    """Edit the segmentation, and each of its frames."""
    seg = pydicom.dcmread(path)
    for group in seg.PerFrameFunctionalGroupsSequence:
        edit(seg, group)
    seg.save_as(path)


def without_reference(_: Any, group: Any) -> None:
    del group.DerivationImageSequence


def shift(axis: int, by: float) -> Any:
    def edit(seg: Any, group: Any) -> None:
        without_reference(seg, group)
        group.PlanePositionSequence[0].ImagePositionPatient[axis] += by

    return edit


def flip(seg: Any, group: Any) -> None:
    without_reference(seg, group)
    shared = seg.SharedFunctionalGroupsSequence[0]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, -1, 0]


def double(seg: Any, _: Any) -> None:
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1.4, 1.8]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(
    "edit", [shift(0, 300), shift(2, 300), flip, double], ids=["aside", "above", "flip", "spacing"]
)
def test_frames_in_another_place_are_refused(tmp_path, make_dicom, make_plan, edit, dimensions):
    images = write_ct(tmp_path / "ct", make_dicom)
    write_seg(tmp_path / "s.dcm", images, blobs(), ["front", "back"])
    change(tmp_path / "s.dcm", edit)
    plan = make_plan("segmentation", size=(8,) * dimensions)
    task = plan.task.model_copy(update={"classes": ("front", "back"), "dimensions": dimensions})
    dataset = read_dataset(DatasetSpec(tmp_path, "dicom"), task)
    assert dataset.samples
    for sample in dataset.samples:
        with pytest.raises(DataError, match="position of mask differs"):
            sample.mask()


def test_a_reference_to_images_that_are_not_here_gives_way_to_the_place(
    tmp_path, make_dicom, volume_of
):
    images, masks = write_ct(tmp_path / "ct", make_dicom), blobs()
    write_seg(tmp_path / "s.dcm", images, masks, ["front", "back"])

    def rename(_: Any, group: Any) -> None:
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        source.ReferencedSOPInstanceUID = pydicom.uid.generate_uid()

    change(tmp_path / "s.dcm", rename)
    (sample,) = volume_of(tmp_path).samples
    np.testing.assert_array_equal(sample.mask(), expected_volume(masks))


@pytest.mark.parametrize("cut", [1, 60])
def test_cut_pixels_are_not_made_up(tmp_path, make_dicom, volume_of, cut):
    images = write_ct(tmp_path / "ct", make_dicom)
    write_seg(tmp_path / "s.dcm", images, blobs(), ["front", "back"])
    whole = pydicom.dcmread(tmp_path / "s.dcm")
    whole.PixelData = whole.PixelData[: -2 * cut]
    whole.save_as(tmp_path / "s.dcm")
    (sample,) = volume_of(tmp_path).samples
    with pytest.raises(DataError, match="not readable"):
        sample.mask()
    raw = (tmp_path / "s.dcm").read_bytes()
    (tmp_path / "s.dcm").write_bytes(raw[: -2 * cut])
    (sample,) = volume_of(tmp_path).samples
    with pytest.raises(DataError, match="not readable"):
        sample.mask()


def test_masks_of_several_readers_are_not_merged_without_a_word(
    tmp_path, make_ct, make_seg, read_masked
):
    images = make_ct(tmp_path / "ct")
    shape = (len(images), *images[0].pixel_array.shape)
    drawn = {}
    for reader, row in (("SMITH^A", 2), ("Doe^B", 5)):
        mask = np.zeros(shape, np.uint8)
        mask[1:3, row : row + 2, 3:6] = 1
        drawn[reader] = int(mask.sum())
        for part in (0, 1):  # each has two lesions in files of their own
            moved = np.roll(mask, 5 * part, axis=2)
            path = tmp_path / f"{row}{part}.dcm"
            make_seg(path, images, moved, ["lesion"], content_creator_name=reader)
    with pytest.raises(DataError, match="masks of several readers: 1"):
        read_masked(tmp_path, ("lesion",))
    (sample,) = read_masked(tmp_path, ("lesion",), several="merge").samples
    assert sample.mask().sum() == 2 * sum(drawn.values())
    found = read_masked(tmp_path, ("lesion",), readers=("smith*",))
    assert found.samples[0].mask().sum() == 2 * drawn["SMITH^A"]
    assert [item.reason for item in found.left_out] == ["not selected"] * 2
