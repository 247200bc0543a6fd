"""What an object must be, the query's own parts, and the rules of site.toml."""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hostile_pacs import build_slice, encode, hospital
from pydicom.data import get_testdata_file
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RTDoseStorage,
)

from fedward.errors import ConfigError, DataError, OutputError
from fedward_client.importer.check import (
    COMPRESSED,
    OTHER,
    PASSING,
    PATIENT,
    SYNTAXES,
    Expected,
    examine,
)
from fedward_client.importer.fetch import fetch_dataset, place_of
from fedward_client.importer.journal import Journal
from fedward_client.importer.query import read_worklist
from fedward_client.importer.source import Stopped, Throttle, is_uid

FILES = Path(get_testdata_file("CT_small.dcm")).parent  # type: ignore[arg-type]
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = pydicom.dcmread(path)
        except pydicom.errors.InvalidDicomError:
            return {}
        names = ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality")
        said = Expected(*(str(read.get(n) or "").strip() for n in names))
        return {str(read.get("SOPInstanceUID")): said}


def is_readable(path: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pydicom.dcmread(path).pixel_array.size > 0
        except Exception:  # pydicom raises nearly anything on a broken file
            return False


def test_every_cut_is_seen_and_whole_files_pass(tmp_path: Path) -> None:
    """Of all files of pydicom; an image may be cut anywhere, also at the end of an element."""
    path, images, others = tmp_path / "x.dcm", 0, 0
    more = [Path(get_testdata_file(n)) for n in ("liver.dcm", "emri_small_RLE.dcm")]  # type: ignore[arg-type]
    for whole in [*sorted(FILES.glob("*.dcm")), *more]:
        reason = examine(whole, expected(whole))[1]
        if reason in PASSING:
            assert not is_readable(whole), whole.name
        elif reason in ("", OTHER):  # OTHER: without a study
            ends = ends_of_elements(whole)
            images, others = images + bool(ends), others + (not ends)
            size, deflated = whole.stat().st_size, "dfl" in whole.name
            # A deflated file ends with bytes that nobody needs; only an image has a last element.
            shares = (0.9, 0.5) if deflated else (0.999, 0.9, 0.5) if ends else (0.999,)
            cuts = {size - (1 << 8 * deflated), *(int(size * share) for share in shares), *ends}
            shutil.copyfile(whole, path)
            path.chmod(0o600)
            for cut in sorted(cuts, reverse=True):
                os.truncate(path, cut)
                assert examine(path, {})[1] in PASSING, (whole.name, cut, size)
    assert images >= 55 and others >= 10


def ends_of_elements(path: Path) -> list[int]:
    """Of an image: where its elements end before the pixels, the last twenty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = pydicom.dcmread(path, stop_before_pixels=True)
        if not read.get("Rows") or read.SOPClassUID == RTDoseStorage:  # pixels are optional
            return []
        if read.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
            return [path.stat().st_size // 3]
        known = [read.get_item(tag) for tag in pydicom.dcmread(path, stop_before_pixels=True)._dict]
    return [one.value_tell + one.length for one in known if isinstance(one, RawDataElement)][-20:]


@pytest.mark.parametrize("kind", ["no group length", "filled up", "items without VRs"])
def test_what_writers_do_and_pydicom_reads_is_taken(kind: str, tmp_path: Path) -> None:
    path, made = tmp_path / "x.dcm", build_slice("P", "1.2.3", "1.2.3.4", 1)
    if kind == "items without VRs":
        item = pydicom.Dataset()
        item.CodeValue, item.CodeMeaning = "1", "x" * 60
        made.ProcedureCodeSequence = [item]
        made["ProcedureCodeSequence"].is_undefined_length = True
        item.is_undefined_length_sequence_item = True
    raw = encode(made)
    if kind == "no group length":
        raw = raw[:132] + raw[144:]
    elif kind == "filled up":
        raw += bytes(3)
    else:
        named = b"\x08\x00\x00\x01SH\x02\x00", b"\x08\x00\x04\x01LO\x3c\x00"
        assert all(raw.count(one) == 1 for one in named)
        for one in named:
            raw = raw.replace(one, one[:4] + one[6:] + b"\0\0")
    path.write_bytes(raw)
    assert is_readable(path) and examine(path, expected(path)) == ("1.2.3.4.1", "")
    for cut in (4, 40, 520, 560):
        path.write_bytes(raw[:-cut])
        assert examine(path, {})[1] in PASSING


def test_a_frame_that_is_missing_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    made = pydicom.dcmread(get_testdata_file("emri_small_RLE.dcm"))  # type: ignore[arg-type]
    frames = list(generate_frames(made.PixelData, number_of_frames=int(made.NumberOfFrames)))
    for some, reason in ((frames, ""), (frames[:-1], "cut short")):
        made.PixelData = encapsulate(some)
        made.save_as(path)
        assert examine(path, expected(path))[1] == reason


@pytest.mark.parametrize("deep", [1, 31])
def test_only_what_stands_outside_of_sequences_is_compared(deep: int, tmp_path: Path) -> None:
    """An object of another patient with the right one in an item, however deep."""
    path, made = tmp_path / "x.dcm", build_slice("OTHER", "1.2.3", "1.2.3.4", 1)
    inner = pydicom.Dataset()
    inner.PatientID, inner.Modality = "P", "MR"
    for _ in range(deep):
        outer = pydicom.Dataset()
        outer.ReferencedPatientSequence = [inner]
        outer["ReferencedPatientSequence"].is_undefined_length = True
        inner.is_undefined_length_sequence_item = True
        inner = outer
    made.update(inner)  # before and behind what counts, by its tag
    path.write_bytes(encode(made))
    said = Expected("1.2.3", "1.2.3.4", "P", "CT")
    assert examine(path, {"1.2.3.4.1": said})[1] == PATIENT
    assert examine(path, {"1.2.3.4.1": replace(said, patient="OTHER")})[1] == ""


@pytest.mark.parametrize("charset", ["ISO_IR 100", "ISO 2022 IR 87", "ISO_IR 192"])
def test_a_patient_of_another_character_set(charset: str, tmp_path: Path) -> None:
    name = "Jos\u00e9" if charset == "ISO_IR 100" else "\u5c71\u7530"
    path, made = tmp_path / "x.dcm", build_slice(name, "1.2.3", "1.2.3.4", 1)
    made.SpecificCharacterSet = ["", charset] if "2022" in charset else charset
    path.write_bytes(encode(made))
    said = Expected("1.2.3", "1.2.3.4", name, "CT")
    assert examine(path, {"1.2.3.4.1": said})[1] == ""
    assert examine(path, {"1.2.3.4.1": replace(said, patient="other")})[1] == PATIENT


def test_every_file_of_pydicom_is_answered() -> None:
    """Nothing raises, whatever the file."""
    for path in FILES.rglob("*"):
        if path.is_file():
            examine(path, {})


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
