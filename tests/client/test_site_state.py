"""What strategies keep at a site: durable, by study, plan and cohort, with the last rounds."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.errors import OutputError, ProtocolError
from fedward_client.site_state import HISTORY, SiteStates


def arrays(value: float, size: int = 4) -> dict[str, Any]:
    return {"own/w": np.full((size,), value, np.float32)}


def values(found: dict[str, Any]) -> list[float]:
    return [float(value.flat[0]) for value in found.values()]


def test_a_round_starts_from_what_the_last_one_left_also_in_a_new_process(tmp_path: Path) -> None:
    state = SiteStates(tmp_path).of("s", "p", "c")
    assert state.before(1) == {}
    state.keep(1, arrays(1.0))
    state.keep(2, arrays(2.0))
    again = SiteStates(tmp_path).of("s", "p", "c")
    assert values(again.before(3)) == [2.0]
    assert values(again.before(7)) == [2.0]  # the site took no part in between
    for other in (("t", "p", "c"), ("s", "q", "c"), ("s", "p", "d")):
        assert SiteStates(tmp_path).of(*other).before(3) == {}
    assert (tmp_path / "site_state.sqlite").stat().st_mode & 0o077 == 0


def test_a_round_that_is_asked_again_starts_from_where_it_started(tmp_path: Path) -> None:
    state = SiteStates(tmp_path).of("s", "p", "c")
    for round_ in (1, 2, 3, 4):
        state.keep(round_, arrays(float(round_)))
    assert values(state.before(4)) == [3.0]
    assert values(state.before(3)) == [2.0]
    state.keep(3, arrays(30.0))
    assert values(state.before(4)) == [30.0]  # what round 4 left is superseded
    assert state.before(1) == {}
    with pytest.raises(ProtocolError, match="must hold the state"):
        SiteStates(tmp_path).of("s", "p", "c").before(2)  # gone: no more than a few are kept
    with sqlite3.connect(tmp_path / "site_state.sqlite") as sql:
        assert sql.execute("SELECT count(*) FROM states").fetchone()[0] <= HISTORY


def test_a_captured_order_that_is_sent_again_takes_no_study_back(tmp_path: Path) -> None:
    state = SiteStates(tmp_path).of("s", "p", "c")
    for round_ in (1, 2, 3, 4, 5):
        state.keep(round_, arrays(float(round_)))
    for captured in (1, 2):
        with pytest.raises(ProtocolError, match="must hold the state"):
            state.before(captured)
    assert values(state.before(4)) == [3.0]
    state.keep(4, arrays(4.0))  # the same order gives the same state
    assert values(state.before(6)) == [5.0]


def test_a_site_that_joined_late_starts_afresh_where_it_joined(tmp_path: Path) -> None:
    state = SiteStates(tmp_path).of("s", "p", "c")
    state.keep(5, arrays(5.0))
    assert state.before(5) == {} and state.before(3) == {}
    assert values(state.before(6)) == [5.0]


def test_what_was_used_longest_ago_makes_room_and_is_not_taken_for_new(tmp_path: Path) -> None:
    states = SiteStates(tmp_path, most_bytes=20_000)
    first, second = states.of("first", "p", "c"), states.of("second", "p", "c")
    first.keep(1, arrays(1.0, 2000))
    second.keep(1, arrays(2.0, 2000))
    first.keep(2, arrays(3.0, 500))
    assert values(first.before(2)) == [1.0]
    states.of("third", "p", "c").keep(1, arrays(4.0, 2000))
    assert values(first.before(3)) == [3.0]
    with pytest.raises(ProtocolError, match="must hold the state"):
        second.before(2)
    with pytest.raises(OutputError, match="must have room"):
        first.keep(3, arrays(5.0, 6000))
    assert values(first.before(3)) == [3.0]  # what could not be kept changed nothing


def test_a_study_that_has_ended_leaves_nothing(tmp_path: Path) -> None:
    states = SiteStates(tmp_path)
    states.forget("s")
    assert not list(tmp_path.iterdir())
    states.of("s", "p", "c").keep(1, {"own/w": np.frombuffer(b"of a patient" * 9000, np.uint8)})
    states.of("t", "p", "c").keep(1, arrays(1.0))
    states.close()
    size = (tmp_path / "site_state.sqlite").stat().st_size
    states.forget("s")
    assert values(states.of("t", "p", "c").before(2)) == [1.0]
    with pytest.raises(ProtocolError, match="must hold the state"):
        states.of("s", "p", "c").before(2)
    states.close()
    file = tmp_path / "site_state.sqlite"
    assert b"of a patient" not in file.read_bytes() and file.stat().st_size < size


def test_a_changed_state_is_not_used(tmp_path: Path) -> None:
    SiteStates(tmp_path).of("s", "p", "c").keep(1, arrays(1.0))
    with sqlite3.connect(tmp_path / "site_state.sqlite") as sql:
        sql.execute("UPDATE states SET content = zeroblob(length(content))")
    with pytest.raises(ProtocolError, match="must hold the state"):
        SiteStates(tmp_path).of("s", "p", "c").before(2)
    (tmp_path / "site_state.sqlite").write_bytes(b"x" * 5000)
    (tmp_path / "site_state.sqlite-wal").unlink(missing_ok=True)
    with pytest.raises(OutputError, match="must have room"):
        SiteStates(tmp_path).of("s", "p", "c").before(2)


def test_killed_while_it_writes_the_last_round_stands(tmp_path: Path) -> None:
    SiteStates(tmp_path).of("s", "p", "c").keep(1, arrays(1.0))
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        states = SiteStates(tmp_path)
        with states.using() as sql:
            sql.execute("UPDATE states SET content = zeroblob(9)")
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert values(SiteStates(tmp_path).of("s", "p", "c").before(2)) == [1.0]


def test_a_simulation_takes_it_along(tmp_path: Path) -> None:
    state = SiteStates().of("", "p", "")
    assert state.to_arrays() == {}
    for round_ in (2, 3, 4, 5):
        state.keep(round_, arrays(float(round_)))
    other = SiteStates().of("", "p", "")
    other.keep(9, arrays(9.0))
    other.from_arrays(state.to_arrays())
    assert values(other.before(6)) == [5.0]
    assert values(other.before(4)) == [3.0]
    for long_ago in (2, 3):
        with pytest.raises(ProtocolError):
            other.before(long_ago)
    other.from_arrays({})
    assert other.before(6) == {}
