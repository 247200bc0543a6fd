"""Storing results in a PACS: once each, whatever is killed; and what a PACS answers instead."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile_pacs import SERVERS, Pacs, build_slice, dimse, encode, web
from orthanc import Orthanc, free_ports
from pydicom.uid import EnhancedSRStorage, SegmentationStorage

from fedward.errors import ConfigError, DataError, PacsError
from fedward_client.config import load_config
from fedward_client.importer.store import Outcome, store_results

PAGE = (Path(__file__).parents[3] / "docs" / "predict.md").read_text("utf-8")
both = pytest.mark.parametrize("way", sorted(SERVERS))
STUDY = "1.2.826.0.97.1"


def test_each_row_of_the_page_names_a_test_that_is_here() -> None:
    table = PAGE[PAGE.index("## A PACS that does not take") :].split("\n## ", 1)[0]
    named = re.findall(r"`(test_\w+)`", table)
    assert len(named) >= 8 and set(named) <= set(globals())


def results(folder: Path, count: int = 3, told: str = "predictions.json") -> list[str]:
    """A folder of predictions; the UIDs of what is in it, the report among them."""
    (folder / "dicom").mkdir(parents=True)
    (folder / told).write_text("{}")
    uids = []
    for k in range(count):
        kind, name = (SegmentationStorage, "seg") if k else (EnhancedSRStorage, "sr")
        more = {"SOPClassUID": kind, "Modality": name.upper()}
        made = build_slice("MRN1", STUDY, f"{STUDY}.{9000 + k}", 1, **more)
        (folder / "dicom" / f"{k}.{name}.dcm").write_bytes(encode(made))
        uids.append(str(made.SOPInstanceUID))
    return uids


@pytest.mark.integration
@pytest.mark.parametrize(
    ("way", "told"), [("dicomweb", "predictions.json"), ("dimse", "explain.json")]
)
def test_orthanc_has_each_object_once(
    way: str, told: str, orthanc: Orthanc, make_site: Any, tmp_path: Path
) -> None:
    orthanc.clear()
    results(tmp_path / "out", told=told)
    config = make_site(orthanc.site(way))
    said: list[str] = []
    first = store_results(config, "main", tmp_path / "out", listen=said.append)
    assert first == Outcome(objects=3, stored=3)
    assert said[-1] == "2 of 3 objects stored"
    assert store_results(config, "main", tmp_path / "out") == Outcome(objects=3, before=3)
    other = config.model_copy(
        update={"importer": config.importer.model_copy(update={"state": tmp_path / "other"})}
    )
    again = store_results(other, "main", tmp_path / "out")  # what was there is a success
    assert again.objects == 3 and again.whole
    held = {
        httpx.get(f"{orthanc.url}/instances/{one}/file").content
        for one in httpx.get(f"{orthanc.url}/instances").json()
    }
    assert len(held) == 3
    files = sorted((tmp_path / "out" / "dicom").iterdir())
    kept = {path.read_bytes()[-512:] for path in files}
    assert {one[-512:] for one in held} == kept


class Storing:
    """Stores in a process of its own, forked before any thread runs; it waits to be let go."""

    def __init__(self, site: Path, out: Path) -> None:
        gate, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.close(self._go)
                if os.read(gate, 1):
                    store_results(load_config(site, datasets_here=False), "main", out)
                    code = 0
            finally:
                os._exit(code)
        os.close(gate)

    def kill_when(self, ready: Any) -> None:
        os.write(self._go, b"x")
        while not ready():
            gone = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            assert gone is None, "it ended before it was killed"
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._go)


@both
def test_a_kill_stores_nothing_twice(way: str, make_site: Any, tmp_path: Path) -> None:
    """Killed while the PACS has an object and has not said so, and between two objects."""
    uids = results(tmp_path / "out", 6)
    storing = [Storing(tmp_path / "site.toml", tmp_path / "out") for _ in range(3)]
    kept: list[str] = []
    pacs = Pacs([])

    def takes(one: Any) -> int | None:
        kept.append(str(one.SOPInstanceUID))
        return None if len(kept) in (1, 3, 5) else 0x0000

    pacs.takes = takes
    with SERVERS[way](pacs) as table:
        config = make_site(table.replace("2.0", "100.0"))
        for one, count in zip(storing, (1, 3, 5), strict=True):
            one.kill_when(lambda count=count: len(pacs.objects) == count)
            pacs.end.set()
            pacs.end.clear()
        outcome = store_results(config, "main", tmp_path / "out")
    assert sorted(kept) == sorted(uids) and set(pacs.received.values()) == {1}
    assert (outcome.objects, outcome.before, outcome.there, outcome.stored) == (6, 4, 1, 1)
    assert kept[-1] == uids[0]  # the report, which points at the others


@both
def test_a_kill_before_the_pacs_has_it_sends_it_again(
    way: str, make_site: Any, tmp_path: Path
) -> None:
    uids = results(tmp_path / "out", 1)
    storing = Storing(tmp_path / "site.toml", tmp_path / "out")
    pacs = Pacs([])
    with SERVERS[way](pacs) as table:
        config = make_site(table.replace("2.0", "100.0"))
        pacs.takes = lambda one: pacs.end.wait(20) or 0xC000
        storing.kill_when(lambda: pacs.received)
        pacs.end.set()
        pacs.takes = lambda one: 0x0000
        outcome = store_results(config, "main", tmp_path / "out")
    assert outcome == Outcome(objects=1, stored=1)
    assert [one.SOPInstanceUID for one in pacs.objects] == uids


def refused(config: Any, out: Path) -> PacsError:
    with pytest.raises(PacsError) as caught:
        store_results(config, "main", out, pause=0.001)
    return caught.value


def test_nobody_there(make_site: Any, tmp_path: Path) -> None:
    results(tmp_path / "out")
    (port,) = free_ports(1)
    for table in (
        f'source = "dimse"\nhost = "127.0.0.1"\nport = {port}\nae_title = "PACS"\n',
        f'source = "dicomweb"\nurl = "http://127.0.0.1:{port}/d"\n',
    ):
        error = refused(make_site("[pacs.main]\n" + table), tmp_path / "out")
        assert str(error.value) in ("no association", "no connection")


def test_refused_association(make_site: Any, tmp_path: Path) -> None:
    results(tmp_path / "out")
    for own, said in (({"called": "OTHER"}, "another AE title"), ({"calling": "X"}, "calling AE")):
        with dimse(Pacs([], **own)) as table:
            error = refused(make_site(table), tmp_path / "out")
        assert "association refused" in str(error.value) and said in str(error.value)


@both
def test_full_disk_of_the_pacs(way: str, make_site: Any, tmp_path: Path) -> None:
    """Tried again with back-off; what was stored before stays noted."""
    uids, pacs = results(tmp_path / "out"), Pacs([])
    answers = iter([0x0000, 0xA700, 0xA700, 0x0000])
    pacs.takes = lambda one: next(answers, 0xA702)
    with SERVERS[way](pacs) as table:
        config = make_site(table)
        error = refused(config, tmp_path / "out")
        assert "out of resources" in str(error.value) and len(pacs.objects) == 2
        pacs.takes = lambda one: 0x0000
        outcome = store_results(config, "main", tmp_path / "out")
    assert outcome == Outcome(objects=3, before=2, stored=1)
    assert {one.SOPInstanceUID for one in pacs.objects} == set(uids)
    assert pacs.received[uids[2]] == 3 and pacs.received[uids[0]] == 5


@both
def test_an_object_that_it_does_not_take(way: str, make_site: Any, tmp_path: Path) -> None:
    """The others are stored; one that it has already is a success."""
    uids, pacs = results(tmp_path / "out"), Pacs([])
    statuses = {uids[1]: 0xC123, uids[2]: 0x0111}
    pacs.takes = lambda one: statuses.get(one.SOPInstanceUID, 0x0000)
    (tmp_path / "out" / "dicom" / "z.dcm").write_bytes(b"half")
    with SERVERS[way](pacs) as table:
        outcome = store_results(make_site(table), "main", tmp_path / "out", pause=0.001)
        assert (outcome.objects, outcome.stored, outcome.whole) == (4, 2, False)
        why = "status 0xC123: it cannot read the object"
        assert outcome.refused == {"1.seg.dcm": why, "z.dcm": "no whole DICOM object"}
        again = store_results(make_site(table), "main", tmp_path / "out")
        assert (again.before, again.refused_before, again.stored) == (2, 1, 0)
        assert set(pacs.received.values()) == {1}  # it is not asked to take it each time
        statuses.clear()
        outcome = store_results(make_site(table), "main", tmp_path / "out", retry_refused=True)
    assert (outcome.before, outcome.stored) == (2, 1)


def test_a_kind_that_it_does_not_take(make_site: Any, tmp_path: Path) -> None:
    results(tmp_path / "out", 1)
    path = tmp_path / "out" / "dicom" / "0.sr.dcm"
    made = build_slice("MRN1", STUDY, f"{STUDY}.1", 1, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.5")
    path.write_bytes(encode(made))
    with dimse(Pacs([])) as table:
        outcome = store_results(make_site(table), "main", tmp_path / "out")
    assert outcome.refused == {"0.sr.dcm": "status 0x0122: it takes no objects of this kind"}


def test_http_errors(make_site: Any, tmp_path: Path) -> None:
    results(tmp_path / "out")
    calls: list[int] = []

    def answer(*codes: int) -> Any:
        calls.clear()
        return lambda: (calls.append(1), codes[min(len(calls), len(codes)) - 1])[1]

    pacs = Pacs([])
    with web(pacs) as table:
        config = make_site(table)
        for code, said, tries in (
            (401, "does not accept the token", 1),
            (403, "does not allow", 1),
            (404, "no such service", 1),
            (503, "busy", 4),
            (507, "disk is full", 4),
        ):
            pacs.http = answer(code)
            error = refused(config, tmp_path / "out")
            assert f"HTTP {code}" in str(error.value) and said in str(error.value)
            assert len(calls) == tries
        pacs.http = answer(413)
        outcome = store_results(config, "main", tmp_path / "out", pause=0.001)
        assert [*outcome.refused.values()] == ["HTTP 413: the object is too large for it"] * 3
        pacs.http = answer(503, 503, 0)
        again = store_results(config, "main", tmp_path / "out", retry_refused=True, pause=0.001)
        assert again == Outcome(objects=3, stored=3)


@both
def test_silence(way: str, make_site: Any, tmp_path: Path) -> None:
    """It has the object and never says so."""
    results(tmp_path / "out", 1)
    pacs = Pacs([], takes=lambda one: None)
    with SERVERS[way](pacs) as table:
        outcome = store_results(
            make_site(table.replace("2.0", "0.3")), "main", tmp_path / "out", pause=0.001
        )
    assert outcome == Outcome(objects=1, there=1) and set(pacs.received.values()) == {1}


def test_a_folder_without_predictions_and_a_pacs_that_is_not_there(
    make_site: Any, tmp_path: Path
) -> None:
    config = make_site('[pacs.main]\nsource = "dimse"\nhost = "pacs"\nae_title = "PACS"\n')
    with pytest.raises(DataError, match="folder of predictions"):
        store_results(config, "main", tmp_path)
    with pytest.raises(ConfigError, match="one of main"):
        config.pacs_for("other")
    assert config.pacs_for(None) == config.pacs_for("main", config.dataset("chest")) == "main"


@pytest.mark.integration
def test_the_command_has_the_importer_s_walls(make_site: Any, tmp_path: Path) -> None:
    results(tmp_path / "out")
    pacs = Pacs([])
    with web(pacs) as table:
        config = make_site(table)
        config.site.state.mkdir()
        (config.site.state / "ledger").write_text("of the trainer")
        words = ["store", str(tmp_path / "out"), "--json", "--config", str(tmp_path / "site.toml")]
        command = [sys.executable, "-m", "fedward_client.cli", *words]
        bare = {**os.environ, "FEDWARD_WALLED": "no"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=bare)
        assert done.returncode == 19 and "allow_unconfined" in done.stderr
        assert not pacs.received
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if "must see neither the site's state" in done.stdout:
        pytest.skip("the kernel makes no namespaces for this user")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stored"] == 3
    assert not any(word in done.stdout + done.stderr for word in ("MRN", "1.2.826", "DOE"))
