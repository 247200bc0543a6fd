"""Boxes at a hospital: counted, frozen, opened again, checked against a plan and shown."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from fedward.errors import ConfigError
from fedward_client.cohort.changes import since_last
from fedward_client.cohort.check import Room, check_plan
from fedward_client.cohort.freeze import counts, make_cohort, save, usable
from fedward_client.cohort.open import open_cohort
from fedward_client.cohort.preview import write_preview
from fedward_client.cohort.report import make_report
from fedward_client.config import load_config
from fedward_client.data.prepare import prepare
from fedward_client.policy.decide import facts_of
from fedward_client.secret import site_secret

SITE = """
version = 1
[site]
name = "st-mary"
state = "state"
[datasets.chest]
root = "data-doe"
format = "folders"
task = "detection"
classes = ["dot", "bar"]
minimum_patients = 2
"""
SIZE = (40, 60)


def write_data(root: Path, *rows: str) -> None:
    (root / "images").mkdir(parents=True)
    lines = ["image,class,xmin,ymin,xmax,ymax", *rows]
    for k in range(12):
        values = np.random.default_rng(k).integers(0, 60, SIZE, np.uint8)
        Pillow.fromarray(values).save(root / "images" / f"DOE{k}.png")
        lines += [f"DOE{k}.png,dot,10,5,30,15", f"DOE{k}.png,bar,0,0,9,40"][: k % 3]
    (root / "boxes.csv").write_text("\n".join(lines))


def plan_of(make_plan: Any) -> Any:
    return make_plan(
        task={"kind": "detection", "classes": ["dot", "bar"]},
        preprocessing={"size": list(SIZE)},
        split={"given": False},
        model={"name": "retinanet", "channels": [4, 8, 8, 8, 8, 8]},
        training={"loss": "focal_giou"},
        metrics={"report": ["map50"], "primary": "map50"},
    )


@pytest.fixture(name="site")
def site_fixture(tmp_path: Path) -> Path:
    """A configuration beside its data; one image has a box that lies outside."""
    write_data(tmp_path / "data-doe", "DOE3.png,dot,50,5,70,15")
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    return path


def as_dicom(site: Path, dx: Any) -> None:
    """Make DICOM files of the pictures; the table names them by stem."""
    for path in sorted((site.parent / "data-doe" / "images").glob("*.png")):
        pixels = np.asarray(Pillow.open(path))
        own = {"PatientID": path.stem, "StudyInstanceUID": f"1.2.{path.stem[3:]}"}
        dx(path.with_suffix(".dcm"), pixels, **own)
        path.unlink()
    table = site.parent / "data-doe" / "boxes.csv"
    table.write_text(table.read_text().replace(".png", ""))
    site.write_text(SITE.replace("folders", "dicom"))


@pytest.mark.parametrize("form", ["folders", "dicom"])
def test_boxes_are_counted_frozen_and_opened_again(
    tmp_path: Path, site: Path, reading: Any, make_plan: Any, dx: Any, form: str
) -> None:
    if form == "dicom":
        as_dicom(site, dx)
    with reading(site) as work:
        report = make_report("chest", work.dataset, work.index, work.extract)
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("chest", work.dataset, found, work.index, work.extract)
        path = save(cohort, work.site.site.state)
        told = counts(cohort, work.dataset)
        opened = open_cohort(work.site, "chest", secret=site_secret(work.site.site.state))
    assert report.left_out["box outside its image"] == 1
    assert report.samples == 11 and report.images_by_class == {"dot": 8, "bar": 4}
    assert told["images_by_class"] == {"dot": 8, "bar": 4}
    assert [one.boxes for one in opened.dataset.samples] == [one.boxes for one in found.samples]
    assert facts_of(cohort).per_class == {"dot": 8, "bar": 4}
    assert opened.dataset.samples[0].boxes == () and "DOE" not in path.read_text()
    plan = plan_of(make_plan)
    site_data = prepare("here", opened.dataset.samples, plan, tmp_path / "cache")
    again = prepare("here", opened.dataset.samples, plan, tmp_path / "cache")
    np.testing.assert_array_equal(site_data.targets, again.targets)
    assert (site_data.targets[..., 4] > 0).sum() == 12
    assert len(list((tmp_path / "cache").glob("[0-9a-f]*"))) == 1


def test_another_box_is_another_label(site: Path, reading: Any) -> None:
    changes = []
    for old, new in (("DOE1.png,dot,10,5,30,15", "DOE1.png,dot,11,5,30,15"), ("", "")):
        with reading(site) as work:
            found = usable(work.dataset, work.index, work.extract)
            cohort = make_cohort("chest", work.dataset, found, work.index, work.extract)
            changes.append(since_last(cohort, work.site, work.extract.secret))
            save(cohort, work.site.site.state)
        table = site.parent / "data-doe" / "boxes.csv"
        table.write_text(table.read_text().replace(old, new))
    assert changes[0] is None and changes[1] is not None
    assert [changes[1][key] for key in ("added", "gone", "relabelled")] == [0, 0, 1]


def test_check_and_preview_show_boxes(
    tmp_path: Path, site: Path, reading: Any, make_plan: Any
) -> None:
    with reading(site) as work:
        found = usable(work.dataset, work.index, work.extract)
        words = [""] * len(found.samples)
        plan = plan_of(make_plan)
        room = Room(tmp_path, "cpu")
        made = check_plan("chest", "", work.dataset, found.samples, words, plan, room, measure=True)
        page = tmp_path / "page.html"
        write_preview(
            page, work.dataset.root, "chest", found.samples, plan.task, plan.preprocessing
        )
    assert made.can_serve and made.patients_by_class == {"dot": 8, "bar": 4}
    text = page.read_text("utf-8")
    shown = [
        np.asarray(Pillow.open(io.BytesIO(base64.b64decode(one))))
        for one in re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    ]
    captions = re.findall(r"<figcaption>(.+?)</figcaption>", text)
    assert sorted(set(captions)) == ["dot", "dot, bar", "none of the classes"]
    picture = shown[captions.index("dot, bar")]
    framed = (picture == [86, 180, 233]).all(axis=2)  # the second colour of the legend
    assert framed[0, :9].all() and framed[:40, 0].all() and framed[:40, 8].all()
    assert not framed[1:39, 1:8].any() and not framed[:, 9:].any()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ('[datasets.chest.masks]\nsuffix = "_m"', "masks belong to segmentation"),
        ('[datasets.chest.boxes]\nwords = { "x" = "blob" }', "must lead to one of `classes`"),
        ('[datasets.chest.boxes]\nsource = "yolo"\nfile = "b.csv"', "`yolo` has no table"),
        ('[datasets.chest.boxes.words]\nx = "dot"\nX = "bar"', "a word must be listed once"),
    ],
)
def test_settings_that_do_not_fit_are_refused(site: Path, more: str, told: str) -> None:
    site.write_text(f"{SITE}\n{more}\n")
    with pytest.raises(ConfigError, match=told):
        load_config(site)


def test_boxes_belong_to_detection(site: Path) -> None:
    changed = SITE.replace('"detection"', '"segmentation"')
    site.write_text(f'{changed}\n[datasets.chest.boxes]\nsource = "masks"\n')
    with pytest.raises(ConfigError, match="boxes belong to detection"):
        load_config(site)


def test_boxes_around_an_archive_s_masks_are_frozen_as_masks(
    tmp_path: Path, reading: Any, make_plan: Any
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, *SIZE), np.uint8)
    masks = np.zeros((12, *SIZE), np.uint8)
    masks[:, 5:15, 10:30] = 2
    (tmp_path / "data-doe").mkdir()
    np.savez(tmp_path / "data-doe" / "all.npz", images=images, masks=masks, patients=np.arange(12))
    site = tmp_path / "site.toml"
    site.write_text(SITE.replace("folders", "npz") + '[datasets.chest.boxes]\nsource = "masks"\n')
    with reading(site) as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort("chest", work.dataset, found, work.index, work.extract)
        save(cohort, work.site.site.state)
        opened = open_cohort(work.site, "chest", secret=site_secret(work.site.site.state))
    made = prepare("here", opened.dataset.samples, plan_of(make_plan))
    np.testing.assert_array_equal(made.targets[:, 0], [[5, 10, 15, 30, 2]] * 12)
