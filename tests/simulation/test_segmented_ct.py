"""CT with DICOM segmentations from files to a trained U-Net, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes

ROOT = Path(__file__).resolve().parents[2]
SIDE, DEPTH = 24, 16
PLAN = """
version = 1
[study]
name = "bright-balls"
[task]
kind = "segmentation"
dimensions = {dimensions}
classes = ["ball"]
modality = ["CT"]
[preprocessing]
size = {size}
window = [-200.0, 300.0]
intensity = "zscore"
[model]
name = "unet"
channels = [8, 16]
[training]
rounds = 4
learning_rate = 1e-2
local_steps = 10
batch_size = 4
loss = "dice_ce"
[privacy]
mechanism = "none"
[participation]
sites = 2
[metrics]
report = ["dice"]
primary = "dice"
evaluate_every = 4
"""


def write_patient(folder: Path, patient: str, rng: np.random.Generator) -> None:
    """A noisy CT series with a bright ball, and a segmentation of it by highdicom."""
    z, y, x = np.mgrid[:DEPTH, :SIDE, :SIDE]
    cz, cy, cx = rng.uniform(6, 10), rng.uniform(8, 16), rng.uniform(8, 16)
    ball = (z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(4, 6.5) ** 2
    units = rng.normal(0, 40, ball.shape) + 200 * ball
    series, frame, study = (pydicom.uid.generate_uid() for _ in range(3))
    images = []
    for k in range(DEPTH):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        values: dict[str, Any] = {
            "SOPClassUID": pydicom.uid.CTImageStorage,
            "Modality": "CT",
            "PatientID": patient,
            "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
            "SeriesInstanceUID": series,
            "StudyInstanceUID": study,
            "FrameOfReferenceUID": frame,
            "PatientName": "",
            "PatientBirthDate": "",
            "PatientSex": "",
            "AccessionNumber": "",
            "StudyID": "",
            "StudyDate": "20200101",
            "StudyTime": "101010",
            "ReferringPhysicianName": "",
            "PixelSpacing": [1.0, 1.0],
            "SliceThickness": 1.0,
            "Rows": SIDE,
            "Columns": SIDE,
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [0, 0, float(k)],
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 0,
            "InstanceNumber": k + 1,
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
            "PixelData": (units[k] + 1024).astype(np.uint16).tobytes(),
        }
        for name, value in values.items():
            setattr(image, name, value)
        folder.mkdir(parents=True, exist_ok=True)
        image.save_as(folder / f"{patient}-{DEPTH - k:02d}.dcm", enforce_file_format=True)
        images.append(image)
    described = hd.seg.SegmentDescription(
        1, "Ball", codes.SCT.Tissue, codes.SCT.Tissue, hd.seg.SegmentAlgorithmTypeValues.MANUAL
    )
    hd.seg.Segmentation(
        images,
        ball.astype(np.uint8),
        hd.seg.SegmentationTypeValues.BINARY,
        [described],
        hd.UID(),
        9,
        hd.UID(),
        1,
        "m",
        "m",
        "1",
        "1",
    ).save_as(folder / f"{patient}-seg.dcm")


@pytest.mark.integration
@pytest.mark.parametrize(("dimensions", "size"), [(2, [24, 24]), (3, [24, 24, 16])])
def test_a_study_learns_from_segmentations(
    tmp_path: Path, dimensions: int, size: list[int], commands: Any
) -> None:
    rng = np.random.default_rng(5)
    for site in ("north", "south"):
        for k in range(8):
            write_patient(tmp_path / "data" / site, f"{site}-{k}", rng)
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(dimensions=dimensions, size=size))
    done = commands(
        "fedward_simulation.cli",
        "run",
        plan,
        "--data",
        "data",
        "--format",
        "dicom",
        "--out",
        "out",
        "--exact",  # of three test patients no hospital would send figures
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (study,) = json.loads(done.stdout)["studies"]
    assert study["left_out"] == {}
    images = [site["images"] for site in study["sites"]]
    assert images == ([128, 128] if dimensions == 2 else [8, 8])
    # Everything foreground would score below .2, nothing foreground 0.
    assert study["arms"][0]["test"]["pooled"]["dice"] > 0.6
