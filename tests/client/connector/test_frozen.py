"""Frozen arrays at a hospital's connector: kept by digest, bounded, asked for when gone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedward.errors import ProtocolError
from fedward.tensors import Arrays, digest, pack
from fedward_client.connector.frozen import FrozenArrays, Lacking


def arrays(fill: float) -> Arrays:
    return {"stem.weight": np.full((4, 8), fill, np.float32), "bn.count": np.array(3)}


def test_what_is_kept_comes_back_whole(tmp_path: Path) -> None:
    held, kept = FrozenArrays(tmp_path / "frozen"), arrays(1.5)
    with pytest.raises(Lacking):
        held.get(digest(kept))
    held.keep(digest(kept), kept)
    found = FrozenArrays(tmp_path / "frozen").get(digest(kept))  # also after a restart
    assert digest(found) == digest(kept)


def test_arrays_of_another_digest_are_not_kept(tmp_path: Path) -> None:
    held = FrozenArrays(tmp_path / "frozen")
    with pytest.raises(ProtocolError, match="digest that their order names"):
        held.keep(digest(arrays(1.0)), arrays(2.0))
    assert not (tmp_path / "frozen").exists()


@pytest.mark.parametrize("name", ["../secret", "", "a" * 64, "A" * 64])
def test_a_name_that_is_no_digest_opens_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(pack(arrays(1.0)).tobytes())
    held = FrozenArrays(tmp_path / "frozen")
    held.keep(digest(arrays(2.0)), arrays(2.0))
    with pytest.raises(Lacking):
        held.get(name)
    assert (tmp_path / "secret").exists()


@pytest.mark.parametrize("damage", [b"", b"no tensors", pack(arrays(9.0)).tobytes()])
def test_damaged_arrays_are_asked_for_again(tmp_path: Path, damage: bytes) -> None:
    held, kept = FrozenArrays(tmp_path), arrays(1.0)
    held.keep(digest(kept), kept)
    (tmp_path / digest(kept)).write_bytes(damage)
    with pytest.raises(Lacking):
        held.get(digest(kept))


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    size = pack(arrays(0.0)).nbytes
    held, names = FrozenArrays(tmp_path, most_bytes=2 * size), []
    for number in range(3):
        names.append(digest(arrays(number)))
        held.keep(names[-1], arrays(number))
        os.utime(tmp_path / names[-1], (number, number))
        if number == 1:
            held.get(names[0])  # used again: the second one goes first
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2]}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * size
    small = FrozenArrays(tmp_path / "small", most_bytes=size - 1)
    small.keep(names[0], arrays(0))
    with pytest.raises(Lacking):
        small.get(names[0])
