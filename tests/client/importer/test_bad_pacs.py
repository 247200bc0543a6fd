"""What a PACS must not do, and what the importer makes of it; the rows of docs/pacs.md."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hostile_pacs import SERVERS, Pacs, dimse, encode, files, hospital, web
from orthanc import free_ports

from fedward.errors import PacsError
from fedward_client.doctor.pacs import examine_pacs
from fedward_client.importer.fetch import fetch_dataset

PAGE = (Path(__file__).parents[3] / "docs" / "pacs.md").read_text("utf-8")
both = pytest.mark.parametrize("way", sorted(SERVERS))


def test_each_row_of_the_page_names_a_test_that_is_here() -> None:
    table = PAGE[PAGE.index("## A bad PACS") :]
    named = re.findall(r"`(test_\w+)`", table)
    assert len(named) >= 9 and set(named) <= set(globals())


def failing(config: Any) -> tuple[str, PacsError]:
    """The doctor's first line that fails, and what fetching says."""
    lines = list(examine_pacs("PACS main", config.pacs["main"]))
    assert [line.status for line in lines[:-1]] == ["pass"] * (len(lines) - 1)
    with pytest.raises(PacsError) as caught:
        fetch_dataset(config, "chest")
    return f"{lines[-1].status} {lines[-1].name}: {lines[-1].found}", caught.value


def test_nobody_there(make_site: Any) -> None:
    (port,) = free_ports(1)
    config = make_site(
        f'[pacs.main]\nsource = "dimse"\nhost = "127.0.0.1"\nport = {port}\nae_title = "PACS"\n'
    )
    line, error = failing(config)
    assert line == "fail PACS main: connection: Connection refused"
    assert "no association" in str(error)


def test_wrong_ae_title(make_site: Any) -> None:
    with dimse(Pacs(hospital(), called="OTHER")) as table:
        line, error = failing(make_site(table))
    assert line.startswith("fail PACS main: association: ")
    assert "another AE title" in line and "another AE title" in str(error)
    assert "pacs.ae_title" in error.fix


def test_refused_association(make_site: Any) -> None:
    with dimse(Pacs(hospital(), calling="OTHER")) as table:
        line, error = failing(make_site(table))
    assert "fail PACS main: association" in line and "calling AE title" in line
    assert "pacs.calling_ae_title" in error.fix


@both
def test_time_out_in_the_middle(way: str, make_site: Any) -> None:
    pacs, first = Pacs(hospital(1)), [True]

    def hangs(found: list[Any]) -> Any:
        yield from found[:2]
        if first.pop() if first else False:
            yield None
        yield from found[2:]

    pacs.sends = hangs
    with SERVERS[way](pacs) as table:
        config = make_site(table.replace("2.0", "0.5"))
        outcome = fetch_dataset(config, "chest")
    assert (outcome.fetched, outcome.missing) == (5, 0) and outcome.whole
    assert set(files(config)) == {one.SOPInstanceUID for one in pacs.objects}
    if way == "dimse":  # the second time only the rest is asked for
        assert pacs.asked == ["SERIES", "IMAGE"] and set(pacs.sent.values()) == {1}


@both
def test_always_silent(way: str, make_site: Any) -> None:
    pacs = Pacs(hospital(1), sends=lambda found: iter([None]))
    with SERVERS[way](pacs) as table, pytest.raises(PacsError, match="silence"):
        fetch_dataset(make_site(table.replace("2.0", "0.5")), "chest")


@both
def test_half_an_object(way: str, make_site: Any) -> None:
    pacs, turn = Pacs(hospital(1)), itertools.count()

    def halves(found: list[Any]) -> Any:
        if next(turn) == 0:
            yield found[0]
            half = copy.deepcopy(found[1])
            half.PixelData = half.PixelData[: len(half.PixelData) // 2]
            yield half if way == "dimse" else encode(found[1])[:-100]
            if way == "dimse":
                yield "abort"
        else:
            yield from found

    pacs.sends = halves
    with SERVERS[way](pacs) as table:
        config = make_site(table)
        outcome = fetch_dataset(config, "chest")
    assert outcome.refused == {"cut short": 1} and not outcome.missing
    lying = files(config)
    assert set(lying) == {one.SOPInstanceUID for one in pacs.objects}
    for one in pacs.objects:
        assert encode(one).endswith(lying[one.SOPInstanceUID].read_bytes()[-512:])


@both
def test_another_patient(way: str, make_site: Any) -> None:
    """Of an object, and of a study that it answers with."""
    objects = hospital(2)
    wrong = copy.deepcopy(objects[1])
    wrong.PatientID = "MRN666"
    pacs = Pacs(
        objects, sends=lambda found: iter([wrong if one is objects[1] else one for one in found])
    )
    with SERVERS[way](pacs) as table:
        config = make_site(table)
        outcome = fetch_dataset(config, "chest")
        again = fetch_dataset(config, "chest")
    assert outcome.refused == {"of another patient": 1} and outcome.fetched == 9
    assert not outcome.missing and wrong.SOPInstanceUID not in files(config)
    assert (again.refused_before, again.to_fetch) == (1, 0)  # it is not asked for each time
    pacs = Pacs(objects)
    pacs.fitting = lambda match: objects[:5]  # type: ignore[method-assign]
    (config.dataset("chest").root.parent / "list.csv").write_text("PatientID\nMRN2\n")
    with SERVERS[way](pacs) as table:
        found = fetch_dataset(make_site(table, 'worklist = "list.csv"'), "chest", dry_run=True)
    assert (found.misfits, found.objects) == (1, 0)


@both
def test_answers_without_end(way: str, make_site: Any) -> None:
    def endless(found: list[Any]) -> Any:
        for number in itertools.count(1):
            one = copy.copy(found[0])
            one.StudyInstanceUID = f"1.2.826.0.99.5.{number}"
            yield one

    pacs = Pacs(hospital(1), finds=endless)
    with SERVERS[way](pacs) as table, pytest.raises(PacsError, match="at most 40 studies"):
        fetch_dataset(make_site(table, "since = 2024-01-01\nlimit = 40"), "chest", dry_run=True)


@both
def test_same_uid_with_other_bytes(way: str, make_site: Any) -> None:
    objects = hospital(1)
    other = copy.deepcopy(objects[0])
    other.PixelData = objects[1].PixelData
    pacs = Pacs(objects, sends=lambda found: iter([*found, other, objects[1]]), more=2)
    with SERVERS[way](pacs) as table:
        config = make_site(table)
        outcome = fetch_dataset(config, "chest")
    assert outcome.refused == {"same UID, other bytes": 1}
    assert (outcome.fetched, outcome.again) == (5, 1)
    kept = files(config)[objects[0].SOPInstanceUID].read_bytes()
    assert kept.endswith(objects[0].PixelData)


def test_private_transfer_syntax(make_site: Any) -> None:
    objects = hospital(1)
    raw = encode(objects[0])
    private = raw.replace(b"1.2.840.10008.1.2.1\0", b"1.2.826.0.1.3680043")
    # The same length, so that the group's length stays right.
    assert len(private) == len(raw) - 1
    private = raw.replace(b"1.2.840.10008.1.2.1\0", b"1.2.826.0.1.3680043\0")
    pacs = Pacs(objects, sends=lambda found: iter([private, *found[1:]]))
    with web(pacs) as table:
        config = make_site(table)
        outcome = fetch_dataset(config, "chest")
    assert outcome.refused == {"transfer syntax that is not read here": 1}
    assert outcome.fetched == 4 and objects[0].SOPInstanceUID not in files(config)


@both
def test_unasked_objects(way: str, make_site: Any) -> None:
    objects = hospital(2)
    pacs = Pacs(objects[:5], sends=lambda found: iter([*found, objects[7]]), more=1)
    with SERVERS[way](pacs) as table:
        config = make_site(table)
        outcome = fetch_dataset(config, "chest")
    assert outcome.refused == {"not asked for": 1} and len(files(config)) == 5


@both
def test_an_object_without_end(way: str, make_site: Any) -> None:
    objects = hospital(1)
    huge = copy.deepcopy(objects[0])
    huge.PixelData = bytes(3 << 20)
    pacs = Pacs(objects, sends=lambda found: iter([huge, *found[1:]]))
    with SERVERS[way](pacs) as table:
        config = make_site(table + "max_object_mib = 1\n")
        with pytest.raises(PacsError, match="too large"):
            fetch_dataset(config, "chest")
    assert not list((config.dataset("chest").root / ".quarantine").iterdir())
