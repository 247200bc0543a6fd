"""The contact sheet: what stands on it, and where it may be written."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image as Pillow

from fedward import rule_codes
from fedward.errors import DataError, OutputError
from fedward.plan.schema import Preprocessing, Task
from fedward_client.cohort.preview import check_place, write_preview
from fedward_client.data.sample import Image, Sample

LUNGS = Task(kind="segmentation", classes=("lung", "heart"))


def pictures(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text("utf-8"))
    return [np.asarray(Pillow.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def volume(shape, mask=None, patient="DOE"):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    spacing = (1.0,) * len(shape)
    return Sample(patient, lambda: Image(values, spacing), mask=mask)


def test_masks_are_overlaid_in_the_colours_of_the_legend(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4], mask[4:, 4:] = 1, 2
    flat = Sample(
        "DOE", lambda: Image(np.zeros((1, 8, 8), np.float32), (1.0, 1.0)), mask=lambda: mask
    )
    page, prep = tmp_path / "page.html", Preprocessing(size=(8, 8), intensity="unit")
    write_preview(page, tmp_path / "data", "chest", [flat], LUNGS, prep)
    (picture,) = pictures(page)
    assert picture.shape == (8, 8, 3)
    # The image is black there, so what shows is the tint: 45 % of the class's colour.
    np.testing.assert_array_equal(picture[0, 0], np.round(0.45 * np.array([230, 159, 0])))
    np.testing.assert_array_equal(picture[7, 7], np.round(0.45 * np.array([86, 180, 233])))
    np.testing.assert_array_equal(picture[0, 7], [0, 0, 0])
    html = page.read_text("utf-8")
    assert "#e69f00" in html and "<figcaption>lung, heart</figcaption>" in html
    assert "DOE" not in html


def test_a_volume_shows_the_middle_of_three_planes_upright(tmp_path):
    page = tmp_path / "page.html"
    shape = (8, 10, 12)
    prep = Preprocessing(size=shape, intensity="unit")
    task = LUNGS.model_copy(update={"dimensions": 3})
    sample = volume(shape, lambda: np.zeros(shape, np.uint8))
    write_preview(page, tmp_path / "data", "chest", [sample], task, prep)
    shown = pictures(page)
    assert [picture.shape[:2] for picture in shown] == [(12, 10), (12, 8), (10, 8)]
    values = sample.load().pixels[0]
    grey = np.round((values - values.min()) / (values.max() - values.min()) * 255)
    np.testing.assert_allclose(shown[2][..., 0], grey[:, :, 6].T[::-1], atol=1)


def test_bad_images_are_counted_and_class_names_cannot_be_code(tmp_path):
    def broken():
        raise rule_codes.unusable(rule_codes.NOT_READABLE)

    good = volume((9, 9))
    task = Task.model_construct(
        kind="classification",
        dimensions=2,
        classes=("<script>", "b"),
        multi_label=True,
        modality=("any",),
    )
    samples = [
        Sample("DOE", good.load, (1, 0)),
        Sample("DOE", good.load, (0, 0)),
        Sample("DOE", broken, (0, 1)),
    ]
    page = tmp_path / "page.html"
    shown, left_out = write_preview(page, tmp_path / "data", "chest", samples, task)
    assert (shown, left_out) == (2, {"not readable": 1})
    html = page.read_text("utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "none of the classes" in html and "not readable (1)" in html
    with pytest.raises(DataError, match="not readable: 1"):
        write_preview(page, tmp_path / "data", "chest", samples[2:], task)


def test_nothing_is_written_into_a_dataset_by_any_way(tmp_path):
    root = tmp_path / "data"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(root / "deep")
    (tmp_path / "archive.npz").write_bytes(b"")
    for out in (root / "p.html", tmp_path / "link" / "p.html", root / "deep" / ".." / "p.html"):
        with pytest.raises(OutputError, match="must not lie inside"):
            check_place(out, root)
    with pytest.raises(OutputError, match="must not lie inside"):
        check_place(tmp_path / "archive.npz", tmp_path / "archive.npz")
    with pytest.raises(OutputError, match="folder of the page"):
        check_place(tmp_path / "none" / "p.html", root)
    with pytest.raises(OutputError, match="must be a file"):
        check_place(tmp_path, root)
    check_place(tmp_path / "p.html", root)
