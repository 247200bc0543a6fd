"""``predict --store``: SEG and SR in a real PACS, beside the images that they are about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from orthanc import Orthanc

pytestmark = pytest.mark.integration


def test_answers_lie_in_the_study_of_the_images(
    orthanc: Orthanc,
    tmp_path: Path,
    commands: Any,
    make_plan: Any,
    make_model: Any,
    ct: Any,
) -> None:
    orthanc.clear()
    folder = ct(tmp_path / "data", np.random.default_rng(1).integers(0, 2000, (6, 16, 16)))
    for path in folder.iterdir():
        orthanc.store(path)
    (tmp_path / "site.toml").write_text(
        'version = 1\n[site]\nname = "st-mary"\n[datasets.chest]\nroot = "data"\n'
        'task = "segmentation"\ndimensions = 3\nclasses = ["lung", "heart"]\n'
        + orthanc.site("dimse")
    )
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ledger").write_text("of the trainer")
    plan = make_plan("segmentation", (16, 16, 16), "CT", window=[-1000.0, 1000.0])
    model = make_model(tmp_path / "model.safetensors", plan)
    words = ("predict", model, "chest", "--out", "out", "--store", "--json")
    done = commands("fedward_client.cli", *words, cwd=tmp_path)
    if "must see neither the site's state" in done.stderr:
        pytest.skip("the kernel makes no namespaces for this user")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["store"] == {
        "pacs": "main",
        "objects": 2,
        "before": 0,
        "stored": 2,
        "there": 0,
        "refused_before": 0,
        "refused": {},
    }
    (study,) = httpx.get(f"{orthanc.url}/studies?expand").json()
    series = httpx.get(f"{orthanc.url}/studies/{study['ID']}/series").json()
    kinds = {one["MainDicomTags"]["Modality"]: len(one["Instances"]) for one in series}
    assert kinds == {"CT": 6, "SEG": 1, "SR": 1}
    for one in series:
        if one["MainDicomTags"]["Modality"] != "CT":
            (instance,) = one["Instances"]
            held = httpx.get(f"{orthanc.url}/instances/{instance}/file").content
            kind = one["MainDicomTags"]["Modality"].lower()
            (path,) = (tmp_path / "out" / "dicom").glob(f"*.{kind}.dcm")
            assert held[-256:] == path.read_bytes()[-256:]
    done = commands("fedward_client.cli", *words[:-1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 of 2 objects stored in main, 2 were there\n" in done.stdout
