"""Radiographs with a CSV of labels from files to a trained network, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset

ROOT = Path(__file__).resolve().parents[2]
SIDE = 24
PLAN = """
version = 1
[study]
name = "bright-spots"
[task]
kind = "classification"
classes = ["normal", "spot"]
modality = ["DX", "CR"]
[preprocessing]
size = [24, 24]
intensity = "zscore"
[model]
name = "cnn"
channels = [8, 16]
[training]
rounds = 4
learning_rate = 1e-2
local_epochs = 4
batch_size = 8
loss = "cross_entropy"
[privacy]
mechanism = "none"
[split]
validation = 0.1
test = 0.4
[participation]
sites = 2
[metrics]
report = ["auc"]
primary = "auc"
evaluate_every = 4
"""


def write_shot(path: Path, number: int, rng: np.random.Generator) -> None:
    """Noise with a bright spot if the number is odd; half of them are stored white on black."""
    row, column = rng.integers(3, SIDE - 8, 2)
    bright = rng.normal(1500, 150, (SIDE, SIDE))
    if number % 2:
        bright[row : row + 6, column : column + 6] += 1500
    turned = number % 4 > 1
    stored = np.clip(4095 - bright if turned else bright, 0, 4095).astype(np.uint16)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    values: dict[str, Any] = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "Modality": "DX" if number % 3 else "CR",
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "PatientID": f"P{number}",
        "StudyInstanceUID": pydicom.uid.generate_uid(),
        "AccessionNumber": f"A{number}",
        "SeriesInstanceUID": pydicom.uid.generate_uid(),
        "ImagerPixelSpacing": [0.14, 0.14],
        "PhotometricInterpretation": "MONOCHROME1" if turned else "MONOCHROME2",
        "Rows": SIDE,
        "Columns": SIDE,
        "SamplesPerPixel": 1,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "WindowCenter": 2048,
        "WindowWidth": 4096,
        "PixelData": stored.tobytes(),
    }
    for name, value in values.items():
        setattr(image, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(path, enforce_file_format=True)


@pytest.mark.integration
def test_a_study_learns_from_radiographs_and_a_table(tmp_path: Path, commands: Any) -> None:
    rng = np.random.default_rng(3)
    for site in ("north", "south"):
        folder = tmp_path / "data" / site
        for number in range(40):
            write_shot(folder / f"{number:02d}" / "IM0001", number, rng)
        rows = [f"A{k};{'Spot' if k % 2 else 'NORMAL'};{50 + k}" for k in range(38)]
        rows += ["A38;normal;60", "A38;spot;60", "A99;spot;61"]
        (folder / "labels.csv").write_text("\n".join(["AccessionNumber;label;age", *rows]), "utf-8")
    (tmp_path / "plan.toml").write_text(PLAN)
    done = commands(
        "fedward_simulation.cli",
        "run",
        "plan.toml",
        "--data",
        "data",
        "--format",
        "dicom",
        "--out",
        "out",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (study,) = json.loads(done.stdout)["studies"]
    # Of each site: two rows that disagree, and an image without a row.
    assert study["left_out"] == {}
    for site in study["sites"]:
        counts = dict(zip(site["left_out_reasons"], site["left_out_counts"], strict=True))
        assert counts == {"conflicting labels": 1, "no label": 1}
    assert [site["images"] for site in study["sites"]] == [38, 38]
    # Turned about in half of the images, brightness would tell nothing.
    assert study["arms"][0]["test"]["pooled"]["auc"] > 0.85
