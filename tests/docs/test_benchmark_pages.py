"""Benchmarks that keep a record: the page says what the record says, under the present plans."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("name", ["strategies", "attacks"])
def test_a_page_is_written_of_its_record(name: str) -> None:
    module = script(name)
    page = module.PAGE.read_text("utf-8")
    notes = page.partition(module.MARKER)[2]
    if name == "strategies":
        assert page == module.page_of(module.Record(module.RECORD), notes)
    else:
        assert page == module.page_of(json.loads(module.RECORD.read_text("utf-8")), notes)
