"""Every reason is documented, and no other text passes for one."""

from __future__ import annotations

import re
from pathlib import Path

from fedward.errors import DataError
from fedward.rule_codes import REASONS, reason_of, unusable

PAGE = Path(__file__).parents[3] / "docs" / "data.md"


def test_each_reason_has_a_row_on_the_data_page():
    table = PAGE.read_text("utf-8").split("## Why an image is left out")[1]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == REASONS


def test_only_fixed_reasons_come_through():
    assert reason_of(unusable("no mask")) == "no mask"
    assert reason_of(DataError("DOE^JANE is broken")) == "not readable"
    assert reason_of(OSError("/secret/path")) == "not readable"
