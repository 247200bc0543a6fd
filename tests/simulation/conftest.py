"""Hospitals as folders of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder_data(tmp_path: Path) -> Path:
    """Two hospitals, 12 pictures of each class in class folders."""
    rng = np.random.default_rng(3)
    for hospital in ("north", "south"):
        for label, name in enumerate(("no", "yes")):
            folder = tmp_path / "data" / hospital / name
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 120, (16, 16)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")
    return tmp_path / "data"
