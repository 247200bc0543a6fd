"""Training on a frozen cohort: verified, held against the plan, prepared once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedward.errors import DataError, PolicyError
from fedward.models import build_model, to_arrays
from fedward.plan import plan_from
from fedward_client.cohort.freeze import make_cohort, save, usable
from fedward_client.cohort.training import cache_folder, prepare_cohort, preparers
from fedward_client.config import load_config
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.prepare import prepare
from fedward_client.data.sample import SPLITS
from fedward_client.secret import site_secret
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_client.worker_pool import Limits

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.integration


@pytest.fixture
def frozen(working, site):
    """Freezes the dataset; the site's configuration."""

    def run():
        with working(site) as work:
            found = usable(work.dataset, work.index, work.extract)
            save(
                make_cohort(work.name, work.dataset, found, work.index, work.extract),
                work.site.site.state,
            )
        return load_config(site)

    return run


@pytest.fixture
def plan(make_plan):
    return make_plan(
        split={"given": False, "test": 0.2}, task={"classes": ["well", "sick"], "modality": ["DX"]}
    )


def ready(config, plan, **more):
    secret = site_secret(config.site.state)
    with preparers(Limits(workers=1)) as crew:
        site = prepare_cohort(
            config,
            "chest",
            "latest",
            plan,
            secret=secret,
            cache=cache_folder(config),
            crew=crew,
            **more,
        )
        return site, len(crew.workers)


def test_a_trainer_trains_on_a_frozen_cohort_that_is_prepared_once(frozen, plan, make_order):
    config, heard = frozen(), []
    site, workers = ready(config, plan, note=heard.append)
    assert (site.name, site.images.shape, workers) == ("st-mary", (12, 1, 16, 16), 1)
    assert site.images.base is not None and not site.images.flags.writeable
    (entry,) = (config.site.state / "cohorts").glob("*.json")
    assert len(site.cohort) == 64 and entry.name == f"chest-{site.cohort[:12]}.json"
    assert sum(site.patients_in(part) for part in SPLITS) == 6 and site.left_out == {}
    arrays, outcome = Trainer(plan, site, Runtime(device="cpu")).train(
        to_arrays(build_model(plan, 0)), make_order(plan)
    )
    assert outcome.images == len(site.split["train"]) and np.isfinite(outcome.loss)
    assert all(np.isfinite(array).all() for array in arrays.values())
    again, workers = ready(config, plan)
    assert workers == 0  # nothing was decoded
    np.testing.assert_array_equal(again.images, site.images)
    assert not any("MRN" in text or str(config.site.state) in text for text in heard)


def test_the_images_are_those_of_a_plain_reading(frozen, plan, export):
    site, _ = ready(frozen(), plan)
    samples = read_dataset(DatasetSpec(export, "dicom"), plan.task).samples
    good = [sample for sample in samples if "MRN" in sample.load.path.parent.name]
    plain = prepare("x", good, plan)
    np.testing.assert_array_equal(site.images, plain.images)
    np.testing.assert_array_equal(site.targets, plain.targets)


def test_a_changed_byte_is_refused(frozen, plan, export):
    config = frozen()
    ready(config, plan)  # though it is prepared already
    path = export / "MRN47112" / "DOE^JANE-1.dcm"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="of 12 files 1 changed") as caught:
        ready(config, plan)
    assert "MRN" not in str(caught.value) and "ward" not in str(caught.value)


def test_a_byte_that_changes_meanwhile_is_not_kept(frozen, plan, export):
    config = frozen()
    path = export / "MRN47112" / "DOE^JANE-1.dcm"

    def meddle(text):
        if "preparing" in text:
            content = bytearray(path.read_bytes())
            content[-3] ^= 1
            path.write_bytes(bytes(content))

    with pytest.raises(DataError, match="hold still"):
        ready(config, plan, note=meddle)
    assert list(cache_folder(config).iterdir()) == []


@pytest.mark.parametrize(
    ("task", "rule"),
    [
        ({"classes": ["sick", "well"]}, "plan's classes"),
        ({"classes": ["well", "sick", "odd"]}, "plan's classes"),
        ({"multi_label": True}, "plan's task"),
        ({"modality": ["CT"]}, "plan's modalities"),
    ],
)
def test_another_task_is_refused(frozen, make_plan, task, rule):
    loss = {"training": {"loss": "bce"}} if "multi_label" in task else {}
    plan = make_plan(task={"classes": ["well", "sick"], **task}, **loss)
    with pytest.raises(DataError, match=rule):
        ready(frozen(), plan)


def test_too_few_patients_are_refused(frozen, make_plan):
    plan = make_plan(task={"classes": ["well", "sick"]}, participation={"minimum_patients": 7})
    with pytest.raises(DataError, match=r"at least 7 patients.*got 6"):
        ready(frozen(), plan)


def test_only_the_plans_modality_is_taken(frozen, make_plan, site, export, dx):
    site.write_text(site.read_text().replace('["DX"]', '["any"]'))
    for k in range(2):
        dx(export / f"ct-{k}.dcm", np.full((9, 9), k), PatientID="MRN47110", Modality="CT")
    config = frozen()
    plan = make_plan(task={"classes": ["well", "sick"], "modality": ["CR", "DX"]})
    assert len(ready(config, plan)[0].images) == 12
    plan = make_plan(task={"classes": ["well", "sick"]})
    assert len(ready(config, plan)[0].images) == 14


def test_the_cache_is_bounded_by_the_sites_configuration(frozen, plan, site):
    from fedward.errors import OutputError

    site.write_text(site.read_text().replace("[site]", "[site]\ncache_gib = 1e-6"))
    with pytest.raises(OutputError, match="cache_gib"):
        ready(frozen(), plan)


def test_nothing_of_flower_is_loaded():
    code = "import sys, fedward_client.cohort.training; print('flwr' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_cohort_keeps_the_columns_that_the_site_gives_to_studies(frozen, plan, site, export):
    """By the plan's names and words; the others stay out of the file, and a unit must agree."""
    lines = (export / "labels.csv").read_text("utf-8").splitlines()
    cells = [f"{line},{20 + k},{'mw'[k % 2]},SECRET" for k, line in enumerate(lines[1:])]
    (export / "labels.csv").write_text("\n".join([f"{lines[0]},Alter,m/w,note", *cells]))
    text = site.read_text("utf-8")
    given = '[datasets.chest.table.sex]\ncolumn = "m/w"\nwords = { m = "male", w = "female" }\n'
    given += '[datasets.chest.table.age]\ncolumn = "alter"\nunit = "years"\n'
    site.write_text(text + given, "utf-8")
    config = frozen()
    (path,) = (config.site.state / "cohorts").glob("*.json")
    assert "SECRET" not in path.read_text() and '"sex":"female"' in path.read_text()
    age = {"name": "Age", "kind": "number", "unit": "years", "range": [0, 100]}
    sex = {"name": "sex", "kind": "category", "values": ["female", "male"]}
    wanted = plan_from({**plan.model_dump(exclude_defaults=True), "table": {"column": [age, sex]}})
    prepared, _ = ready(config, wanted)
    assert prepared.table.shape == (12, 3) and prepared.left_out == {}
    years = (prepared.table[:, 0] + 1) * 50
    np.testing.assert_allclose(prepared.table[:, 2], 1 - (np.round(years) % 2), atol=1e-6)
    for name, change, rule in (
        ("age", {"unit": "months"}, "must have the plan's unit"),
        ("ward", {}, "must have the plan's columns"),
    ):
        columns = [{**age, "name": name, **change}, sex]
        other = plan_from({**plan.model_dump(exclude_defaults=True), "table": {"column": columns}})
        with pytest.raises(DataError, match=rule):
            ready(config, other)
    # A policy's number of patients counts those whose row is taken; none and one are refused alike.
    for range_ in ([0, 19], [19, 20]):
        columns = [{**age, "range": range_}, sex]
        few = plan_from({**plan.model_dump(exclude_defaults=True), "table": {"column": columns}})
        with pytest.raises(PolicyError, match="as many patients as its policy"):
            ready(config, few, least=2)
