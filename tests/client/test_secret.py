"""The site's secret: made once, owned by one, and good for pseudonyms."""

from __future__ import annotations

import errno
import hashlib
import hmac
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedward.errors import ConfigError, OutputError
from fedward_client.secret import Pseudonyms, existing_secret, site_secret


def test_it_is_made_once_for_its_owner(tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = site_secret(state)
    assert len(first) == 32
    assert site_secret(state) == first
    assert stat.S_IMODE((state / "site.secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert [path.name for path in state.iterdir()] == ["site.secret"]


def test_two_that_start_together_have_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: site_secret(tmp_path / "s"), range(8)))) == 1


@pytest.mark.parametrize(("mode", "length"), [(0o640, 32), (0o600, 31)])
def test_one_that_is_shared_or_short_is_refused(tmp_path: Path, mode: int, length: int) -> None:
    site_secret(tmp_path)
    path = tmp_path / "site.secret"
    path.write_bytes(b"x" * length)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"site\.state"):
        site_secret(tmp_path)


@pytest.mark.parametrize("left", ["audit", "ledger.sqlite"])
def test_one_that_is_gone_is_not_made_anew_where_others_hang_on_it(
    tmp_path: Path, left: str
) -> None:
    (tmp_path / left).touch()
    with pytest.raises(ConfigError, match=r"must be there.*Restore site\.secret from a backup"):
        site_secret(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_reading_it_needs_no_room_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = site_secret(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("fedward_client.secret.tempfile.mkstemp", full)
    assert site_secret(tmp_path) == existing_secret(tmp_path) == first
    # Room comes back, so the daemon tries again; who owns a folder does not change by itself.
    with pytest.raises(OutputError, match="No space left"):
        site_secret(tmp_path / "new")
    with pytest.raises(ConfigError, match="must be there"):
        existing_secret(tmp_path / "new")


def test_pseudonyms_are_keyed_hashes_that_tell_kinds_and_parts_apart() -> None:
    secret = b"k" * 32
    hashed = Pseudonyms(secret)
    expected = hmac.new(secret, b"patient\0issuer\0id", hashlib.sha256).hexdigest()[:32]
    assert hashed("patient", "issuer", "id") == expected
    others = {
        hashed("study", "issuer", "id"),
        hashed("patient", "issueri", "d"),
        Pseudonyms(b"l" * 32)("patient", "issuer", "id"),
    }
    assert len(others | {expected}) == 4
    assert hashed("patient", "", "") == ""
