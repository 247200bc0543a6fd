"""Frozen cohorts: the same content has the same hash, and no changed byte stays unseen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from fedward.errors import DataError
from fedward_client.cohort.freeze import load, make_cohort, save, usable
from fedward_client.cohort.open import open_cohort
from fedward_client.data.prepare import _key, prepare
from fedward_client.secret import Pseudonyms, site_secret

PLANTED = ("DOE^JANE", "MRN4711", "1.2.826.0.99.4711", "19550712", "ward-7-doe", "ACC99123")


@pytest.fixture
def freeze(working):
    def run(site):
        with working(site) as work:
            found = usable(work.dataset, work.index, work.extract)
            cohort = make_cohort(work.name, work.dataset, found, work.index, work.extract)
            save(cohort, work.site.site.state)
            return cohort, work.site

    return run


@pytest.fixture
def frozen(freeze, site):
    """The cohort, its site's configuration and its secret."""
    cohort, config = freeze(site)
    return cohort, config, site_secret(config.site.state)


@pytest.mark.integration
def test_the_same_content_has_the_same_hash_and_file(freeze, site, export):
    first, config = freeze(site)
    for path in export.glob("MRN*/*.dcm"):
        os.utime(path)
    (export / "odd" / "another.txt").write_text("nothing of the cohort")
    second, _ = freeze(site)
    assert second.sha256 == first.sha256
    files = list((config.site.state / "cohorts").iterdir())
    assert [file.name for file in files] == [f"chest-{first.sha256[:12]}.json"]
    assert files[0].stat().st_mode & 0o777 == 0o600
    assert files[0].parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.integration
def test_another_label_or_another_image_is_another_cohort(freeze, site, export, dx):
    hashes = {freeze(site)[0].sha256}
    table = export / "labels.csv"
    table.write_text(table.read_text().replace("MRN47110,well", "MRN47110,sick"))
    hashes.add(freeze(site)[0].sha256)
    dx(export / "more.dcm", np.ones((9, 9)), PatientID="MRN47110")
    hashes.add(freeze(site)[0].sha256)
    assert len(hashes) == 3


@pytest.mark.integration
def test_a_cohort_file_names_nobody_and_holds_the_files_digests(frozen, export):
    cohort, config, secret = frozen
    text = (config.site.state / "cohorts" / f"{cohort.name}.json").read_text()
    for planted in PLANTED:
        assert planted not in text
    digests = {hashlib.sha256(p.read_bytes()).hexdigest() for p in export.glob("MRN*/*.dcm")}
    assert {one["sha256"] for one in json.loads(text)["files"].values()} == digests
    expected = {Pseudonyms(secret)("patient", "", f"MRN4711{k}") for k in range(6)}
    assert {item.patient for item in cohort.items} == expected


@pytest.mark.integration
def test_an_opened_cohort_gives_the_images_that_were_frozen(frozen, make_plan, export, tmp_path):
    cohort, config, secret = frozen
    opened = open_cohort(config, "chest", cohort.sha256[:8], secret=secret)
    assert opened.rehashed == 0 and opened.sha256 == cohort.sha256
    plan = make_plan(split={"given": False}, task={"classes": ["well", "sick"]})
    ready = prepare("site", opened.dataset.samples, plan, tmp_path / "cache")
    with_labels = {(one.patient, one.label) for one in opened.dataset.samples}
    assert len(with_labels) == 6 and ready.images.shape == (12, 1, 16, 16)
    plain = usable_images(config, plan)
    assert np.array_equal(ready.images, plain)


def usable_images(config, plan):
    from fedward_client.data.dataset import DatasetSpec, read_dataset

    dataset = config.dataset("chest")
    samples = read_dataset(DatasetSpec(dataset.root, "dicom"), dataset.as_task()).samples
    good = [sample for sample in samples if "MRN" in sample.load.path.parent.name]
    return prepare("plain", good, plan).images


@pytest.mark.integration
def test_one_flipped_byte_is_found_out_though_size_and_time_stay(frozen, export):
    _cohort, config, secret = frozen
    path = export / "MRN47110" / "DOE^JANE-0.dcm"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(DataError, match="of 12 files 1 changed, 0 gone") as error:
        open_cohort(config, "chest", secret=secret)
    assert "restore the files" in str(error.value)
    assert not any(planted in str(error.value) for planted in PLANTED)
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert open_cohort(config, "chest", secret=secret).rehashed == 1
    assert open_cohort(config, "chest", secret=secret).rehashed == 0  # it was remembered


@pytest.mark.integration
def test_gone_files_and_damaged_cohort_files_are_refused(frozen, export):
    cohort, config, secret = frozen
    shutil.rmtree(export / "MRN47110")
    (export / "MRN47111" / "DOE^JANE-1.dcm").write_bytes(b"short")
    (export / "MRN47112" / "DOE^JANE-1.dcm").unlink()
    os.mkfifo(export / "MRN47112" / "DOE^JANE-1.dcm")  # to open it would wait for ever
    with pytest.raises(DataError, match="of 12 files 2 changed, 2 gone"):
        open_cohort(config, "chest", secret=secret)
    path = config.site.state / "cohorts" / f"{cohort.name}.json"
    path.write_text(path.read_text().replace('"label":[0]', '"label":[1]', 1))
    with pytest.raises(DataError, match="whole and unchanged"):
        load(path)


@pytest.mark.integration
def test_a_copied_tree_is_the_same_cohort_with_the_same_cache(frozen, export, make_plan):
    _cohort, config, secret = frozen
    plan = make_plan(split={"given": False}, task={"classes": ["well", "sick"]})
    here = open_cohort(config, "chest", secret=secret)
    elsewhere = export.parent / "copied"
    shutil.copytree(export, elsewhere, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
    moved = config.dataset("chest").model_copy(update={"root": elsewhere})
    there = open_cohort(
        config.model_copy(update={"datasets": {"chest": moved}}), "chest", secret=secret
    )
    assert there.rehashed == 12
    keys = {_key(opened.dataset.samples, plan) for opened in (here, there)}
    assert len(keys) == 1 and None not in keys
    assert there.dataset.samples[0].load.load.path.is_relative_to(elsewhere)


@pytest.mark.integration
def test_latest_and_hash_choose_a_cohort(freeze, site, export):
    first, config = freeze(site)
    secret = site_secret(config.site.state)
    table = export / "labels.csv"
    table.write_text(table.read_text().replace("MRN47110,well", "MRN47110,sick"))
    second, _ = freeze(site)
    assert open_cohort(config, "chest", secret=secret).sha256 == second.sha256
    assert open_cohort(config, "chest", first.sha256, secret=secret).sha256 == first.sha256
    table.write_text(table.read_text().replace("MRN47110,sick", "MRN47110,well"))
    assert freeze(site)[0].sha256 == first.sha256  # the first again, which is the latest now
    assert open_cohort(config, "chest", secret=secret).sha256 == first.sha256
    for wrong, rule in (("../x", "start of its hash"), ("0" * 64, "must be frozen")):
        with pytest.raises(DataError, match=rule):
            open_cohort(config, "chest", wrong, secret=secret)


@pytest.mark.integration
def test_nothing_usable_cannot_be_frozen(freeze, site, export):
    (export / "labels.csv").write_text("PatientID,label\nnobody,well\n")
    with pytest.raises(DataError, match="must have images"):
        freeze(site)


@pytest.mark.integration
def test_a_cohort_of_other_classes_is_not_taken_for_the_datasets(freeze, site, working):
    freeze(site)
    site.write_text(site.read_text().replace('["well", "sick"]', '["sick", "well"]'))
    with working(site) as work, pytest.raises(DataError, match="task and classes"):
        work.samples("latest")
