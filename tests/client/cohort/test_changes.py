"""What a freeze says of the one before it."""

from __future__ import annotations

import shutil

import numpy as np
from PIL import Image

from fedward_client.cohort.changes import since_last
from fedward_client.cohort.freeze import make_cohort, save, usable

MASKED = """
version = 1
[site]
name = "st-mary"
[datasets.chest]
root = "data"
format = "folders"
task = "segmentation"
classes = ["lung"]
"""


def frozen(reading, site):
    with reading(site) as work:
        found = usable(work.dataset, work.index, work.extract)
        cohort = make_cohort(work.name, work.dataset, found, work.index, work.extract)
        changes = since_last(cohort, work.site, work.extract.secret)
        save(cohort, work.site.site.state)
        return cohort.name, changes


def test_patients_that_come_go_and_change_their_label_are_counted(reading, site, export, dx):
    shutil.rmtree(export / "odd")  # read anew each time
    first, changes = frozen(reading, site)
    assert changes is None
    again, changes = frozen(reading, site)
    assert again == first
    assert changes == {"since": first, "added": 0, "gone": 0, "relabelled": 0}
    table = export / "labels.csv"
    text = table.read_text().replace("MRN47110,well", "MRN47110,sick")
    text = text.replace("MRN47112,well", "MRN47112,sick")
    table.write_text(text + "MRN9,well\nMRN8,well\n")
    shutil.rmtree(export / "MRN47115")
    for name, patient in (("a", "MRN9"), ("b", "MRN8"), ("c", "MRN47111")):  # the last is known
        pixels = np.random.default_rng(ord(name)).integers(0, 4096, (12, 10))
        dx(export / f"{name}.dcm", pixels, PatientID=patient)
    second, changes = frozen(reading, site)
    assert changes == {"since": first, "added": 2, "gone": 1, "relabelled": 2}
    # The order of the classes is not what an image is labelled with.
    site.write_text(site.read_text().replace('["well", "sick"]', '["sick", "well"]'))
    _, changes = frozen(reading, site)
    assert changes == {"since": second, "added": 0, "gone": 0, "relabelled": 0}


def test_another_mask_is_another_label(reading, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text(MASKED)
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for number in range(3):
            values = rng.integers(0, 2, (8, 8), dtype=np.uint8) * (255 if folder == "images" else 1)
            Image.fromarray(values).save(tmp_path / "data" / folder / f"{number}.png")
    frozen(reading, site)
    path = tmp_path / "data" / "masks" / "1.png"
    Image.fromarray(1 - np.asarray(Image.open(path))).save(path)
    changes = frozen(reading, site)[1]
    assert (changes["added"], changes["gone"], changes["relabelled"]) == (0, 0, 1)
