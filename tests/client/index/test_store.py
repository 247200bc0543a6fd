"""The index file: what is put in comes out, and nothing half ever does."""

from __future__ import annotations

import math
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedward.errors import OutputError
from fedward_client.index.extract import FileFacts
from fedward_client.index.store import open_index

FACTS = FileFacts("a" * 32, 7, 8, 9, reason="", spacing=(0.5, 1.25), low=-3.5, synthetic=True)


def test_facts_come_out_as_they_were_put_in(tmp_path: Path) -> None:
    with open_index(tmp_path, "chest") as index:
        index.put([FACTS], [], 1)
        (found,) = index.facts()
    assert math.isnan(found.high)
    assert repr(found) == repr(FACTS)


def test_facts_are_found_by_reason(tmp_path: Path) -> None:
    with open_index(tmp_path, "chest") as index:
        index.put([FACTS, FileFacts("b", 1, 1, 1, reason="too large")], [], 1)
        assert [f.path for f in index.facts("too large")] == ["b"]
        assert [f.path for f in index.facts("")] == ["a" * 32]
        assert index.reason("b") == "too large"
        assert index.count() == len(list(index.facts())) == 2


def test_a_file_is_known_by_its_size_times_and_settings(tmp_path: Path) -> None:
    with open_index(tmp_path, "chest") as index:
        index.put([FACTS], [], 1, "s")
        assert index.is_known(FACTS.path, 7, 8, 9, "s")
        for other in [(6, 8, 9, "s"), (7, 0, 9, "s"), (7, 8, 0, "s"), (7, 8, 9, "t")]:
            assert not index.is_known(FACTS.path, *other)
        assert not index.is_known("b", 7, 8, 9, "s")


def test_what_a_scan_did_not_meet_goes(tmp_path: Path) -> None:
    with open_index(tmp_path, "chest") as index:
        index.put([FACTS, FileFacts("b", 1, 1, 1), FileFacts("c", 1, 1, 1)], [], index.next_scan())
        number = index.next_scan()
        index.put([FileFacts("b", 2, 2, 2)], [FACTS.path], number)
        assert index.drop_before(number) == 1
        assert {f.path for f in index.facts()} == {FACTS.path, "b"}


def test_an_interrupted_transaction_leaves_nothing_and_hinders_none(tmp_path: Path) -> None:
    def interrupted() -> Iterator[FileFacts]:
        yield FACTS
        raise KeyboardInterrupt

    with open_index(tmp_path, "chest") as index:
        with pytest.raises(KeyboardInterrupt):
            index.put(interrupted(), [], 1)
        assert index.count() == 0
        index.put([FACTS], [], 1)
        assert index.count() == 1


def test_it_is_its_owners_alone(tmp_path: Path) -> None:
    with open_index(tmp_path / "new" / "state", "chest") as index:
        index.put([FACTS], [], 1)
        inside = list((tmp_path / "new" / "state").rglob("*"))
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in inside}
    assert modes == {
        "index": 0o700,
        "chest.sqlite": 0o600,
        "chest.sqlite-wal": 0o600,
        "chest.sqlite-shm": 0o600,
    }
    assert stat.S_IMODE((tmp_path / "new" / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize(("version", "kept"), [(1, False), (99, None)])
def test_an_older_index_is_begun_anew_and_a_later_one_refused(
    tmp_path: Path, version: int, kept: bool | None
) -> None:
    with open_index(tmp_path, "chest") as index:
        index.put([FACTS], [], 1)
    with sqlite3.connect(tmp_path / "index" / "chest.sqlite") as other:
        other.execute(f"PRAGMA user_version = {version}")
    other.close()
    if kept is None:
        with pytest.raises(OutputError, match="index again"):
            open_index(tmp_path, "chest")
        return
    with open_index(tmp_path, "chest") as index:
        assert index.count() == 0
        index.put([FACTS], [], 1)


def test_a_full_index_says_so_without_a_path(tmp_path: Path) -> None:
    with open_index(tmp_path, "chest") as index:
        index.connection.execute("PRAGMA max_page_count = 8")
        many = [FileFacts(f"{k:032d}", 1, 1, 1, digest="d" * 64) for k in range(2000)]
        with pytest.raises(OutputError, match="Free some space") as caught:
            index.put(many, [], 1)
        assert str(tmp_path) not in str(caught.value)
        assert index.count() == 0
