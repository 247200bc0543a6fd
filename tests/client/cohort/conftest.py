"""A dataset that is indexed, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedward_client.commands.work import Work, extractor, load_site, work_on
from fedward_client.config import load_config
from fedward_client.data.files import find
from fedward_client.index.store import open_index


@pytest.fixture
def working() -> Callable[..., AbstractContextManager[Work]]:
    """Opens a dataset of a configuration."""

    def work(site: Path, name: str = "chest") -> AbstractContextManager[Work]:
        return work_on(load_site(site), name)

    return work


@pytest.fixture
def reading() -> Any:
    """Opens a dataset that is read in this process: its scan has tests of its own."""

    @contextmanager
    def work(site: Path) -> Iterator[Work]:
        config = load_config(site)
        extract = extractor(config, "chest")
        with open_index(config.site.state, "chest") as index:
            number = index.next_scan()
            index.put(map(extract, find(extract.root, skipped=True)), (), number, extract.settings)
            index.drop_before(number)
            yield Work(config, "chest", index, extract)

    return work
