"""Each example of a plan or configuration on a page has keys and values that the programs take."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from pydantic import BaseModel, ValidationError

from fedward.plan.schema import Plan
from fedward_client.config import SiteConfig
from fedward_server.config import ServerConfig

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTING: Final = re.compile(r"^(\[\[?[a-z].*\]|\w+ = .*)", re.MULTILINE)
PLACEHOLDER: Final = re.compile(r"FINGERPRINT|3f6a…")


def blocks() -> Iterator[tuple[str, str]]:
    """Page and example; they may be indented, as in lists."""
    for page in PAGES:
        fence, lines = "", list[str]()
        for line in map(str.strip, page.read_text("utf-8").splitlines()):
            if not line.startswith("```"):
                lines.append(line)
                continue
            if fence in ("```", "```toml") and SETTING.search(text := "\n".join(lines)):
                yield page.name, PLACEHOLDER.sub("0" * 64, text)
            fence, lines = "" if fence else line, []


BLOCKS: Final = list(blocks())


def wrong(model: type[BaseModel], values: dict[str, object]) -> list[str]:
    """What a model does not take; a part of a file may lack what else must be there."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        return [f"{one['loc']}: {one['msg']}" for one in error.errors() if one["type"] != "missing"]
    return []


def test_the_pages_have_examples() -> None:
    assert {page for page, _ in BLOCKS} >= {"plan.md", "site.md", "policy.md", "joining.md"}


@pytest.mark.parametrize(("page", "text"), BLOCKS)
def test_an_example_has_keys_and_values_that_are_taken(page: str, text: str) -> None:
    values = tomllib.loads(text)
    found = [wrong(model, values) for model in (Plan, SiteConfig, ServerConfig)]
    assert not min(found, key=len), found
