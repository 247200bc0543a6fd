"""Somebody with pictures and a spreadsheet follows the page of the first study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journey import follow, hasten, steps
from PIL import Image

from fedward_server.results import StudyResults

pytestmark = pytest.mark.integration


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    """What the page says its reader has: 28 people with two pictures each."""
    rng, rows = np.random.default_rng(0), ["Filename,Diagnosis,Patient ID"]
    (tmp_path / "chest" / "png").mkdir(parents=True)
    for place in range(56):
        sick = place // 2 % 2 == 1
        pixels = rng.integers(0, 120, (32, 32)) + 90 * sick
        name = f"scan_{place}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "chest" / "png" / name)
        rows.append(f"{name},{'opacity' if sick else 'normal'},P{place // 2}")
    (tmp_path / "chest" / "findings.csv").write_text("\n".join(rows), "utf-8")
    return tmp_path


def test_from_a_folder_of_images_to_a_report(laptop: Path, commands: Any) -> None:
    told = list(steps("first-study.md"))
    assert len(told) >= 5 and all(step.seen for step in told)
    for step in told:
        follow(step, commands, laptop, lambda: hasten(laptop))
    for name in ("study", "private"):
        text = (laptop / name / "results" / "metrics.json").read_text("utf-8")
        results = StudyResults.model_validate_json(text)
        assert results.complete
    assert [arm.kind for arm in results.arms] == ["federated"]
