"""Fetching from Orthanc by each way: what comes, what a kill costs, walls and exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from hostile_pacs import SERVERS, Pacs, build_slice, dimse, encode, files, hospital, slow
from orthanc import Orthanc

from fedward_client.config import load_config
from fedward_client.data.files import find
from fedward_client.doctor.pacs import examine_pacs
from fedward_client.importer.fetch import fetch_dataset, place_of

pytestmark = pytest.mark.integration
WAYS = {
    "dicomweb": ("dicomweb", {}),
    "get": ("dimse", {"retrieve": "get"}),
    "move": ("dimse", {"retrieve": "move"}),
}
QUERY = """
since = 2024-03-01
until = 2024-03-01
body_part = ["chest"]
study_description = ["thor*"]
series_description = ["lung*", "!*scout*"]
"""


@pytest.fixture(scope="module")
def filled(orthanc: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What fits the query, beside series that differ in one thing each."""
    fitting = hospital(2, 3)
    misfits: list[dict[str, Any]] = [
        {"StudyDate": "20240302"},
        {"StudyDescription": "Abdomen"},
        {"SeriesDescription": "lung scout"},
        {"BodyPartExamined": "HEAD"},
        {"Modality": "MR"},
    ]
    others = [
        build_slice(f"X{k}", f"1.2.826.0.98.{k}", f"1.2.826.0.98.{k}.1", 1, **change)
        for k, change in enumerate(misfits, start=1)
    ]
    path = tmp_path_factory.mktemp("dicom") / "x.dcm"
    for one in (*fitting, *others):
        path.write_bytes(encode(one))
        orthanc.store(path)
    return fitting


@pytest.mark.parametrize("way", WAYS)
def test_what_fits_comes_once_and_as_it_is(
    way: str, orthanc: Orthanc, filled: list[Any], make_site: Any
) -> None:
    source, more = WAYS[way]
    config = make_site(orthanc.site(source, **more), QUERY)
    assert [line.status for line in examine_pacs("PACS", config.pacs["main"])].count("fail") == 0
    counted = fetch_dataset(config, "chest", dry_run=True)
    assert (counted.patients, counted.series, counted.objects, counted.to_fetch) == (2, 2, 6, 6)
    assert not files(config)
    outcome = fetch_dataset(config, "chest")
    assert (outcome.fetched, outcome.whole) == (6, True)
    lying = files(config)
    assert set(lying) == {one.SOPInstanceUID for one in filled}
    assert outcome.bytes == sum(path.stat().st_size for path in lying.values())
    for one in filled:
        read = pydicom.dcmread(lying[one.SOPInstanceUID])
        assert (read.PatientID, read.PixelData) == (one.PatientID, one.PixelData)
    root = config.dataset("chest").root
    assert sorted(find(root, skipped=True)) == sorted(lying.values())
    assert "1.2.826" not in " ".join(map(str, lying.values()))
    again = fetch_dataset(config, "chest")
    assert (again.here, again.to_fetch, again.fetched) == (6, 0, 0)


@pytest.mark.parametrize("way", ["dicomweb", "get"])
def test_a_worklist_names_the_studies(
    way: str, orthanc: Orthanc, filled: list[Any], make_site: Any, tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text("AccessionNumber\nACCMRN2\nNOBODY\n")
    config = make_site(orthanc.site(WAYS[way][0]), 'worklist = "list.csv"')
    found = fetch_dataset(config, "chest", dry_run=True)
    assert (found.patients, found.studies, found.objects, found.misfits) == (1, 1, 3, 0)


def command(config: Any, *words: str) -> list[str]:
    path = config.site.state.parent / "site.toml"
    own = ["data", "fetch", "chest", "--config", str(path), "--json", *words]
    return [sys.executable, "-m", "fedward_client.cli", *own]


class Importer:
    """Fetches in a process of its own, forked before any thread runs; it waits to be let go."""

    def __init__(self, site: Path) -> None:
        gate, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.close(self._go)
                if os.read(gate, 1):
                    fetch_dataset(load_config(site, datasets_here=False), "chest")
                    code = 0
            finally:
                os._exit(code)
        os.close(gate)

    def go(self) -> None:
        os.write(self._go, b"x")

    def runs(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._go)


def sent(pacs: Pacs) -> int:
    return sum(pacs.sent.values())


@pytest.mark.parametrize("way", sorted(SERVERS))
def test_a_kill_loses_nothing_and_nothing_comes_twice(
    way: str, make_site: Any, tmp_path: Path
) -> None:
    kills = 0

    def has(one: Any) -> bool:
        uids = (one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID)
        return place_of(tmp_path / "data", *uids).exists()

    def one_after_another(found: list[Any]) -> Any:
        """The next when the importer has the last, so that only one is ever on its way."""
        mine = kills
        for one in found:
            yield one
            while not has(one):
                if kills != mine or pacs.end.wait(0.005):
                    return

    pacs = Pacs(hospital(2, 20), sends=one_after_another)
    importers = [Importer(tmp_path / "site.toml") for _ in range(3)]
    with SERVERS[way](pacs) as table:
        # A starved process is not silent: the time-out is not what is tested.
        config = make_site(table.replace("2.0", "100.0") + "associations = 1\n")
        for importer, after in zip(importers, (3, 12, 21), strict=True):
            importer.go()
            while sum(map(has, pacs.objects)) < after:
                assert importer.runs(), "it ended before it was killed"
                time.sleep(0.005)
            importer.kill()
            kills += 1
        outcome = fetch_dataset(config, "chest")
    assert outcome.whole and outcome.here + outcome.fetched == 40
    assert outcome.here >= 21
    assert set(files(config)) == {one.SOPInstanceUID for one in pacs.objects}
    # What was on its way when the process died was not received; it may be sent again, once a kill.
    assert set(pacs.sent) == set(files(config))
    assert sum(count - 1 for count in pacs.sent.values()) <= 3, pacs.sent


def test_the_command_has_walls_counts_and_exit_codes(make_site: Any, tmp_path: Path) -> None:
    pacs = Pacs(hospital(1, 4))
    with dimse(pacs) as table:
        config = make_site(table)
        secret = config.site.state / "ledger"
        config.site.state.mkdir()
        secret.write_text("of the trainer")
        done = subprocess.run(command(config), capture_output=True, text=True, timeout=100)
        if "must see neither the site's state" in done.stdout:
            pytest.skip("the kernel makes no namespaces for this user")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["fetched"], told["objects"], told["missing"]) == (4, 4, 0)
        assert not any(word in done.stdout + done.stderr for word in ("MRN", "1.2.826", "DOE"))
        environment = {**os.environ, "FEDWARD_WALLED": "no"}
        bare = subprocess.run(
            command(config), capture_output=True, text=True, timeout=100, env=environment
        )
        assert bare.returncode == 19 and "allow_unconfined" in bare.stderr
        pacs.objects, pacs.sends = hospital(2, 50), slow(0.1)
        process = subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        end = time.monotonic() + 100
        while sent(pacs) < 8 and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 130 and json.loads(output)["error"] == "Interrupted"
        assert len(files(config)) >= 8 - 2


def test_the_same_bytes_as_the_pacs_holds(
    orthanc: Orthanc, filled: list[Any], make_site: Any
) -> None:
    """Against Orthanc's own download, by its REST interface."""
    config = make_site(orthanc.site("dicomweb"))
    fetch_dataset(config, "chest")
    held = set()
    for one in httpx.get(f"{orthanc.url}/instances").json():
        raw = httpx.get(f"{orthanc.url}/instances/{one}/file").content
        held.add(hashlib.sha256(raw).hexdigest())
    kept = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files(config).values()}
    assert kept <= held and len(kept) >= 6
