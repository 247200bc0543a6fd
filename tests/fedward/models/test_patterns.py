"""Patterns mean what :mod:`fnmatch` means by them."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import example, given
from hypothesis import strategies as st

from fedward.models.patterns import matches


@given(st.text("ab.-[]!*?", max_size=8), st.text("ab.-[]!*?", max_size=8))
@example("fc.weight", "fc.*")
@example("a", "[]a]")
@example("b", "[!]a]")
@example("-", "[a-]")
@example("", "")
@example("]", "[]")
def test_as_fnmatch(name: str, pattern: str) -> None:
    assert matches(name, pattern) == fnmatchcase(name, pattern)
