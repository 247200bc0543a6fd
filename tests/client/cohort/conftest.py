"""A dataset that is indexed, in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from client.commands.work import Work, load_site, work_on


@pytest.fixture
def working() -> Callable[..., AbstractContextManager[Work]]:
    """Opens a dataset of a configuration."""

    def work(site: Path, name: str = "chest") -> AbstractContextManager[Work]:
        return work_on(load_site(site), name)

    return work
