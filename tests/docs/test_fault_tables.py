"""A page that says what happens after a fault names the test that shows it; the test is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADING = "\n## What happens when\n"
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if HEADING in page.read_text()]


@pytest.fixture(scope="module")
def known() -> set[str]:
    files = list((ROOT / "tests").rglob("test_*.py"))
    names = {path.name for path in files}
    for path in files:
        names |= set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE))
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_test_that_a_page_names_is_there(page: Path, known: set[str]) -> None:
    named = set(re.findall(r"`(test_\w+(?:\.py)?)`", page.read_text()))
    assert named <= known, named - known


def test_each_line_of_a_fault_table_names_a_test() -> None:
    for name in ("aggregator.md", "daemon.md"):
        text = (ROOT / "docs" / name).read_text().partition(HEADING)[2]
        rows = re.findall(r"^\|.*\|$", text.partition("\n## ")[0], re.MULTILINE)[2:]
        assert len(rows) > 8, name
        for row in rows:
            assert "`test_" in row or "none ran here" in row, row
