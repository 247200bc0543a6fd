"""What an object must be, the query's own parts, and the rules of site.toml."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hostile_pacs import build_slice, encode, hospital
from pydicom.data import get_testdata_file, get_testdata_files
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from fedward.errors import ConfigError, DataError, OutputError
from fedward_client.importer.check import COMPRESSED, PASSING, SYNTAXES, Expected, examine
from fedward_client.importer.fetch import fetch_dataset, place_of
from fedward_client.importer.journal import Journal
from fedward_client.importer.query import read_worklist
from fedward_client.importer.source import Stopped, Throttle, is_uid

TABLE = '[pacs.main]\nsource = "dimse"\nhost = "pacs"\nae_title = "PACS"\n'


def test_what_is_taken_is_what_the_readers_decode() -> None:
    decoded = set()
    for uid in AllTransferSyntaxes:
        try:
            decoded |= {uid} if get_decoder(uid).is_available else set()
        except NotImplementedError:
            continue
    assert set(SYNTAXES) == decoded
    assert set(SYNTAXES) - set(COMPRESSED) == {one for one in decoded if not one.is_encapsulated}


def expected(path: Path) -> dict[str, Expected]:
    read = pydicom.dcmread(path)
    names = ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality")
    return {str(read.SOPInstanceUID): Expected(*(str(read.get(n) or "") for n in names))}


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "image_dfl.dcm",
        "JPEG2000.dcm",
        "liver.dcm",  # a segmentation, with sequences in sequences
        "rtplan.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
        "reportsi.dcm",
        "emri_small_RLE.dcm",
    ],
)
def test_every_cut_is_seen_and_whole_files_pass(name: str, tmp_path: Path) -> None:
    whole, path = Path(get_testdata_file(name)), tmp_path / "x.dcm"  # type: ignore[arg-type]
    wanted, raw = expected(whole), whole.read_bytes()
    assert examine(whole, wanted)[1] == ""
    # Anywhere but at the end of an element outside of sequences, which no file tells.
    pixels = b"\xe0\x7f\x10\x00" in raw or b"\x7f\xe0\x00\x10" in raw
    deflated = examine(whole, wanted)[0] and b"1.2.840.10008.1.2.1.99" in raw
    for share in (0.9,) if deflated else (0.999, 0.9, 0.5) if pixels else (0.999,):
        path.write_bytes(raw[: int(len(raw) * share)])
        assert examine(path, wanted)[1] in PASSING, share


def test_every_file_of_pydicom_is_answered(tmp_path: Path) -> None:
    """Nothing raises, whatever the file."""
    for name in get_testdata_files("*.dcm"):
        examine(Path(name), {})


def test_uids() -> None:
    assert is_uid("1.2.840.10008.1") and not any(map(is_uid, ("", "1..2/..", ".1", "1" * 65, "a")))


def test_a_worklist(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes("\ufeffname;accessionnumber\nJos\u00e9;A1\n;A2\nx;A1\ny;\n".encode())
    assert read_worklist(path) == ("AccessionNumber", ["A1", "A2"])
    path.write_text("PatientID,AccessionNumber\n1,2\n")
    assert read_worklist(path) == ("AccessionNumber", ["2"])
    for text in ("name\nx\n", "PatientID\n*\n", "PatientID\na\\b\n", ""):
        path.write_text(text)
        with pytest.raises(DataError):
            read_worklist(path)


def test_the_throttle_holds_its_rate_and_ends() -> None:
    throttle = Throttle(1e6)
    began = time.monotonic()
    for _ in range(30):
        throttle.take(10_000)
    assert 0.2 <= time.monotonic() - began < 2.0
    threading.Timer(0.1, throttle.stop.set).start()
    with pytest.raises(Stopped):
        throttle.take(10_000_000)
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    ("table", "query", "key"),
    [
        ('[pacs.main]\nsource = "dicomweb"\n', "since = 2024-01-01", "pacs.main.url"),
        (TABLE + "tls = true\n", "since = 2024-01-01", "pacs.main.ca"),
        (TABLE + 'ca = "x.pem"\n', "since = 2024-01-01", "pacs.main.ca"),
        (TABLE + 'url = "http://x"\n', "since = 2024-01-01", "pacs.main.url"),
        (TABLE + 'key = "x"\n', "since = 2024-01-01", "pacs.main.certificate"),
        (
            '[pacs.main]\nsource = "dicomweb"\nurl = "http://x/d"\ntoken = "t"\n',
            "since = 2024-01-01",
            "pacs.main.token",
        ),
        (TABLE, "", "datasets.chest.fetch.worklist"),
        (TABLE, "since = 2024-01-02\nuntil = 2024-01-01", "datasets.chest.fetch.since"),
        (TABLE.replace("main", "other"), "since = 2024-01-01", "datasets.chest.fetch.pacs"),
        (TABLE + 'quiet_hours = ["noon"]\n', "since = 2024-01-01", "pacs.main.quiet_hours"),
    ],
)
def test_broken_rules_of_site_toml(make_site: Any, table: str, query: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_site(table, query)
    assert key in str(caught.value)


def test_a_token_that_others_read_is_refused(make_site: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc")
    (tmp_path / "token").chmod(0o644)
    from orthanc import free_ports

    table = f'[pacs.main]\nsource = "dicomweb"\nurl = "https://127.0.0.1:{free_ports(1)[0]}/d"\n'
    with pytest.raises(ConfigError, match="owner alone"):
        fetch_dataset(make_site(table + 'ca = "ca.pem"\ntoken = "token"\n'), "chest")


class _Offline:
    """A PACS whose answers are known and that sends nothing."""

    def __init__(self, *_: Any) -> None:
        self.keep = _[2]

    def session(self) -> Any:
        return self

    def retrieve(self, *_: Any) -> None:
        """Nothing comes."""

    def close(self) -> None:
        """Nothing is open."""


def test_what_a_kill_left_is_taken_over(
    make_site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whole in quarantine; renamed and not noted; half in either place; and noted."""
    from fedward_client.importer import fetch
    from fedward_client.importer.query import Found, Series

    objects = hospital(1, 6)
    study, series = objects[0].StudyInstanceUID, objects[0].SeriesInstanceUID
    found = Found([Series(study, series, "MRN1", "CT", {o.SOPInstanceUID: "" for o in objects})])
    monkeypatch.setattr(fetch, "open_source", _Offline)
    monkeypatch.setattr(fetch.Query, "run", lambda _: found)
    config = make_site(TABLE)
    root, quarantine = tmp_path / "data", tmp_path / "data" / ".quarantine"
    quarantine.mkdir(parents=True)
    places = [place_of(root, study, series, o.SOPInstanceUID) for o in objects]
    places[0].parent.mkdir(parents=True)
    (quarantine / "tmp1").write_bytes(encode(objects[0]))
    (quarantine / "tmp2.dcm").write_bytes(encode(objects[1])[:-9])
    places[2].write_bytes(encode(objects[2]))
    places[3].write_bytes(encode(objects[3])[:-9])
    places[4].write_bytes(encode(objects[4]))
    journal = Journal(tmp_path / "importer" / "chest.sqlite", root)
    journal.add(objects[4].SOPInstanceUID, "", "0" * 64, 1)
    journal.close()
    monkeypatch.setattr(fetch._Fetch, "_fetch", lambda *_: None)
    outcome = fetch_dataset(config, "chest")
    assert (outcome.here, outcome.fetched, outcome.missing) == (2, 1, 3)
    assert [place.exists() for place in places] == [True, False, True, False, True, False]
    assert not list(quarantine.iterdir()) and not outcome.refused
    assert fetch_dataset(config, "chest", dry_run=True).to_fetch == 3


def test_a_full_disk_ends_it_and_keeps_what_came(
    make_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hostile_pacs import Pacs, files, web

    left = [1 << 30] * 4 + [0] * 100
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda p: real(p)._replace(free=left.pop(0)),  # type: ignore[attr-defined]
    )
    pacs = Pacs(hospital(1))
    with web(pacs) as table:
        config = make_site(table + "associations = 1\n")
        with pytest.raises(OutputError, match="room"):
            fetch_dataset(config, "chest")
        assert len(files(config)) == 3  # the first look is before all
        left[:] = [1 << 30] * 100
        outcome = fetch_dataset(config, "chest")
    assert (outcome.here, outcome.fetched) == (3, 2)
    assert len(files(config)) == 5


def test_two_at_a_time_are_refused(make_site: Any) -> None:
    import fcntl

    config = make_site(TABLE)
    config.importer.state.mkdir()
    with (config.importer.state / "chest.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="one process at a time"):
            fetch_dataset(config, "chest")


def test_syntaxes_that_pydicom_writes_pass_the_walk(tmp_path: Path) -> None:
    for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian):
        made = build_slice("P", "1.2.3", "1.2.3.4", 1)
        made.file_meta.TransferSyntaxUID = syntax
        path = tmp_path / "x.dcm"
        made.save_as(path, enforce_file_format=True)
        assert examine(path, expected(path)) == ("1.2.3.4.1", "")
        path.write_bytes(path.read_bytes()[:-40])
        assert examine(path, {})[1] in PASSING
