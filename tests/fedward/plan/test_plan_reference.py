from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from fedward.plan import schema
from fedward.strategies import STRATEGIES
from tools.docs.plan import plan_reference

PAGE = Path(__file__).parents[3] / "docs" / "plan.md"
SECTIONS = [
    item
    for item in vars(schema).values()
    if isinstance(item, type) and issubclass(item, schema.Section) and item is not schema.Section
]


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text("utf-8") == plan_reference(), (
        "regenerate: python -m tools.docs.plan > docs/plan.md"
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_row_with_a_meaning(section: type[BaseModel]) -> None:
    rows = re.findall(r"^\| `([a-z0-9_]+)` \|(.*)\|$", plan_reference(), re.MULTILINE)
    described = {name for name, rest in rows if re.split(r"(?<!\\)\|", rest)[-1].strip()}
    assert set(section.model_fields) <= described


def test_every_strategy_and_setting_has_a_row() -> None:
    text = plan_reference()
    table = text[text.index("## Strategies") : text.index("## Rules")]
    for strategy, spec in STRATEGIES.items():
        assert f"| `{strategy}` |" in table
        assert all(f"`{name}`" in table for name in spec.settings)
    key = schema.Strategy.model_json_schema()["properties"]["name"]
    assert set(key["enum"]) == set(STRATEGIES)


def test_tables_have_as_many_cells_as_columns() -> None:
    width = 0
    for line in plan_reference().splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (width and cells) or cells == width, line
        width = cells


def test_links_lead_somewhere() -> None:
    text = plan_reference()
    anchors = set(re.findall(r'<a id="([^"]+)">', text))
    assert set(re.findall(r"\(#([^)]+)\)", text)) <= anchors
    for page in re.findall(r"\(([a-z]+\.md)\)", text):
        assert (PAGE.parent / page).is_file()


def test_every_privacy_key_is_explained() -> None:
    text = (PAGE.parent / "privacy.md").read_text("utf-8")
    for key in set(schema.Privacy.model_fields) - {"mechanism", "unit"}:
        assert f"`{key}`" in text or f"`privacy.{key}`" in text or key in {"epsilon", "delta"}
    for page in re.findall(r"\(([a-z]+\.md)\)", text):
        assert (PAGE.parent / page).is_file()
