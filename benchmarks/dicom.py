"""A hospital's DICOM: files a second, first and second epoch, peak memory.

Real test files of pydicom are copied with new UIDs until there are enough, and one CT of them is
enlarged to the usual 512×512. Every step runs in a process of its own, in turn, after the files
were read once, so that the disk is out of the picture. Memory is the resident set of the process
and its workers together, looked at twenty times a second. Writes ``benchmarks/dicom.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and this file would hide the package of its name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
SMALL = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_RLE.dcm",
    "JPEG2000.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
)
EACH = 10  # images of a patient
PLAN: dict[str, Any] = {
    "version": 1,
    "study": {"name": "dicom"},
    "task": {"kind": "classification", "classes": ["no", "yes"]},
    "preprocessing": {"size": [64, 64], "percentiles": [1, 99]},
    "model": {"name": "cnn"},
    "training": {"rounds": 1, "learning_rate": 1e-3, "local_epochs": 1, "loss": "cross_entropy"},
    "privacy": {"mechanism": "none"},
    "metrics": {"report": ["auc"], "primary": "auc"},
}
SITE = """
version = 1
[site]
name = "bench"
state = "state"
[datasets.files]
root = "files"
format = "dicom"
task = "classification"
classes = ["no", "yes"]
"""


def write_files(folder: Path, count: int, large: bool) -> None:
    """A hospital's export and its configuration."""
    import pydicom

    seeds = [_large()] if large else [pydicom.dcmread(_test_file(name)) for name in SMALL]
    rows = ["PatientID,label"]
    (folder / "files").mkdir(parents=True)
    (folder / "site.toml").write_text(SITE, "utf-8")
    for k in range(count):
        file, patient = seeds[k % len(seeds)], k // EACH
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k}"
        file.SeriesInstanceUID = file.StudyInstanceUID = f"1.2.4.{patient}"
        file.PatientID, file.ImageType = f"P{patient}", ["ORIGINAL", "PRIMARY", "AXIAL"]
        place = folder / "files" / f"{patient:05d}" / f"{k}.dcm"
        place.parent.mkdir(exist_ok=True)
        file.save_as(place)
        if k % EACH == 0:
            rows.append(f"P{patient},{'yes' if patient % 2 else 'no'}")
    (folder / "files" / "labels.csv").write_text("\n".join(rows), "utf-8")


def _test_file(name: str) -> str:
    from pydicom.data import get_testdata_file

    return str(get_testdata_file(name))


def _large() -> Any:
    import numpy as np
    import pydicom

    file = pydicom.dcmread(_test_file("CT_small.dcm"))
    pixels = np.kron(file.pixel_array, np.ones((4, 4), file.pixel_array.dtype))
    file.Rows, file.Columns = pixels.shape
    file.PixelData = pixels.tobytes()
    return file


def _decode(path: Path) -> int:
    import pydicom

    return int(pydicom.dcmread(path).pixel_array.size)


def plain(folder: Path, workers: int) -> dict[str, Any]:
    """What one would write without Fedward: read each file and decode it."""
    import multiprocessing

    import pydicom.pixels  # noqa: F401  (before the clock starts)

    paths = sorted((folder / "files").rglob("*.dcm"))
    began = time.perf_counter()
    if workers == 1:
        for path in paths:
            _decode(path)
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for _ in pool.imap_unordered(_decode, paths, chunksize=16):
                pass
    return {"seconds": time.perf_counter() - began, "files": len(paths)}


def index(folder: Path, workers: int) -> dict[str, Any]:
    """``fedward-client data index``."""
    from fedward_client.commands.work import extractor
    from fedward_client.config import load_config
    from fedward_client.index.scan import scan
    from fedward_client.index.store import open_index
    from fedward_client.worker_pool import Limits

    site = load_config(folder / "site.toml")
    state = folder / f"state-{workers}"
    shutil.rmtree(state, ignore_errors=True)
    with open_index(state, "files") as found:
        done = scan(extractor(site, "files"), found, Limits(workers=workers))
    assert not done.reasons, done.reasons
    return {"seconds": done.seconds, "files": done.new - 1}


def command(folder: Path, name: str) -> dict[str, Any]:
    """``fedward-client data report``, ``freeze`` or ``check``, its index being there."""
    from fedward.plan import plan_from
    from fedward_client.cohort.check import Room, check_plan
    from fedward_client.cohort.freeze import make_cohort, modalities, save, usable
    from fedward_client.cohort.report import make_report
    from fedward_client.commands.work import load_site, work_on

    began = time.perf_counter()
    with work_on(load_site(folder / "site.toml"), "files") as work:
        if name == "report":
            make_report("files", work.dataset, work.index, work.extract)
        elif name == "freeze":
            found = usable(work.dataset, work.index, work.extract)
            cohort = make_cohort("files", work.dataset, found, work.index, work.extract)
            save(cohort, work.site.site.state)
        elif name == "check":
            samples = usable(work.dataset, work.index, work.extract).samples
            words = modalities(samples, work.index, work.extract)
            room = Room(work.site.site.state, "cpu")
            check_plan(
                "files", "", work.dataset, samples, words, plan_from(PLAN), room, measure=False
            )
    return {"seconds": time.perf_counter() - began}


def epoch(folder: Path) -> dict[str, Any]:
    """Open the frozen cohort, prepare what is not prepared, and train once over all of it."""
    from fedward.models import build_model, to_arrays
    from fedward.plan import canonical, plan_from, plan_hash
    from fedward.protocol import RoundOrder
    from fedward_client.cohort.training import cache_folder, prepare_cohort
    from fedward_client.config import load_config
    from fedward_client.secret import site_secret
    from fedward_client.training.runtime import Runtime
    from fedward_client.training.trainer import Trainer

    site, plan = load_config(folder / "site.toml"), plan_from(PLAN)
    began = time.perf_counter()
    ready = prepare_cohort(
        site, "files", "latest", plan, secret=site_secret(site.site.state), cache=cache_folder(site)
    )
    prepared = time.perf_counter() - began
    assert not ready.left_out, ready.left_out
    trainer = Trainer(plan, ready, Runtime(device="cpu"))
    order = RoundOrder(plan=canonical(plan), plan_hash=plan_hash(plan), round=1)
    trainer.train(to_arrays(build_model(plan, 0)), order)
    total = time.perf_counter() - began
    return {"prepare": prepared, "train": total - prepared, "seconds": total}


STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain pydicom loop, 1 process": lambda folder: plain(folder, 1),
    "data index, 1 worker": lambda folder: index(folder, 1),
    "plain pydicom loop, 2 processes": lambda folder: plain(folder, 2),
    "data index, 2 workers": lambda folder: index(folder, 2),
    "data index again": lambda folder: command(folder, "index"),
    "data report": lambda folder: command(folder, "report"),
    "data freeze": lambda folder: command(folder, "freeze"),
    "data check": lambda folder: command(folder, "check"),
    "first epoch": epoch,
    "second epoch": epoch,
}


AGAIN = tuple(list(STEPS)[:4])  # the better of two runs: other programs may be at work


def _seconds(found: dict[str, Any]) -> float:
    return float(found["seconds"])


def measure(step: str, folder: Path) -> dict[str, Any]:
    """One step in a process of its own, with the peak of its memory in MiB."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--step", step, "--folder", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.05)
    assert process.stdout is not None
    told = process.stdout.read()
    assert process.returncode == 0, step
    return {**json.loads(told.splitlines()[-1]), "peak": peak / 1024}


def resident(pid: int) -> int:
    """KiB of a process and all below it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8")
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line), 0)
    return own + sum(resident(int(child)) for child in below)


def run_all(folder: Path) -> dict[str, dict[str, Any]]:
    """All steps over one export."""
    for path in (folder / "files").rglob("*.dcm"):
        path.read_bytes()
    found = {}
    for step in STEPS:
        if step == "data index again":
            (folder / "state-2" / "index").rename(folder / "state" / "index")
        twice = step in AGAIN
        found[step] = min((measure(step, folder) for _ in range(1 + twice)), key=_seconds)
        print(f"{folder.name}: {step}: {found[step]}", flush=True)
    return found


def page(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The tables as Markdown."""
    lines = [
        "# DICOM",
        "",
        "Written by `python benchmarks/dicom.py`. *small*: test files of pydicom (CT, MR, colour; "
        "uncompressed, RLE, JPEG, JPEG-LS, JPEG 2000; 64 to 128 pixels a side) copied with new "
        "UIDs; *CT 512*: one of them enlarged to 512×512. The files were in memory before. The "
        "plain loop is `pydicom.dcmread(path).pixel_array`; the index adds SHA-256 of the file and "
        "of its pixels, their range, the facts of the report, keyed hashes, a limit of time and "
        "memory for each file, and SQLite; of both the better of two runs. Memory: resident, all "
        "processes together.",
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}.",
    ]
    for name, steps in found.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| step | seconds | files/s | peak MiB |",
            "|---|---|---|---|",
        ]
        for step, one in steps.items():
            rate = f"{one['files'] / one['seconds']:.0f}" if "files" in one else ""
            lines.append(f"| {step} | {one['seconds']:.1f} | {rate} | {one['peak']:.0f} |")
        first, second = steps["first epoch"], steps["second epoch"]
        lines += [
            "",
            f"The first epoch is {first['prepare']:.1f} s of preparing and {first['train']:.1f} s "
            f"of training; the second, in a new process, {second['prepare']:.2f} s of opening the "
            f"cohort and its prepared images and {second['train']:.1f} s of training.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything and write the page; or one step, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000])
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        sets = [(f"{n:,} small files", n, False) for n in options.counts]
        for name, count, large in [*sets, ("1,000 files, CT 512", 1000, True)]:
            folder = Path(scratch) / name.replace(" ", "-")
            write_files(folder, count, large)
            found[name] = run_all(folder)
    (HERE / "dicom.md").write_text(page(found), "utf-8")


if __name__ == "__main__":
    main()
