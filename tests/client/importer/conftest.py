"""A site that fetches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_pacs import SITE

from fedward_client.config import SiteConfig, load_config


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., SiteConfig]:
    """Writes site.toml and reads it."""

    def make(pacs: str, query: str = "since = 2024-01-01") -> SiteConfig:
        path = tmp_path / "site.toml"
        path.write_text(SITE.format(pacs=pacs, query=query))
        return load_config(path, datasets_here=False)

    return make
