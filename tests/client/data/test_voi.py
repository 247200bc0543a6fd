"""VOI LUTs: what pydicom makes of them, and which of LUT, window and plan leads."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from fedward.errors import DataError
from fedward_client.data.quiet import quiet
from fedward_client.data.readers.dicom.pixels import read_frame
from fedward_client.data.transforms import prepare_image, to_unit

RNG = np.random.default_rng(0)


def lut(first, table, bits=12, count=None, vr="US"):
    item = Dataset()
    item.add_new(
        "LUTDescriptor",
        "US" if first >= 0 else "SS",
        [len(table) if count is None else count, first, bits],
    )
    if vr == "OW":
        item.add_new("LUTData", "OW", np.asarray(table, "<u2").tobytes())
    else:
        item.add_new("LUTData", "US", [int(v) for v in table])
    return [item]


def curve(count, top):
    return (top * (np.arange(count) / (count - 1)) ** 0.4).astype(np.uint16)


CASES = {
    "12 bits": (lut(0, curve(4096, 4095)), {}),
    "10 bits, in OW": (lut(0, curve(1000, 1023), bits=10, vr="OW"), {}),
    "starts later, ends sooner": (lut(700, curve(2000, 4095)), {}),
    "a window beside it": (
        lut(0, curve(4096, 65535), bits=16),
        {"WindowCenter": 100, "WindowWidth": 50},
    ),
    "after a rescale, from below zero": (
        lut(-900, curve(3000, 4095)),
        {"RescaleSlope": 1, "RescaleIntercept": -1024},
    ),
    "after a rescale by a fraction": (
        lut(0, curve(1500, 1023), bits=10),
        {"RescaleSlope": 0.37, "RescaleIntercept": 0.5},
    ),
    "bright is low": (lut(100, curve(3000, 4095)), {"PhotometricInterpretation": "MONOCHROME1"}),
    "bright is low, after a rescale": (
        lut(-20, curve(900, 1023), bits=10),
        {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": 0.25, "RescaleIntercept": -30},
    ),
}


def written(path, make_dicom, table, **tags):
    stored = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)
    return make_dicom(path, stored, BitsStored=12, Modality="DX", VOILUTSequence=table, **tags)


@pytest.mark.parametrize("case", CASES)
def test_values_are_pydicoms(tmp_path, make_dicom, make_plan, case):
    table, tags = CASES[case]
    path = written(tmp_path / "x.dcm", make_dicom, table, **tags)
    file = pydicom.dcmread(path)
    with quiet():  # pydicom warns of tables over values that a rescale made floating
        shown = apply_voi_lut(apply_modality_lut(file.pixel_array, file), file).astype(float)
    expected = shown / (2.0 ** table[0].LUTDescriptor[2] - 1)
    if file.PhotometricInterpretation == "MONOCHROME1":
        expected = 1 - expected
    image = read_frame(path).image
    plan = make_plan(intensity="unit", size=(20, 30))
    unit, mapped = to_unit(image, plan.preprocessing)
    assert mapped
    np.testing.assert_allclose(unit[0], expected, atol=1e-6)
    ready = prepare_image(image, None, plan.task, plan.preprocessing)
    np.testing.assert_allclose(ready.pixels[0], expected, atol=1e-6)


def test_eight_bit_entries_beyond_the_first_256(tmp_path, make_dicom):
    # pydicom keeps the places in the table as 8 bits too, so here the standard is the measure.
    path = written(tmp_path / "x.dcm", make_dicom, lut(10, curve(1500, 255), bits=8))
    image = read_frame(path).image
    places = np.clip(image.pixels[0].astype(int) - 10, 0, 1499)
    np.testing.assert_allclose(image.lookup(image.pixels)[0], curve(1500, 255)[places] / 255)


def test_the_plans_window_and_percentiles_lead(tmp_path, make_dicom, make_plan):
    path = written(tmp_path / "x.dcm", make_dicom, lut(0, curve(4096, 4095)))
    image = read_frame(path).image
    for settings in ({"window": [1000.0, 3000.0]}, {"percentiles": [10, 90]}):
        prep = make_plan(intensity="unit", **settings).preprocessing
        ends = settings.get("window") or np.percentile(image.pixels, settings["percentiles"])
        expected = np.clip((image.pixels - ends[0]) / (ends[1] - ends[0]), 0, 1)
        np.testing.assert_allclose(to_unit(image, prep)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "table", [lut(0, curve(100, 255), count=200), lut(0, curve(100, 255), bits=7)]
)
def test_a_broken_table_is_a_reason(tmp_path, make_dicom, table):
    with pytest.raises(DataError, match="not readable"):
        read_frame(written(tmp_path / "x.dcm", make_dicom, table))


@pytest.mark.parametrize("intensity", ["zscore", "unit"])
def test_units_of_pet_are_left_alone(tmp_path, make_dicom, make_plan, intensity):
    stored = np.arange(600, dtype=np.uint16).reshape(20, 30) * 50
    path = make_dicom(
        tmp_path / "pet.dcm",
        stored,
        Modality="PT",
        Units="BQML",
        RescaleSlope=0.5,
        RescaleIntercept=0,
        WindowCenter=100,
        WindowWidth=50,
        VOILUTSequence=lut(0, curve(900, 4095)),
    )
    image = read_frame(path).image
    assert image.window is None and image.lookup is None
    np.testing.assert_array_equal(image.pixels[0], stored / 2)
    prep = make_plan(intensity=intensity, size=(20, 30)).preprocessing
    values, mapped = to_unit(image, prep)
    assert mapped is (intensity == "unit")
    expected = stored / 2 if intensity == "zscore" else stored / stored.max()
    np.testing.assert_allclose(values[0], expected, rtol=1e-6)
    # What the plan says holds for PET too.
    prep = make_plan(intensity=intensity, window=[0, 100]).preprocessing
    assert to_unit(image, prep)[0].max() == 1
