"""The wheel: what it holds, and that its commands work without a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = {
    "fedward",
    "fedward_client",
    "fedward_server",
    "fedward_simulation",
    "fedward_strategies",
}


def test_the_wheel_puts_only_names_of_ours_into_site_packages(installed: Path) -> None:
    found = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert found == PACKAGES


@pytest.mark.integration
def test_a_ready_study_is_found_by_its_name_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = "from fedward_simulation.cli import main; main()"
        # -S: without the editable install; the packages that are needed come by their path.
        paths = [str(installed), *(p for p in sys.path if p.endswith("site-packages"))]
        return subprocess.run(
            [sys.executable, "-S", "-c", code, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )

    done = simulate("plan", "check", "pneumonia")
    assert done.returncode == 0, done.stderr
    assert "pneumonia" in done.stdout
    missing = simulate("plan", "check", "pneumonja")
    assert missing.returncode == 10, missing.stdout
    assert "ready studies are blood-cells" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert (installed / "fedward" / "studies" / "pneumonia.toml").is_file()  # an aggregator's too
