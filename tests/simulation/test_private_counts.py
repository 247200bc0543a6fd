"""A simulation that is evaluated as hospitals evaluate by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedward_simulation.cli import app


@pytest.mark.integration
def test_private_counts_are_repeatable_and_state_their_error(
    tmp_path: Path, plan_file: Path, npz_data: Path
) -> None:
    def run(name: str, *more: str) -> dict[str, Any]:
        out = tmp_path / name
        words = [
            "run",
            str(plan_file),
            "--data",
            str(npz_data),
            "--partition",
            "iid",
            "--sites",
            "2",
            "--out",
            str(out),
            *more,
        ]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
        found: dict[str, Any] = metrics["arms"][0]["test"]
        return found

    exact = run("exact", "--exact")
    first, again = run("a", "--private-counts"), run("b", "--private-counts")
    assert exact["standard_errors"] == {}
    assert first == again
    assert first["standard_errors"]["accuracy"] > 0
    assert first["pooled"] != exact["pooled"]
    assert set(first["site_standard_errors"]) == set(first["per_site"])
    page = (tmp_path / "a" / "report.html").read_text()
    assert "standard error of the noise" in page
