"""The site's secret: made once, owned by one, and good for pseudonyms."""

from __future__ import annotations

import hashlib
import hmac
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client.secret import Pseudonyms, site_secret
from fedward.errors import ConfigError


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


def test_pseudonyms_are_keyed_hashes_that_tell_kinds_and_parts_apart() -> None:
    secret = b"k" * 32
    hashed = Pseudonyms(secret)
    expected = hmac.new(secret, b"patient\0issuer\0id", hashlib.sha256).hexdigest()[:32]
    assert hashed("patient", "issuer", "id") == expected
    others = {hashed("study", "issuer", "id"), hashed("patient", "issueri", "d"),
              Pseudonyms(b"l" * 32)("patient", "issuer", "id")}  # fmt: skip
    assert len(others | {expected}) == 4
    assert hashed("patient", "", "") == ""
