"""Scanning an export: every file counted, nothing read twice, no file able to stop it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest

from fedward.errors import OutputError
from fedward_client import worker_pool
from fedward_client.index.extract import Extractor
from fedward_client.index.scan import Limits, scan
from fedward_client.index.store import open_index
from fedward_client.secret import site_secret

PLANTED = ("DOE^JANE", "MRN4711", "1.2.826.0.99.4711", "19550712", "ward-7-doe", "ACC99123")
ODD = {
    "not DICOM": 2,
    "not readable": 1,
    "no pixel data": 1,
    "too large": 1,
    "not a file": 2,
    "linked folder": 1,
}
TWO = Limits(workers=2)


def extractor(state: Path, root: Path) -> Extractor:
    return Extractor(root, "dicom", site_secret(state))


def facts_of(state: Path, root: Path, limits: Limits = TWO) -> dict[str, object]:
    with open_index(state, "chest") as index:
        scan(extractor(state, root), index, limits)
        return {facts.path: facts for facts in index.facts()}


@pytest.mark.integration
def test_a_known_tree_gives_known_numbers(tmp_path, export):
    state = tmp_path / "state"
    with open_index(state, "chest") as index:
        summary = scan(extractor(state, export), index, TWO)
        facts = list(index.facts())
    assert summary.reasons == ODD
    assert (summary.new, summary.unchanged, summary.gone) == (21, 0, 0)
    images = [one for one in facts if one.rows and not one.reason]
    assert len(images) == 12
    assert len({one.patient for one in images}) == 6
    assert {one.modality for one in images} == {"DX"}
    assert {one.spacing for one in images} == {(0.5, 0.5)}
    assert Counter(one.format for one in facts)["table"] == 1


@pytest.mark.integration
def test_facts_are_those_of_an_independent_reading(tmp_path, export):
    state = tmp_path / "state"
    facts, name = facts_of(state, export), extractor(state, export).name
    for path in export.glob("MRN*/*.dcm"):
        one, pixels = facts[name(path)], pydicom.dcmread(path).pixel_array
        assert (one.low, one.high) == (pixels.min(), pixels.max())
        assert one.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert one.syntax == "Explicit VR Little Endian"


@pytest.mark.integration
def test_only_what_changed_is_read_again(tmp_path, export):
    state = tmp_path / "state"
    facts_of(state, export)
    (export / "MRN47110" / "DOE^JANE-0.dcm").unlink()
    shutil.copy(export / "MRN47111" / "DOE^JANE-0.dcm", export / "new.dcm")
    os.utime(export / "MRN47112" / "DOE^JANE-0.dcm")
    with open_index(state, "chest") as index:
        summary = scan(extractor(state, export), index, TWO)
        # The linked folder is the root itself, which has changed too.
        assert (summary.new, summary.unchanged, summary.gone) == (3, 18, 1)
        assert index.count() == 21


@pytest.mark.integration
def test_an_index_holds_no_identifier(tmp_path, export):
    state = tmp_path / "state"
    facts_of(state, export)
    for file in (state / "index").iterdir():
        content = file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0
        for planted in PLANTED:
            assert planted.encode() not in content


@pytest.mark.integration
def test_a_decoder_that_hangs_costs_its_file_alone(tmp_path, export, dx):
    # Thousands of frames, each read by itself, take far longer than is allowed here.
    slow = dx(export / "slow.dcm", np.zeros((20_000, 8, 8)))
    state = tmp_path / "state"
    facts = facts_of(state, export, Limits(workers=2, seconds=1.0))
    assert facts[extractor(state, export).name(slow)].reason == "decoder failed"
    assert sum(1 for one in facts.values() if one.rows and not one.reason) == 12


@pytest.mark.integration
def test_a_decoder_that_dies_costs_its_file_alone(tmp_path, export, dx):
    slow = dx(export / "AAA.dcm", np.zeros((20_000, 8, 8)))
    state, shot = tmp_path / "state", []

    def children() -> list[str]:
        if worker_pool._template is None:
            return []
        template = worker_pool._template.process.pid
        return Path(f"/proc/{template}/task/{template}/children").read_text().split()

    def shoot() -> None:
        give_up = time.monotonic() + 20
        while not shot and time.monotonic() < give_up:
            # The worker at the slow file is the one that has used the processor for a second.
            for child in children():
                ticks = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11]
                if int(ticks) > 1 * os.sysconf("SC_CLK_TCK"):
                    os.kill(int(child), signal.SIGKILL)
                    shot.append(child)
            time.sleep(0.05)

    thread = threading.Thread(target=shoot)
    thread.start()
    facts = facts_of(state, export, Limits(workers=1, seconds=60))
    thread.join()
    assert shot
    assert facts[extractor(state, export).name(slow)].reason == "decoder failed"
    assert sum(1 for one in facts.values() if one.rows and not one.reason) == 12


@pytest.mark.integration
def test_a_killed_scan_goes_on_where_it_was(tmp_path, export, dx):
    for k in range(600):
        dx(export / "more" / f"{k:04d}.dcm", np.full((8, 8), k))
    dx(export / "zzz.dcm", np.zeros((20_000, 8, 8)))
    state = tmp_path / "state"
    code = (
        "import sys; from pathlib import Path\n"
        "from fedward_client.index.extract import Extractor\n"
        "from fedward_client.index.scan import scan\n"
        "from fedward_client.index.store import open_index\n"
        "from fedward_client.secret import site_secret\n"
        "if __name__ == '__main__':\n"
        "    state, root = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "    with open_index(state, 'chest') as index:\n"
        "        scan(Extractor(root, 'dicom', site_secret(state)), index)\n"
    )
    (tmp_path / "scan.py").write_text(code)
    here = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "scan.py"), str(state), str(export)],
        env={**os.environ, "PYTHONPATH": here},
    )
    done, give_up = 0, time.monotonic() + 60
    while done < 200 and time.monotonic() < give_up:
        time.sleep(0.05)
        if (state / "index" / "chest.sqlite").exists():
            try:
                with open_index(state, "chest") as index:
                    done = index.count()
            except OutputError:  # the other process is making its table
                continue
    process.kill()
    process.wait()
    assert done >= 200
    (export / "zzz.dcm").unlink()
    with open_index(state, "chest") as index:
        before = index.count()
        summary = scan(extractor(state, export), index, TWO)
        assert summary.unchanged >= before - 1
        assert summary.new == 621 - summary.unchanged
        assert index.count() == 621


def test_an_index_that_is_none_is_refused(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "chest.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OutputError, match="index again"):
        open_index(tmp_path, "chest")


@pytest.mark.integration
def test_a_file_that_was_slow_once_is_read_by_the_next_scan(tmp_path, dx):
    slow = dx(tmp_path / "export" / "slow.dcm", np.arange(10_000 * 64).reshape(-1, 8, 8) % 999)
    state, root = tmp_path / "state", slow.parent
    extract = extractor(state, root)
    with open_index(state, "chest") as index:
        hasty = scan(extract, index, Limits(workers=1, seconds=0.1))
        assert hasty.reasons == {"decoder failed": 1}
        patient = scan(extract, index, Limits(workers=1, seconds=600.0))
        assert (patient.new, patient.reasons) == (1, {})
        assert scan(extract, index, Limits(workers=1, seconds=0.1)).unchanged == 1
        (facts,) = index.facts()
    assert (facts.reason, facts.low, facts.high) == ("", 0, 998)
