"""From PACS to PACS with no patient: ``make demo-clinic``.

Orthanc on this machine is the PACS of four synthetic hospitals, with the masks that their readers
drew. Each hospital fetches its images and freezes a cohort; a study over the four trains a model.
Then new patients come at one of them: they are fetched, predicted, and the answers stored. The page
shows what the PACS then has, read back from it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import io
import json
import shutil
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import httpx
import numpy as np
import pydicom
import pytest
from orthanc import Orthanc, start_orthanc
from PIL import Image
from pydicom.sr.codedict import codes

from fedward.ready_studies import shipped_study
from fedward_simulation.cohort import write_cohort

HOSPITALS = 4
CLINIC = 3  # where new patients come
SITE = """version = 1
[site]
name = "hospital-{number}"
[importer]
reserve_gib = 0.1
allow_unconfined = true  # where the kernel makes no walls for this user; the commands then say so
{pacs}
[datasets.chest]
root = "chest"
task = "segmentation"
classes = ["lung"]
modality = ["CR", "DX", "CT"]
[datasets.chest.fetch]
pacs = "main"
modality = ["CR", "DX", "CT", "SEG"]
worklist = "known.csv"
[datasets.today]
root = "today"
task = "segmentation"
classes = ["lung"]
modality = ["CR", "DX", "CT"]
[datasets.today.fetch]
pacs = "main"
worklist = "new.csv"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-clinic"))
    parser.add_argument("--patients", type=int, default=12, help="of each hospital's study")
    parser.add_argument("--new", type=int, default=3, help="patients who come afterwards")
    parser.add_argument("--keep", action="store_true", help="let the PACS run until Ctrl-C")
    parser.add_argument("--open", action="store_true", help="open the page")
    asked = parser.parse_args()
    try:
        with pacs(asked.out) as orthanc:
            page = run(orthanc, asked.out, asked.patients, asked.new)
            print(f"{page}\nEvery image is SYNTHETIC. Not for diagnosis.", flush=True)
            if asked.open:
                webbrowser.open(page.absolute().as_uri())
            if asked.keep:
                print(f"The PACS: {orthanc.url}/app/explorer.html; Ctrl-C ends it.", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    time.sleep(1e9)
    except pytest.skip.Exception as missing:
        print(f"make demo-clinic needs Orthanc and was skipped: {missing}")


@contextlib.contextmanager
def pacs(out: Path) -> Iterator[Orthanc]:
    """A new folder, and Orthanc in it."""
    if out.exists() and any(out.iterdir()) and not (out / "orthanc").is_dir():
        raise SystemExit(f"{out} holds something else: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "orthanc").mkdir(parents=True)
    process, made = start_orthanc((out / "orthanc").absolute())
    try:
        yield made
    finally:
        process.terminate()
        process.wait()


def run(orthanc: Orthanc, out: Path, patients: int, new: int) -> Path:
    """All steps; the page."""
    with step(f"{HOSPITALS} SYNTHETIC hospitals, {patients + new} patients each, into the PACS"):
        write_cohort(out / "cohort", 0, "segmentation", patients + new, HOSPITALS)
        for number in range(1, HOSPITALS + 1):
            fill(orthanc, out, number, patients)
    for number in range(1, HOSPITALS + 1):
        site = str(out / f"hospital-{number}" / "site.toml")
        with step(f"hospital {number}: fetch from the PACS, freeze a cohort"):
            client("data", "fetch", "chest", "--config", site)
            client("data", "freeze", "chest", "--config", site)
    with step("a study over the hospitals"):
        sites = [str(out / f"hospital-{n}" / "site.toml:chest") for n in range(1, HOSPITALS + 1)]
        words = [word for one in sites for word in ("--site", one)]
        plan = out / "plan.toml"
        plan.write_text(shipped_study("demo/segmentation").read_text("utf-8"))
        program("fedward_simulation.cli", "run", str(plan), *words, "--out", str(out / "study"))
    with step(f"hospital {CLINIC}: {new} new patients are fetched, predicted and stored"):
        model, answers = str(out / "study" / "model.safetensors"), str(out / "answers")
        site = str(out / f"hospital-{CLINIC}" / "site.toml")
        words = ["--once", "--settle", "0", "--store", "--out", answers, "--config", site]
        client("watch", model, "today", *words)
    with step("the page, from what the PACS has"):
        page = out / "clinic.html"
        page.write_text(show(orthanc, out), "utf-8")
    return page


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:5.1f} s  {text}", flush=True)


def client(*words: str) -> None:
    program("fedward_client.cli", *words)


def program(module: str, *words: str) -> None:
    """Run a command; what it says is shown only where it failed."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:3])} ended with {done.returncode}\n{done.stderr}")


def fill(orthanc: Orthanc, out: Path, number: int, patients: int) -> None:
    """A hospital's images into the PACS, and masks of those who were read; its site.toml."""
    home, cohort = out / f"hospital-{number}", out / "cohort" / f"hospital-{number}"
    home.mkdir()
    source = "dicomweb" if number % 2 else "dimse"
    (home / "site.toml").write_text(SITE.format(number=number, pacs=orthanc.site(source)))
    known, new = set(), set()
    for path in sorted((cohort / "images").iterdir()):
        orthanc.store(path)
        image = pydicom.dcmread(path)
        if int(image.PatientID.rpartition("-")[2]) > patients:
            new.add(image.PatientID)
            continue
        known.add(image.PatientID)
        mask = np.asarray(Image.open(cohort / "masks" / f"{path.stem}.png"))
        drawn(image, mask).save_as(home / "seg.dcm")
        orthanc.store(home / "seg.dcm")
    (home / "seg.dcm").unlink()
    for name, some in (("known", known), ("new", new)):
        (home / f"{name}.csv").write_text("\n".join(["PatientID", *sorted(some)]) + "\n")


def drawn(image: pydicom.Dataset, mask: np.ndarray) -> hd.seg.Segmentation:
    """A mask as a reader's workstation would store it."""
    described = hd.seg.SegmentDescription(1, "lung", codes.SCT.Organ, codes.SCT.Lung, "MANUAL")
    return hd.seg.Segmentation(
        source_images=[image],
        pixel_array=(mask > 0).astype(np.uint8)[None],
        segmentation_type="BINARY",
        segment_descriptions=[described],
        series_instance_uid=hd.UID(),
        series_number=50,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="SYNTHETIC",
        manufacturer_model_name="SYNTHETIC reader",
        software_versions="1",
        device_serial_number="1",
        series_description="SYNTHETIC reader",
    )


# The page.


def show(orthanc: Orthanc, out: Path) -> str:
    """Image, mask and report of each answer, as the PACS gives them."""
    new = (out / f"hospital-{CLINIC}" / "new.csv").read_text().split()[1:]
    cases = []
    for patient in new:
        images, masks, reports = {}, [], []
        for one in held(orthanc, patient):
            if one.Modality == "SEG":
                masks.append(one)
            elif one.Modality == "SR":
                reports.append(one)
            else:
                images[one.SOPInstanceUID] = one
        for mask in sorted(masks, key=lambda one: int(one.InstanceNumber)):
            told = mask.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
            image = images[told.ReferencedSOPInstanceUID]
            report = next(one for one in reports if refers(one, image.SOPInstanceUID))
            cases.append(case(out, image, mask, report))
    metrics = json.loads((out / "study" / "metrics.json").read_text())
    return PAGE.format(
        cases="\n".join(cases), study=html.escape(str(metrics.get("study", "demo-segmentation")))
    )


def held(orthanc: Orthanc, patient: str) -> Iterator[pydicom.Dataset]:
    """All objects of a patient in the PACS."""
    asked = {"Level": "Instance", "Query": {"PatientID": patient}}
    found = httpx.post(f"{orthanc.url}/tools/find", json=asked, timeout=30).raise_for_status()
    for one in found.json():
        raw = httpx.get(f"{orthanc.url}/instances/{one}/file", timeout=30).raise_for_status()
        yield pydicom.dcmread(io.BytesIO(raw.content))


def refers(report: pydicom.Dataset, uid: str) -> bool:
    return any(one.get("ReferencedSOPInstanceUID") == uid for one in every(report))


def every(item: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    """An item and all items in it."""
    yield item
    for element in item:
        if element.VR == "SQ":
            for one in element.value:
                yield from every(one)


def measured(report: pydicom.Dataset) -> str:
    """The report's figures."""
    found = []
    for one in every(report):
        if one.get("ValueType") == "NUM":
            value = one.MeasuredValueSequence[0]
            unit = value.MeasurementUnitsCodeSequence[0].CodeMeaning
            name = one.ConceptNameCodeSequence[0].CodeMeaning
            found.append(f"{name}: {float(value.NumericValue):.0f} {unit}")
    return "; ".join(found)


def case(out: Path, image: pydicom.Dataset, mask: pydicom.Dataset, report: pydicom.Dataset) -> str:
    pixels = image.pixel_array.astype(float)
    low, high = np.percentile(pixels, [1, 99])
    grey = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1)
    if image.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    lung = np.squeeze(mask.pixel_array) > 0
    stem = f"{image.PatientID}-{image.InstanceNumber}.png"
    true = np.asarray(Image.open(out / "cohort" / f"hospital-{CLINIC}" / "masks" / stem)) > 0
    dice = 2 * (lung & true).sum() / max(1, lung.sum() + true.sum())
    colours = np.repeat(grey[..., None], 3, axis=2)
    marked = colours.copy()
    marked[lung] = 0.6 * marked[lung] + 0.4 * np.array([0.1, 0.7, 1.0])
    return CASE.format(
        plain=picture(colours),
        marked=picture(marked),
        title=html.escape(f"{image.PatientID}, image {image.InstanceNumber} ({image.Modality})"),
        report=html.escape(measured(report)),
        dice=f"{dice:.3f}",
        status=html.escape(f"{report.CompletionFlag}, {report.VerificationFlag}"),
        series=html.escape(str(mask.SeriesDescription)),
    )


def picture(values: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray((255 * values).astype(np.uint8)).resize(
        (values.shape[1] * 3, values.shape[0] * 3)
    ).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PAGE: Any = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>From PACS to PACS</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
figure {{ display: grid; grid-template-columns: auto auto 1fr; gap: 1rem; margin: 1.5rem 0 }}
img {{ max-width: 100%; background: #000 }}
.warn {{ border: 2px solid #b00; padding: .5rem 1rem }}
</style></head><body>
<h1>From PACS to PACS</h1>
<p class="warn">Every image here is SYNTHETIC, computed from a phantom. Not for diagnosis.</p>
<p>Images were fetched from Orthanc, four hospitals trained the study {study} on frozen cohorts, and
the model was applied to new patients. Masks (SEG) and reports (SR) below were stored in Orthanc and
read back from there.</p>
{cases}
</body></html>
"""
CASE = """<figure>
<img alt="image" src="data:image/png;base64,{plain}">
<img alt="image with the lungs marked" src="data:image/png;base64,{marked}">
<figcaption><b>{title}</b><br>SR: {report} ({status})<br>SEG: {series}<br>
Dice with the phantom's own lungs: {dice}</figcaption></figure>"""

if __name__ == "__main__":
    main()
