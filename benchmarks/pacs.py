"""Objects per second from a PACS: ``data fetch`` beside dcmtk's movescu and getscu, and curl.

Synthetic CT slices in Orthanc on this machine, fetched in turn by each way and by the plain program
for it. Then by each way once more, killed at a quarter, at half and at three quarters. ``data
fetch`` also checks every object, hashes it, and writes it down; its rate is given with and without
the time of the query, which the plain programs are spared. Needs root on Debian, or Orthanc and
dcmtk. Writes ``benchmarks/pacs.md``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and its simulation.py would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
sys.path.append(str(HERE.parent / "tests" / "fixtures"))

import httpx
import numpy as np
import pydicom
from debian import need
from hostile_pacs import SITE, build_slice, encode
from orthanc import Orthanc, start_orthanc

from fedward_client.config import SiteConfig, load_config
from fedward_client.importer.fetch import fetch_dataset

PAGE = HERE / "pacs.md"
SERIES = 20
SIDE = 256
WAYS = {
    "DICOMweb": ("dicomweb", {}),
    "C-GET": ("dimse", {"retrieve": "get"}),
    "C-MOVE": ("dimse", {"retrieve": "move"}),
}


def fill(pacs: Orthanc, objects: int, path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(objects):
        series = 1 + number % SERIES
        pixels = rng.integers(0, 4000, (SIDE, SIDE), dtype=np.uint16).tobytes()
        study = f"1.2.826.0.99.{series}"
        more = {"Rows": SIDE, "Columns": SIDE, "PixelData": pixels}
        path.write_bytes(encode(build_slice(f"P{series}", study, f"{study}.1", number + 1, **more)))
        pacs.store(path)


def site(way: str, pacs: Orthanc, folder: Path) -> SiteConfig:
    source, more = WAYS[way]
    table = pacs.site(source, **more)
    (folder / "site.toml").write_text(SITE.format(pacs=table, query="since = 2024-01-01"))
    return load_config(folder / "site.toml", datasets_here=False)


def ours(way: str, pacs: Orthanc, folder: Path, objects: int) -> tuple[float, float]:
    """Seconds of the fetching, and with the query."""
    config = site(way, pacs, folder)
    began = time.monotonic()
    outcome = fetch_dataset(config, "chest")
    whole = time.monotonic() - began
    assert outcome.fetched == objects and outcome.whole, outcome
    return outcome.seconds, whole


def killed(way: str, pacs: Orthanc, folder: Path, objects: int) -> list[int]:
    """Objects that were in the dataset at each kill, and those that the last call fetched."""
    config = site(way, pacs, folder)
    root, found = config.dataset("chest").root, []
    for quarter in (1, 2, 3):
        process = multiprocessing.get_context("fork").Process(
            target=fetch_dataset, args=(config, "chest")
        )
        process.start()
        while len(list(root.glob("*/*/*.dcm"))) < quarter * objects // 4:
            assert process.is_alive(), "it ended before it was killed"
            time.sleep(0.01)
        process.kill()
        process.join()
        found.append(len(list(root.glob("*/*/*.dcm"))))
    last = fetch_dataset(config, "chest")
    uids = {pydicom.dcmread(path).SOPInstanceUID for path in root.glob("*/*/*.dcm")}
    assert last.whole and last.here + last.fetched == len(uids) == objects, last
    # What was received before a kill is never asked for again.
    assert last.here >= found[-1] and not last.again, (last, found)
    return [*found, last.fetched]


def plain(way: str, pacs: Orthanc, folder: Path, objects: int) -> float:
    """Seconds of dcmtk's program, or of curl, one call a study."""
    began = time.monotonic()
    for number in range(1, SERIES + 1):
        study = f"1.2.826.0.99.{number}"
        subprocess.run(command(way, pacs, folder, study), check=True, capture_output=True)
    seconds = time.monotonic() - began
    if way == "DICOMweb":
        came = sum(p.read_bytes().count(b"\0DICM") for p in folder.iterdir())
    else:
        came = len(list(folder.iterdir()))
    assert came == objects, (way, came)
    return seconds


def command(way: str, pacs: Orthanc, folder: Path, study: str) -> list[str]:
    if way == "DICOMweb":
        accept = 'Accept: multipart/related; type="application/dicom"; transfer-syntax=*'
        url = f"{pacs.url}/dicom-web/studies/{study}"
        return [need("curl", "curl"), "-sf", "-H", accept, "-o", str(folder / study), url]
    program = need("getscu" if way == "C-GET" else "movescu", "dcmtk")
    receive = [] if way == "C-GET" else ["+P", str(pacs.receiver)]
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}"]
    who = ["-aec", "ORTHANC", "-aet", "FEDWARD", "-S", "-od", str(folder)]
    return [program, *who, *receive, *keys, "127.0.0.1", str(pacs.dicom)]


def in_new_folder(work: Path, run: Callable[[Path], tuple[float, float] | float]) -> list[float]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        found = run(Path(folder))
    return list(found) if isinstance(found, tuple) else [found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    rows, kills = [], []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "orthanc").mkdir()
        process, pacs = start_orthanc(work / "orthanc")
        try:
            fill(pacs, asked.objects, work / "x.dcm")
            assert httpx.get(f"{pacs.url}/statistics").json()["CountInstances"] == asked.objects
            for way in WAYS:
                times: dict[str, list[list[float]]] = {"plain": [], "ours": []}
                for _ in range(asked.turns):  # in turn, so that both meet the same machine
                    for name, run in (("plain", plain), ("ours", ours)):
                        found = in_new_folder(
                            work, lambda f, run=run, way=way: run(way, pacs, f, asked.objects)
                        )
                        times[name].append(found)
                rows.append(_row(way, times, asked.objects))
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    kills.append(killed(way, pacs, Path(folder), asked.objects))
                print(rows[-1], kills[-1], flush=True)
        finally:
            process.kill()
            process.wait()
    PAGE.write_text(_page(rows, kills, load, asked.objects, asked.turns))


def _row(way: str, times: dict[str, list[list[float]]], objects: int) -> str:
    theirs = statistics.median(one[0] for one in times["plain"])
    own, whole = (statistics.median(one[k] for one in times["ours"]) for k in (0, 1))
    program = {"DICOMweb": "curl", "C-GET": "getscu", "C-MOVE": "movescu"}[way]
    rates = (objects / theirs, objects / own, objects / whole)
    ratios = (theirs / own, theirs / whole)
    cells = [way, program, *(f"{r:.0f}" for r in rates), *(f"{r:.2f}" for r in ratios)]
    return "| " + " | ".join(cells) + " |"


def _page(rows: list[str], kills: list[list[int]], load: float, objects: int, turns: int) -> str:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    ended = os.getloadavg()[0]
    killed_rows = [[way, *map(str, some)] for way, some in zip(WAYS, kills, strict=True)]
    return "\n".join(
        [
            "# From the PACS",
            "",
            f"Written by `python benchmarks/pacs.py`: {objects} CT slices of {SIDE}×{SIDE} in "
            f"{SERIES} series, from Orthanc on the same machine; median of {turns} turns.",
            "",
            f"Machine: {machine}; load {load:.1f} at the beginning, {ended:.1f} at the end, this "
            "benchmark included.",
            "",
            "Objects per second, and the share of the plain program's rate that `data fetch` has:",
            "",
            "| way | plain | plain, /s | fetch, /s | with the query, /s | share | with the query |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Killed by SIGKILL at a quarter, at half and at three quarters, and called once more: "
            "objects in the dataset at each kill, and those that the last call fetched. In the end "
            "each object was there, and none that had been received was asked for again.",
            "",
            "| way | first kill | second | third | last call fetched |",
            "|---|---|---|---|---|",
            *("| " + " | ".join(cells) + " |" for cells in killed_rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
