"""DICOM decoding against values worked out by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence

from fedward.errors import DataError
from fedward_client.data.readers.dicom.pixels import read_frame
from fedward_client.index.extract import Extractor

PLAIN = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def test_eight_bits_and_spacing_of_rows_then_columns(tmp_path, make_dicom):
    path = make_dicom(tmp_path / "a", PLAIN, PixelSpacing=[0.5, 0.25])
    image = read_frame(path).image
    np.testing.assert_array_equal(image.pixels[0], PLAIN)
    assert image.pixels.dtype == np.float32
    assert image.spacing == (0.5, 0.25)
    assert image.window is None


@pytest.mark.parametrize("bits", [2, 7, 10, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_bits_stored_below_bits_allocated(tmp_path, make_dicom, bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = np.linspace(low, high, 30).round().reshape(5, 6)
    stored = values.astype(np.int16 if signed else np.uint16)
    path = make_dicom(tmp_path / "a", stored, BitsStored=bits)
    np.testing.assert_array_equal(read_frame(path).image.pixels[0], values)


def test_bits_above_those_stored_are_not_read(tmp_path, make_dicom):
    # Retired overlays lived in the unused high bits.
    stored = np.array([[5, 4095], [0, 17]], np.uint16)
    path = make_dicom(tmp_path / "a", stored | 0xF000, BitsStored=12)
    np.testing.assert_array_equal(read_frame(path).image.pixels[0], stored)


def test_rescale_gives_hounsfield_units(tmp_path, make_dicom):
    stored = np.array([[0, 1024], [2048, 4095]], np.uint16)
    path = make_dicom(
        tmp_path / "a", stored, BitsStored=12, RescaleSlope="0.5", RescaleIntercept="-1024"
    )
    expected = stored * 0.5 - 1024
    np.testing.assert_allclose(read_frame(path).image.pixels[0], expected)


def test_modality_table_is_looked_up(tmp_path, make_dicom):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4, 10, 16])
    item.ModalityLUTType = "US"
    item.add_new("LUTData", "US", [100, 200, 400, 800])
    stored = np.array([[9, 10, 11], [12, 13, 14]], np.uint8)  # below and above the table's ends
    path = make_dicom(tmp_path / "a", stored, ModalityLUTSequence=Sequence([item]))
    expected = [[100, 100, 200], [400, 800, 800]]
    np.testing.assert_array_equal(read_frame(path).image.pixels[0], expected)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (None, (-160.0 + 0.0, 239.0)),  # c - 0.5 -+ (w - 1) / 2
        ("LINEAR_EXACT", (-160.0, 240.0)),
        ("SIGMOID", (-160.0, 240.0)),
    ],
)
def test_window_as_the_standard_defines_it(tmp_path, make_dicom, function, expected):
    tags = {"VOILUTFunction": function} if function else {}
    path = make_dicom(tmp_path / "a", PLAIN, WindowCenter=40, WindowWidth=400, **tags)
    assert read_frame(path).image.window == pytest.approx(expected)


def test_first_of_several_windows_and_no_empty_one(tmp_path, make_dicom):
    two = make_dicom(tmp_path / "a", PLAIN, WindowCenter=[10, 99], WindowWidth=[21, 99])
    assert read_frame(two).image.window == pytest.approx((-0.5, 19.5))
    none = make_dicom(tmp_path / "b", PLAIN, WindowCenter=10, WindowWidth=1)
    assert read_frame(none).image.window is None


def test_voi_table_proposes_its_domain(tmp_path, make_dicom):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4, 10, 16])
    item.add_new("LUTData", "US", [1, 2, 3, 4])
    path = make_dicom(tmp_path / "a", PLAIN, VOILUTSequence=Sequence([item]))
    assert read_frame(path).image.window == (10.0, 13.0)


@pytest.mark.parametrize("signed", [False, True])
def test_monochrome1_is_turned_over_with_its_window(tmp_path, make_dicom, signed):
    low = -2048 if signed else 0
    stored = (np.array([[0, 1000], [3000, 4095]]) + low).astype(np.int16 if signed else np.uint16)
    common = {
        "BitsStored": 12,
        "RescaleSlope": "2",
        "RescaleIntercept": "-10",
        "WindowCenter": 100,
        "WindowWidth": 50,
        "VOILUTFunction": "LINEAR_EXACT",
    }
    dark = read_frame(make_dicom(tmp_path / "a", stored, **common)).image
    inverse = make_dicom(tmp_path / "b", stored, PhotometricInterpretation="MONOCHROME1", **common)
    bright = read_frame(inverse).image
    ends = (2 * low - 10) + (2 * (low + 4095) - 10)
    np.testing.assert_allclose(bright.pixels, ends - dark.pixels)
    assert bright.window == pytest.approx((ends - 125, ends - 75))
    # What lay at a given place within the window lies as far from its other end.
    np.testing.assert_allclose(
        (bright.pixels - bright.window[0]) / 50, 1 - (dark.pixels - dark.window[0]) / 50, rtol=1e-5
    )


def test_padding_becomes_the_darkest_value(tmp_path, make_dicom):
    stored = np.array([[-2000, 40], [-1000, 3000]], np.int16)
    path = make_dicom(tmp_path / "a", stored, PixelPaddingValue=-2000)
    np.testing.assert_array_equal(read_frame(path).image.pixels[0], [[-1000, 40], [-1000, 3000]])


@pytest.mark.parametrize(("dtype", "written"), [(np.int16, 63536), (np.uint16, -2000)])
def test_padding_counts_in_either_sign(tmp_path, make_dicom, dtype, written):
    stored = np.array([[-2000, 40], [100, 3000]], np.int16).view(np.uint16).astype(dtype)
    path = make_dicom(tmp_path / "a", stored)
    file = pydicom.dcmread(path)
    file.add_new("PixelPaddingValue", "US" if written > 0 else "SS", written)
    file.add_new("PixelPaddingRangeLimit", "US" if written > 0 else "SS", written + 7)
    file.save_as(path)
    np.testing.assert_array_equal(read_frame(path).image.pixels[0], [[40, 40], [100, 3000]])


def test_colour_in_both_planar_configurations(tmp_path, make_dicom):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = read_frame(make_dicom(tmp_path / "a", rgb)).image
    np.testing.assert_array_equal(image.pixels, rgb.transpose(2, 0, 1))
    assert image.window == (0.0, 255.0)
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1)).tobytes()
    path = make_dicom(tmp_path / "b", rgb, PlanarConfiguration=1, PixelData=planes)
    np.testing.assert_array_equal(read_frame(path).image.pixels, rgb.transpose(2, 0, 1))


def test_palette_becomes_colour(tmp_path, make_dicom):
    table = np.random.default_rng(1).integers(0, 65536, (3, 256), dtype=np.uint16)
    names = [f"{c}PaletteColorLookupTable" for c in ("Red", "Green", "Blue")]
    tags = {f"{n}Data": t.tobytes() for n, t in zip(names, table, strict=True)}
    tags |= {f"{n}Descriptor": [256, 0, 16] for n in names}
    path = make_dicom(tmp_path / "a", PLAIN, PhotometricInterpretation="PALETTE COLOR", **tags)
    image = read_frame(path).image
    np.testing.assert_array_equal(image.pixels, table[:, PLAIN])
    assert image.window == (0.0, 65535.0)


def test_enhanced_frames_have_their_own_rescale_window_and_spacing(
    tmp_path, make_dicom, make_group
):
    stored = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    shared = make_group(PixelMeasuresSequence={"PixelSpacing": [0.7, 0.8]})
    each = [
        make_group(
            PixelValueTransformationSequence={
                "RescaleSlope": str(k + 1),
                "RescaleIntercept": str(-5 * k),
                "RescaleType": "HU",
            },
            FrameVOILUTSequence={"WindowCenter": 100 * k + 0.5, "WindowWidth": 11},
            PlanePositionSequence={"ImagePositionPatient": [0, 0, 2.5 * k]},
        )
        for k in range(2)
    ]
    path = make_dicom(
        tmp_path / "a",
        stored,
        frames=2,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(each),
    )
    for k in range(2):
        frame = read_frame(path, k)
        np.testing.assert_allclose(frame.image.pixels[0], stored[k] * (k + 1.0) - 5 * k)
        assert frame.image.window == pytest.approx((100 * k - 5, 100 * k + 5))
        assert frame.image.spacing == (0.7, 0.8)
        np.testing.assert_allclose(frame.position, [0, 0, 2.5 * k])


def test_imager_spacing_serves_where_pixel_spacing_is_missing(tmp_path, make_dicom):
    path = make_dicom(tmp_path / "a", PLAIN, ImagerPixelSpacing=[0.2, 0.3])
    assert read_frame(path).image.spacing == (0.2, 0.3)
    path = make_dicom(tmp_path / "b", PLAIN, PixelSpacing=[0, 0])
    assert read_frame(path).image.spacing == (1.0, 1.0)


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("MR_small_implicit.dcm", "MR_small.dcm"),
        ("SC_rgb_rle.dcm", "SC_rgb.dcm"),
    ],
)
def test_lossless_codecs_give_the_plain_pixels(compressed, plain):
    one = read_frame(Path(get_testdata_file(compressed))).image
    other = read_frame(Path(get_testdata_file(plain))).image
    np.testing.assert_array_equal(one.pixels, other.pixels)
    assert (one.spacing, one.window) == (other.spacing, other.window)


def test_uncompressed_ct_against_its_raw_bytes():
    path = Path(get_testdata_file("CT_small.dcm"))
    ds = pydicom.dcmread(path)
    raw = np.frombuffer(ds.PixelData, "<i2").reshape(ds.Rows, ds.Columns)
    expected = raw * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    np.testing.assert_array_equal(read_frame(path).image.pixels[0], expected)


def test_jpeg_lossless_against_pydicom():
    path = Path(get_testdata_file("JPGLosslessP14SV1_1s_1f_8b.dcm"))
    np.testing.assert_array_equal(read_frame(path).image.pixels[0], pixel_array(path))


def test_ybr_jpeg_comes_as_rgb():
    # The same picture, once uncompressed; the codec is lossy.
    path = Path(get_testdata_file("SC_rgb_dcmtk_+eb+cy+n1.dcm"))
    plain = read_frame(Path(get_testdata_file("SC_rgb.dcm"))).image.pixels
    assert np.abs(read_frame(path).image.pixels - plain).mean() < 3


def dermoscopy(path, rgb):
    """A VL photograph as a dermatoscope sends it: baseline JPEG, 4:2:2, in YBR."""
    stream = io.BytesIO()
    Pillow.fromarray(rgb).save(stream, "JPEG", quality=95, subsampling="4:2:2")
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    meta.MediaStorageSOPClassUID = pydicom.uid.VLPhotographicImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "Modality": "XC",
        "PatientID": "P1",
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "BodyPartExamined": "SKIN",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "Rows": rgb.shape[0],
        "Columns": rgb.shape[1],
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "YBR_FULL_422",
        "PlanarConfiguration": 0,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "LossyImageCompression": "01",
        "PixelData": encapsulate([stream.getvalue()]),
    }
    for name, value in values.items():
        setattr(file, name, value)
    file["PixelData"].VR = "OB"
    file.save_as(path, enforce_file_format=True)
    return np.asarray(Pillow.open(io.BytesIO(stream.getvalue())).convert("RGB"), float)


def test_dermoscopy_is_decoded_to_the_colours_of_the_skin(tmp_path):
    y, x = np.mgrid[:48, :64]
    spot = np.hypot(y - 24, x - 32) < 14
    rgb = np.where(spot[..., None], (92, 51, 40), (226, 181, 160)).astype(np.uint8)
    expected = dermoscopy(tmp_path / "skin.dcm", rgb)
    image = read_frame(tmp_path / "skin.dcm").image
    assert image.pixels.shape == (3, 48, 64) and image.window == (0, 255)
    assert np.abs(np.moveaxis(image.pixels, 0, -1) - expected).max() <= 3  # two decoders round
    for place in ((24, 32), (4, 4)):  # not in YBR, and not with channels swapped
        np.testing.assert_allclose(image.pixels[:, *place], rgb[place], atol=4)
    facts = Extractor(tmp_path, "dicom", b"k" * 32)(tmp_path / "skin.dcm")
    assert (facts.object_type, facts.syntax) == (
        "VL Photographic Image Storage",
        "JPEG Baseline (Process 1)",
    )
    assert (facts.modality, facts.body_part, facts.photometric) == ("XC", "SKIN", "YBR_FULL_422")


def test_big_endian_palette_of_a_real_device():
    little = read_frame(Path(get_testdata_file("gdcm-US-ALOKA-16.dcm"))).image
    big = read_frame(Path(get_testdata_file("gdcm-US-ALOKA-16_big.dcm"))).image
    np.testing.assert_array_equal(little.pixels, big.pixels)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MR_truncated.dcm", "not readable"),
        ("JPEG2000-embedded-sequence-delimiter.dcm", "not readable"),
        ("rtplan.dcm", "no pixel data"),
        ("reportsi.dcm", "no pixel data"),
        ("README.txt", "no pixel data"),
    ],
)
def test_bad_files_have_fixed_reasons_and_say_nothing_else(name, reason):
    with pytest.raises(DataError) as caught:
        read_frame(Path(get_testdata_file(name)))
    assert caught.value.rule == reason
    assert str(caught.value) == f"{reason}. Mend the file or take it out."


def test_rows_without_pixel_data(tmp_path, make_dicom):
    path = make_dicom(tmp_path / "a", PLAIN)
    ds = pydicom.dcmread(path)
    del ds.PixelData
    ds.save_as(path)
    with pytest.raises(DataError, match="no pixel data"):
        read_frame(path)


def test_a_file_without_preamble_is_read(tmp_path, make_dicom):
    path = make_dicom(tmp_path / "a", PLAIN)
    ds = pydicom.dcmread(path)
    bare = tmp_path / "bare"
    del ds.file_meta, ds.preamble
    pydicom.dcmwrite(bare, Dataset(ds), implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read_frame(bare).image.pixels[0], PLAIN)


def test_every_test_file_of_pydicom_is_decoded_or_refused_cleanly():
    decoded = 0
    for path in sorted(Path(get_testdata_file("CT_small.dcm")).parent.glob("*.dcm")):
        try:
            image = read_frame(path).image
        except DataError as error:
            assert error.rule in ("not readable", "no pixel data")
        else:
            decoded += 1
            assert image.pixels.shape[0] in (1, 3)
            assert np.isfinite(image.pixels).all()
    assert decoded > 50
