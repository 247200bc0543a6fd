"""A full-size CT from DICOM files to SEG and SR in a PACS: seconds, and peak memory.

A synthetic CT of 512×512×300 voxels (a body, noise, a lesion) in 300 DICOM files, a shipped U-Net's
widths with fresh weights, ``fedward-client predict`` and ``fedward-client store`` as processes of
their own. Fresh weights mark voxels all over the body, so that mask and SEG are larger than a
trained network's. Needs Orthanc for the second half. Writes ``benchmarks/predict.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and its simulation.py would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
sys.path.append(str(HERE.parent / "tests" / "fixtures"))

import numpy as np
import pydicom
from orthanc import Orthanc, start_orthanc
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fedward.integrity import about_model
from fedward.models import build_model, save_model, to_arrays
from fedward.plan import Plan, load_plan, plan_from

PAGE = HERE / "predict.md"
SHAPE = (300, 512, 512)
GOAL_SECONDS, GOAL_MIB = 60, 3072
STUDIES = HERE.parent / "studies"
# The names say how the volume comes to the network.
PREPROCESSING: dict[str, dict[str, Any]] = {
    "patches of 96³, the CT's own 0.8×0.8×1 mm": {"size": [96, 96, 96], "patch": {"overlap": 0.1}},
    "patches of 96³, resampled to 1.5 mm": {
        "size": [96, 96, 96],
        "spacing": [1.5, 1.5, 1.5],
        "patch": {"overlap": 0.1},
    },
    "the middle 192×192×128 at 1.5 mm": {"size": [192, 192, 128], "spacing": [1.5, 1.5, 1.5]},
}


def write_ct(folder: Path, shape: Sequence[int] = SHAPE) -> None:
    """The series."""
    folder.mkdir()
    depth, rows, columns = shape
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:rows, :columns]
    body = ((x / columns - 0.5) / 0.4) ** 2 + ((y / rows - 0.5) / 0.3) ** 2 < 1
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for number in range(depth):
        pixels = np.where(body, 1064, 24) + rng.normal(0, 20, (rows, columns))
        if depth // 3 < number < depth // 2:
            pixels[rows // 3 : rows // 2, columns // 3 : columns // 2] += 100
        one = pydicom.Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = CTImageStorage
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.PatientID, one.PatientName, one.Modality = "P1", "Synthetic^One", "CT"
        one.PatientBirthDate = one.PatientSex = one.StudyID = one.AccessionNumber = ""
        one.StudyDate, one.StudyTime, one.ReferringPhysicianName = "20240101", "120000", ""
        one.Manufacturer, one.SeriesNumber, one.InstanceNumber = "synthetic", 1, number + 1
        one.PositionReferenceIndicator = one.AcquisitionNumber = one.KVP = ""
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.ImagePositionPatient = [0, 0, number]
        one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        one.PixelSpacing, one.SliceThickness = [0.8, 0.8], 1
        one.Rows, one.Columns, one.SamplesPerPixel = rows, columns, 1
        one.PhotometricInterpretation, one.PixelRepresentation = "MONOCHROME2", 0
        one.BitsAllocated, one.BitsStored, one.HighBit = 16, 12, 11
        one.RescaleIntercept, one.RescaleSlope, one.RescaleType = -1024, 1, "HU"
        one.PixelData = np.clip(pixels, 0, 4095).astype(np.uint16).tobytes()
        one.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)


def plan_of(preprocessing: dict[str, Any]) -> Plan:
    """The shipped plan's network, on a CT."""
    shipped = load_plan(STUDIES / "hippocampus.toml")
    return plan_from(
        {
            "version": 1,
            "study": {"name": "ct"},
            "task": {"kind": "segmentation", "dimensions": 3, "classes": ["organ", "lesion"]},
            "preprocessing": {"window": [-1000, 1000], "intensity": "unit", **preprocessing},
            "model": {"name": shipped.model.name, "channels": list(shipped.model.channels or ())},
            "training": {
                "rounds": 1,
                "learning_rate": 1e-3,
                "local_epochs": 1,
                "loss": "dice_ce",
            },
            "privacy": {"mechanism": "none"},
            "metrics": {"report": ["dice"], "primary": "dice"},
        }
    )


def timed(words: Sequence[str], folder: Path) -> tuple[float, float, dict[str, Any]]:
    """Seconds and peak MiB of a command, and what it said."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedward_client.cli", *words, "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, (words, told)
    return time.monotonic() - began, usage.ru_maxrss / 1024, json.loads(told)


def measure(folder: Path, pacs: Orthanc) -> dict[str, dict[str, float]]:
    """Each way, predicted and then stored."""
    write_ct(folder / "ct")
    (folder / "site.toml").write_text(
        'version = 1\n[site]\nname = "st-mary"\n[datasets.chest]\nroot = "ct"\n'
        'task = "segmentation"\ndimensions = 3\nclasses = ["organ", "lesion"]\n'
        + pacs.site("dimse")
    )
    found = {}
    for number, (name, preprocessing) in enumerate(PREPROCESSING.items()):
        plan = plan_of(preprocessing)
        model, out = folder / f"model-{number}.safetensors", f"out-{number}"
        save_model(model, to_arrays(build_model(plan, 0)), about_model("ct", plan, "shared"))
        seconds, memory, told = timed(["predict", str(model), "ct", "--out", out], folder)
        assert told["predicted"] + told["marked"] == 1, told
        storing, more, told = timed(["store", out, "--config", "site.toml"], folder)
        size = sum(path.stat().st_size for path in (folder / out / "dicom").iterdir()) / (1 << 20)
        found[name] = {
            "predict": seconds,
            "store": storing,
            "memory": max(memory, more),
            "dicom": size,
        }
        print(name, found[name], flush=True)
    return found


def page(found: dict[str, dict[str, float]], load: str) -> str:
    """The figures as Markdown."""
    lines = [
        "# A CT from its files to the PACS",
        "",
        "Written by `python benchmarks/predict.py`: a synthetic CT of 512×512×300 voxels in 300 "
        "DICOM files; the U-Net of the shipped plan `hippocampus` with fresh weights, which mark "
        "voxels all over the body; `fedward-client predict`, then `fedward-client store` by "
        "C-STORE to Orthanc on the same machine. Seconds of the whole processes, peak resident "
        "memory of the larger one.",
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}; load {load} at the start.",
        "",
        "| the volume comes to the network in | predict, s | store, s | together, s | goal, s "
        "| memory, MiB | goal, MiB | SEG and SR, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        whole = one["predict"] + one["store"]
        met = [
            "met" if good else "missed"
            for good in (whole <= GOAL_SECONDS, one["memory"] <= GOAL_MIB)
        ]
        lines.append(
            f"| {name} | {one['predict']:.0f} | {one['store']:.1f} | {whole:.0f} "
            f"| {GOAL_SECONDS}, {met[0]} | {one['memory']:.0f} | {GOAL_MIB}, {met[1]} "
            f"| {one['dicom']:.0f} |"
        )
    lines += [
        "",
        "The third way cuts off what is outside the middle, and the answer is marked for it.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    load = f"{os.getloadavg()[0]:.1f}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "orthanc").mkdir()
        process, pacs = start_orthanc(folder / "orthanc")
        try:
            options.out.write_text(page(measure(folder, pacs), load), "utf-8")
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
