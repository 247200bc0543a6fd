"""Finished parts of an audit: kept, private, and never those of another audit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedward_simulation.audit.store import Store


def test_parts_are_kept_for_the_same_audit_only(tmp_path: Path) -> None:
    folder, part = tmp_path / "audit", {"scores": np.arange(3.0)}
    Store(folder, {"seed": 0}).put("shadow-0", part)
    again = Store(folder, {"seed": 0}).get("shadow-0")
    assert again is not None and (again["scores"] == part["scores"]).all()
    assert Store(folder, {"seed": 1}).get("shadow-0") is None
    assert not list(folder.glob("*.npz"))


def test_a_part_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "audit", {})
    store.put("canaries", {"scores": np.arange(1000.0)})
    path = tmp_path / "audit" / "canaries.npz"
    path.write_bytes(path.read_bytes()[:-100])
    assert store.get("canaries") is None


def test_only_the_owner_reads_the_parts(tmp_path: Path) -> None:
    Store(tmp_path / "audit", {}).put("canaries", {"scores": np.zeros(1)})
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "audit").iterdir()}
    assert modes == {0o600} and (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
