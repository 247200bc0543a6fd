"""Each kind of source: what is taken, what is left out and why."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from fedward.errors import DataError
from fedward_client.data.dataset import DatasetSpec, detect, read_dataset
from fedward_client.data.files import table_keys
from fedward_client.data.readers.images import Picture, PictureMask
from fedward_client.data.readers.nifti import NiftiImage

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def picture(path, values=GREY, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(values, mode=mode).save(path) if mode else Pillow.fromarray(values).save(path)
    return path


def reasons(dataset):
    return Counter(item.reason for item in dataset.left_out)


# --- npz ---------------------------------------------------------------------------------------


def archive(path, **arrays):
    np.savez(path, **arrays)
    return path


def images(n, shape=(5, 4), dtype=np.uint8):
    return np.arange(n * np.prod(shape)).reshape(n, *shape).astype(dtype)


def test_medmnist_archive(tmp_path, make_plan):
    path = archive(
        tmp_path / "a.npz",
        train_images=images(4),
        train_labels=np.array([[0], [1], [1], [7]]),
        val_images=images(2),
        val_labels=np.array([0, 1]),
        test_images=images(1),
        test_labels=np.array([[1.0]]),
    )
    dataset = read_dataset(DatasetSpec(path), make_plan().task)
    assert [s.label for s in dataset.samples] == [(0,), (1,), (1,), (0,), (1,), (1,)]
    parts = [s.split for s in dataset.samples]
    assert parts == ["train"] * 3 + ["validation"] * 2 + ["test"]
    assert len({s.patient for s in dataset.samples}) == 6
    assert reasons(dataset) == {"unknown class": 1}
    image = dataset.samples[1].load()
    np.testing.assert_array_equal(image.pixels, images(4)[1][None])
    assert image.window == (0.0, 255.0)


def test_plain_archive_with_patients_colour_and_synthetic_mark(tmp_path, make_plan):
    stored = images(3, (5, 4, 3))
    archive(
        tmp_path / "a.npz",
        images=stored,
        labels=[0, 1, 0],
        patients=np.array(["x", "x", "y"]),
        synthetic=True,
    )
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert [s.patient for s in dataset.samples] == ["x", "x", "y"]
    assert dataset.samples[0].columns["synthetic"] == "yes"
    np.testing.assert_array_equal(dataset.samples[2].load().pixels, stored[2].transpose(2, 0, 1))


def test_archive_of_volumes_with_masks(tmp_path, make_plan):
    masks = images(2, (3, 4, 5)) % 3
    path = archive(tmp_path / "a.npz", images=images(2, (3, 4, 5)), masks=masks.astype(float))
    plan = make_plan("segmentation", ["a", "b"], (8, 8, 8))
    sample = read_dataset(DatasetSpec(path), plan.task).samples[1]
    assert sample.load().pixels.shape == (1, 3, 4, 5)
    np.testing.assert_array_equal(sample.mask(), masks[1])


def test_archive_labels_as_flags(tmp_path, make_plan):
    flags = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [2, 0]])
    path = archive(tmp_path / "a.npz", images=images(5), labels=flags)
    one = read_dataset(DatasetSpec(path), make_plan().task)
    assert [s.label for s in one.samples] == [(0,), (1,)]
    assert reasons(one) == {"conflicting labels": 1, "no label": 1, "unknown class": 1}
    many = read_dataset(DatasetSpec(path), make_plan(task={"multi_label": True}).task)
    assert [s.label for s in many.samples] == [(1, 0), (0, 1), (1, 1), (0, 0)]


@pytest.mark.parametrize(
    ("arrays", "rule"),
    [
        ({"labels": np.zeros(3)}, "must have images"),
        ({"images": images(3), "labels": np.zeros(2)}, "one entry per image"),
        ({"images": images(3, (4, 4, 4)), "labels": np.zeros(3)}, "2D task"),
        ({"images": images(3), "labels": np.array([{}, 1, 2], object)}, "plain arrays"),
    ],
)
def test_broken_archives(tmp_path, make_plan, arrays, rule):
    path = archive(tmp_path / "smith.npz", **arrays)
    with pytest.raises(DataError, match=rule) as caught:
        read_dataset(DatasetSpec(path), make_plan().task)
    assert "smith" not in str(caught.value)


def test_truncated_archive(tmp_path, make_plan):
    path = archive(tmp_path / "smith.npz", images=images(3), labels=np.zeros(3))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="readable archive"):
        read_dataset(DatasetSpec(path), make_plan().task)


# --- pictures ----------------------------------------------------------------------------------


def test_class_folders_by_name_or_number(tmp_path, make_plan):
    for folder in ("NORMAL", "1", "other"):
        picture(tmp_path / folder / "a.png")
    picture(tmp_path / "loose.png")
    (tmp_path / "NORMAL" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "NORMAL" / "notes.txt").write_text("not an image")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert [s.label for s in dataset.samples] == [(1,), (0,)]
    assert len({s.patient for s in dataset.samples}) == 2
    assert reasons(dataset) == {"unknown class": 1, "no label": 1}


def test_class_folders_below_parts(tmp_path, make_plan):
    for part, name in [("train", "normal"), ("val", "sick"), ("test", "sick")]:
        picture(tmp_path / part / name / "a.png")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert {s.split: s.label for s in dataset.samples} == {
        "train": (0,),
        "validation": (1,),
        "test": (1,),
    }


def test_label_table(tmp_path, make_plan):
    for name in ("a.png", "b.jpg", "deep/c.tif", "d.bmp", "e.png", "f.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.csv").write_text(
        "\ufeffImage;Label;Patient;Scanner;split\n"
        "a.png;normal;p1;X;train\nb;1;p1;Y;\ndeep/c.tif;SICK;p2;X;test\n"
        "d.bmp;maybe;p3;X;\ne.png;0;p4;X;\ne.png;1;p4;X;\nghost.png;0;p5;X;\n",
        "utf-8",
    )
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    found = [(s.patient, s.label, s.split, s.columns["Scanner"]) for s in dataset.samples]
    assert found == [
        ("p1", (0,), "train", "X"),
        ("p1", (1,), None, "Y"),
        ("p2", (1,), "test", "X"),
    ]
    assert reasons(dataset) == {
        "unknown class": 1,
        "conflicting labels": 1,
        "no label": 1,
        "no image": 1,
    }


def test_label_table_with_a_column_per_class(tmp_path, make_plan):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    rows = "file,normal,sick\na,1,0\nb,0,1.0\nc,1,1\nd,,1\n"
    (tmp_path / "labels.csv").write_text(rows)
    one = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert [s.label for s in one.samples] == [(0,), (1,)]
    assert reasons(one) == {"conflicting labels": 1, "no label": 1}
    many = read_dataset(DatasetSpec(tmp_path), make_plan(task={"multi_label": True}).task)
    assert [s.label for s in many.samples] == [(1, 0), (0, 1), (1, 1)]


def test_several_classes_in_one_cell(tmp_path, make_plan):
    picture(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na,sick|Normal\n")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan(task={"multi_label": True}).task)
    assert dataset.samples[0].label == (1, 1)


def test_a_bare_name_never_labels_two_files(tmp_path, make_plan):
    for folder in ("x", "y"):
        picture(tmp_path / folder / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,1\nb.png,0\n")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan().task)
    assert [s.label for s in dataset.samples] == [(0,)]
    assert reasons(dataset) == {"no label": 2, "no image": 1}


def test_pairs_by_stem_with_patients(tmp_path, make_plan):
    for name in ("a.jpg", "b.png", "c.png"):
        picture(tmp_path / "images" / name)
    for name in ("a.png", "b.png", "z.png"):
        picture(tmp_path / "masks" / name, (GREY > 100).astype(np.uint8) * 255)
    (tmp_path / "patients.csv").write_text("image,patient\na,p1\n")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan("segmentation").task)
    assert [s.patient for s in dataset.samples] == ["p1"]
    np.testing.assert_array_equal(dataset.samples[0].mask(), (GREY > 100) * 255)
    assert reasons(dataset) == {"no mask": 1, "no patient id": 1, "no image": 1}


def test_two_masks_for_one_image(tmp_path, make_plan):
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "b.png")
    for name in ("a.png", "a.bmp", "b.png"):
        picture(tmp_path / "masks" / name, GREY // 255)
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan("segmentation").task)
    assert len(dataset.samples) == 1
    assert reasons(dataset) == {"duplicate": 1}


RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (6, 8, 1), dtype=np.uint8)


@pytest.mark.parametrize(
    ("values", "suffix", "expected", "window"),
    [
        (GREY, "png", GREY[None], (0.0, 255.0)),
        (GREY, "bmp", GREY[None], (0.0, 255.0)),
        (GREY, "tif", GREY[None], (0.0, 255.0)),
        (RGB, "png", RGB.transpose(2, 0, 1), (0.0, 255.0)),
        (np.dstack([RGB, ALPHA]), "png", RGB.transpose(2, 0, 1), (0.0, 255.0)),
        (np.dstack([GREY, ALPHA[..., 0]]), "png", GREY[None], (0.0, 255.0)),
        (GREY.astype(np.uint16) * 250, "png", GREY[None] * 250.0, None),
        (GREY.astype(np.uint16) * 250, "tif", GREY[None] * 250.0, None),
        (GREY.astype(np.float32) / 7, "tif", GREY[None].astype(np.float32) / 7, None),
        (GREY > 99, "png", (GREY > 99)[None] * 255.0, (0.0, 255.0)),
    ],
)
def test_modes_of_pictures(tmp_path, values, suffix, expected, window):
    image = Picture(picture(tmp_path / f"a.{suffix}", values))()
    np.testing.assert_array_equal(image.pixels, expected)
    assert image.window == window
    assert image.pixels.dtype == np.float32


def test_palette_pictures_and_palette_masks(tmp_path):
    indices = GREY // 60
    colours = np.array([[9, 8, 7], [200, 10, 20], [3, 250, 9], [1, 1, 255], [77, 66, 55]], np.uint8)
    image = Pillow.fromarray(indices, mode="P")
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        Picture(tmp_path / "a.png")().pixels, colours[indices].transpose(2, 0, 1)
    )
    np.testing.assert_array_equal(PictureMask(tmp_path / "a.png")(), indices)


def test_masks_in_colour_in_16_bits_and_from_lossy_files(tmp_path):
    labels = GREY // 100
    same = picture(tmp_path / "grey.png", np.dstack([labels] * 3))
    np.testing.assert_array_equal(PictureMask(same)(), labels)
    deep = picture(tmp_path / "deep.png", labels.astype(np.uint16))
    np.testing.assert_array_equal(PictureMask(deep)(), labels)
    block = np.zeros((32, 32), np.uint8)
    block[8:24, 8:24] = 255
    lossy = picture(tmp_path / "lossy.jpg", block)
    assert set(np.unique(PictureMask(lossy)())) == {0, 255}
    for bad in (np.dstack([labels, labels, GREY]), labels.astype(np.uint16) + 300):
        with pytest.raises(DataError, match="unknown class in mask"):
            PictureMask(picture(tmp_path / "bad.png", bad))()


def test_turned_photograph_is_set_upright(tmp_path):
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Pillow.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(Picture(tmp_path / "a.png")().pixels[0], np.rot90(GREY, -1))


def test_broken_picture_says_nothing_but_its_reason(tmp_path):
    path = tmp_path / "SMITH.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError) as caught:
        Picture(path)()
    assert caught.value.rule == "not readable"
    assert "SMITH" not in str(caught.value)


# --- NIfTI -------------------------------------------------------------------------------------


def nifti(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def test_volumes_are_turned_to_ras_with_their_spacing(tmp_path, make_plan):
    ras = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    labels = (ras > 0).astype(np.int16) + (ras > 1)
    nifti(tmp_path / "images" / "a.nii.gz", ras, np.diag([1.0, 2, 3, 1]))
    nifti(tmp_path / "labels" / "a.nii.gz", labels, np.diag([1.0, 2, 3, 1]))
    # The same voxels stored as superior, left, posterior.
    affine = np.array([[0, -1, 0, 3], [0, 0, -2, 8], [3, 0, 0, 0], [0, 0, 0, 1]], float)
    slp = ras.transpose(2, 0, 1)[:, ::-1, ::-1]
    nifti(tmp_path / "images" / "b.nii", slp, affine)
    nifti(tmp_path / "labels" / "b.nii.gz", labels.transpose(2, 0, 1)[:, ::-1, ::-1], affine)
    plan = make_plan("segmentation", ["a", "b"], (8, 8, 8))
    dataset = read_dataset(DatasetSpec(tmp_path), plan.task)
    assert len(dataset.samples) == 2
    for sample in dataset.samples:
        image = sample.load()
        np.testing.assert_array_equal(image.pixels[0], ras)
        assert image.spacing == pytest.approx((1, 2, 3))
        np.testing.assert_array_equal(sample.mask(), labels)


def test_a_slice_is_shown_as_dicom_stores_it(tmp_path, make_plan):
    rows_to_back_columns_to_left = GREY.astype(np.float32)
    ras = rows_to_back_columns_to_left[::-1, ::-1].T[..., None]
    nifti(tmp_path / "images" / "a.nii", ras, np.diag([0.5, 0.25, 4, 1]))
    nifti(tmp_path / "masks" / "a.nii", (ras > 50).astype(np.uint8), np.diag([0.5, 0.25, 4, 1]))
    sample = read_dataset(DatasetSpec(tmp_path), make_plan("segmentation").task).samples[0]
    np.testing.assert_array_equal(sample.load().pixels[0], GREY)
    assert sample.load().spacing == (0.25, 0.5)
    np.testing.assert_array_equal(sample.mask(), GREY > 50)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"affine": np.diag([1.0, 1, 1, 1]) + np.eye(4, k=3) * 5}, "position of mask differs"),
        ({"values": np.zeros((4, 4, 5), np.uint8)}, "shape of mask differs"),
        ({"values": np.full((4, 4, 4), 0.5, np.float32)}, "unknown class in mask"),
        ({"values": np.full((4, 4, 4), -1, np.int16)}, "unknown class in mask"),
    ],
)
def test_masks_that_do_not_fit(tmp_path, make_plan, change, reason):
    nifti(tmp_path / "images" / "a.nii", np.zeros((4, 4, 4), np.float32))
    nifti(tmp_path / "labels" / "a.nii", **{"values": np.zeros((4, 4, 4), np.uint8), **change})
    plan = make_plan("segmentation", ["a"], (8, 8, 8))
    sample = read_dataset(DatasetSpec(tmp_path), plan.task).samples[0]
    with pytest.raises(DataError) as caught:
        sample.mask()
    assert caught.value.rule == reason


def test_volumes_with_labels(tmp_path, make_plan):
    for name in "ab":
        nifti(tmp_path / "images" / f"{name}.nii.gz", np.zeros((4, 4, 4), np.float32))
    (tmp_path / "labels.csv").write_text("image,label,patient\na,sick,p\nb.nii.gz,normal,p\n")
    dataset = read_dataset(DatasetSpec(tmp_path), make_plan(size=(8, 8, 8)).task)
    assert [(s.label, s.patient) for s in dataset.samples] == [((1,), "p"), ((0,), "p")]


def test_wrong_number_of_axes(tmp_path, make_plan):
    nifti(tmp_path / "images" / "a.nii", np.zeros((4, 4, 4), np.float32))
    (tmp_path / "labels.csv").write_text("image,label\na,sick\n")
    sample = read_dataset(DatasetSpec(tmp_path), make_plan().task).samples[0]
    with pytest.raises(DataError, match="shape does not fit the task"):
        sample.load()


# --- finding out, sites ------------------------------------------------------------------------


def test_formats_are_told_apart(tmp_path, make_dicom):
    (tmp_path / "n").mkdir()
    archive(tmp_path / "n" / "a.npz")
    picture(tmp_path / "p" / "x" / "a.PNG")
    nifti(tmp_path / "v" / "images" / "a.nii.gz", np.zeros((2, 2, 2), np.float32))
    make_dicom(tmp_path / "d" / "images" / "IM0001", GREY)
    picture(tmp_path / "d" / "masks" / "IM0001.png")
    found = [detect(tmp_path / name) for name in "npvd"]
    assert found == ["npz", "folders", "nifti", "dicom"]


def test_unclear_formats_are_refused(tmp_path, make_dicom, make_plan):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file of a known kind"):
        detect(tmp_path / "empty")
    picture(tmp_path / "both" / "a.png")
    make_dicom(tmp_path / "both" / "b", GREY)
    with pytest.raises(DataError, match="signs of folders, dicom"):
        detect(tmp_path / "both")
    with pytest.raises(DataError, match="must exist"):
        read_dataset(DatasetSpec(tmp_path / "missing"), make_plan().task)


def test_sites_are_sub_folders_whose_patients_never_mix(tmp_path, make_plan):
    for site in ("north", "south"):
        for name in ("a", "b"):
            picture(tmp_path / site / f"{name}.png")
        (tmp_path / site / "labels.csv").write_text("file,label,patient\na,0,P1\nb,9,P2\n")
    dataset = read_dataset(DatasetSpec(tmp_path, sites="folders"), make_plan().task)
    assert [s.site for s in dataset.samples] == ["north", "south"]
    assert len({s.patient for s in dataset.samples}) == 2
    assert [item.name for item in dataset.left_out] == ["north/b.png", "south/b.png"]


def test_a_sub_folder_without_data_is_named_by_number(tmp_path, make_plan):
    picture(tmp_path / "a" / "normal" / "x.png")
    (tmp_path / "SMITH").mkdir()
    with pytest.raises(DataError, match=r"sub-folder 1 of 2") as caught:
        read_dataset(DatasetSpec(tmp_path, sites="folders"), make_plan().task)
    assert "SMITH" not in str(caught.value)


def test_nothing_usable_counts_the_reasons(tmp_path, make_plan):
    for name in ("x", "y", "z"):
        picture(tmp_path / "unheard" / f"{name}.png")
    with pytest.raises(DataError, match="unknown class: 3"):
        read_dataset(DatasetSpec(tmp_path), make_plan().task)


def test_samples_are_picklable_and_know_what_they_are(tmp_path, make_plan, make_dicom):
    picture(tmp_path / "f" / "normal" / "a.png")
    archive(tmp_path / "a.npz", images=images(2), labels=[0, 1])
    make_dicom(tmp_path / "d" / "a", GREY)
    (tmp_path / "d" / "labels.csv").write_text("file,label\na,1\n")
    for root in ("f", "a.npz", "d"):
        sample = read_dataset(DatasetSpec(tmp_path / root), make_plan().task).samples[0]
        copy = pickle.loads(pickle.dumps(sample))  # noqa: S301
        np.testing.assert_array_equal(copy.load().pixels, sample.load().pixels)
        assert copy.load.identity() == sample.load.identity()


def test_keys_of_files(tmp_path):
    files = [tmp_path / "a" / "x.nii.gz", tmp_path / "b" / "x.png", tmp_path / "b" / "y.png"]
    keys = table_keys(files, (tmp_path, tmp_path / "b"))
    assert keys[files[0]] == ("a/x.nii.gz", "x.nii.gz")
    assert keys[files[1]] == ("b/x.png", "x.png")
    assert keys[files[2]] == ("b/y.png", "y.png", "y")


@pytest.mark.parametrize("text", ["", "wrong,header\n1,2\n"])
def test_tables_without_what_they_need(tmp_path, make_plan, text):
    picture(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=r"labels\.csv"):
        read_dataset(DatasetSpec(tmp_path), make_plan().task)


def test_real_pictures(real_data, make_plan):
    plan = make_plan("segmentation", ["lung"])
    dataset = read_dataset(DatasetSpec(real_data / "lungs", sites="folders"), plan.task)
    assert len(dataset.samples) == 578
    assert dataset.left_out == ()
    assert {s.site for s in dataset.samples} >= {"italy", "openist"}
    assert dataset.samples[0].load().pixels.shape[1:] == dataset.samples[0].mask().shape


def tiff16(path, values, photometric):
    """Grey TIFF of 16 bits whose white is 0 or not, as its one strip stands."""
    data, (rows, columns) = values.astype("<u2").tobytes(), values.shape
    tags = [(256, columns), (257, rows), (258, 16), (259, 1), (262, photometric), (273, 0)]
    tags += [(277, 1), (278, rows), (279, len(data))]
    start = 8 + 2 + 12 * len(tags) + 4
    body = struct.pack("<HIH", 42, 8, len(tags))
    for tag, value in tags:
        body += struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value)
    path.write_bytes(b"II" + body + struct.pack("<I", 0) + data)
    return path


def test_white_may_be_0_in_a_tiff_of_16_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (6, 8))
    plain = Picture(tiff16(tmp_path / "a.tif", values, 1))().pixels[0]
    np.testing.assert_array_equal(plain, values)
    turned = Picture(tiff16(tmp_path / "b.tif", values, 0))().pixels[0]
    np.testing.assert_array_equal(turned, 65535 - values)


def png16(path, values):
    """A PNG of 16 bits a channel, every row with another filter."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    rows = values.astype(">u2").reshape(len(values), -1).view(np.uint8)
    left = np.pad(rows, ((0, 0), (2 * values.shape[2], 0)))[:, : rows.shape[1]]
    raw = b""
    for k, row in enumerate(rows):
        raw += bytes([k % 2]) + (row - left[k] * (k % 2)).astype(np.uint8).tobytes()
    size = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with path.open("ab") as file:
        for name, data in ((b"IHDR", size), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")):
            crc = struct.pack(">I", zlib.crc32(name + data))
            file.write(struct.pack(">I", len(data)) + name + data + crc)
    return path


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_keep_them(tmp_path, channels):
    values = np.random.default_rng(1).integers(0, 65536, (6, 8, channels))
    image = Picture(png16(tmp_path / "a.png", values))()
    np.testing.assert_array_equal(image.pixels, np.moveaxis(values[..., :3], -1, 0))
    assert image.window is None


@pytest.mark.parametrize("channels", [1, 2])
def test_grey_of_16_bits_keeps_them_with_an_alpha_channel_too(tmp_path, channels):
    values = np.random.default_rng(1).integers(0, 65536, (6, 8, channels))
    image = Picture(png16(tmp_path / "a.png", values))()
    np.testing.assert_array_equal(image.pixels, values[None, ..., 0])
    assert image.window is None


@pytest.mark.parametrize("shape", [(12, 16), (24, 32), (7, 9), (50, 67)])
def test_a_mask_of_the_proportions_of_its_image_is_resized_where_it_is_asked_for(tmp_path, shape):
    labels = np.random.default_rng(2).integers(0, 4, (25, 33)).astype(np.uint8)
    mask = picture(tmp_path / "mask.png", labels)
    image = picture(tmp_path / "image.png", np.zeros(shape, np.uint8))
    sides = zip(shape, labels.shape, strict=True)
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in sides)
    np.testing.assert_array_equal(PictureMask(mask, image)(), labels[np.ix_(rows, columns)])
    assert PictureMask(mask)().shape == (25, 33)
    assert PictureMask(mask, image).identity() != PictureMask(mask).identity()


def test_a_mask_is_resized_to_the_image_as_it_is_shown_and_never_out_of_proportion(
    tmp_path, make_dicom
):
    labels = np.random.default_rng(2).integers(0, 2, (20, 10)).astype(np.uint8)
    mask = picture(tmp_path / "mask.png", labels)
    lying, exif = Pillow.fromarray(np.zeros((20, 40), np.uint8)), Pillow.Exif()
    exif[274] = 6  # shown upright, with 40 rows
    lying.save(tmp_path / "turned.jpg", exif=exif)
    expected = labels.repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(PictureMask(mask, tmp_path / "turned.jpg")(), expected)
    make_dicom(tmp_path / "a.dcm", np.zeros((40, 20), np.int16))
    np.testing.assert_array_equal(PictureMask(mask, tmp_path / "a.dcm")(), expected)
    for shape in ((20, 20), (10, 20), (40, 22)):
        other = picture(tmp_path / "other.png", np.zeros(shape, np.uint8))
        with pytest.raises(DataError, match="shape of mask differs"):
            PictureMask(mask, other)()


@pytest.mark.parametrize(
    ("unit", "step", "mm"),
    [
        ("mm", 1.5, 1.5),
        ("meter", 1.5e-3, 1.5),
        ("micron", 25.0, 0.025),
        ("unknown", 1.5, 1.5),
        ("meter", 1.5, 1.5),  # which cannot be
    ],
)
def test_units_of_nifti(tmp_path, unit, step, mm):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([step, step, step, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    assert NiftiImage(tmp_path / "a.nii", 3)().spacing == pytest.approx((mm,) * 3)
