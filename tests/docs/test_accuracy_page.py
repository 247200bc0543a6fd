"""``benchmarks/accuracy.md`` keeps what it says of studies that were not run this time."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fedward_server.results import Arm, StudyResults, TestFigures

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def accuracy() -> Iterator[ModuleType]:
    """The benchmark's program."""
    name, before = "accuracy_benchmark", list(sys.path)
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / "accuracy.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]
    sys.path[:] = before


def results(seed: int, auc: float) -> StudyResults:
    test = TestFigures(per_site={"a": {"auc": auc}}, pooled={"auc": auc})
    arm = Arm(name="federated", kind="federated", test=test)
    return StudyResults(
        study="x",
        plan={},
        plan_sha256="0" * 64,
        seed=seed,
        engine="local",
        device="cpu",
        primary="auc",
        parameters=7,
        arms=[arm],
    )


def test_other_studies_keep_their_lines(accuracy: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "accuracy.md"
    first, second = accuracy.CASES[:2]
    accuracy.write_page(
        {first: [results(0, 0.8), results(1, 0.8)], second: [results(0, 0.7)]}, page
    )
    page.write_text(page.read_text("utf-8") + "A note.\n", "utf-8")
    before = page.read_text("utf-8").splitlines()
    accuracy.write_page({second: [results(0, 0.9)]}, page)
    after = page.read_text("utf-8").splitlines()
    changed = [line for line in before if line not in after]
    assert changed == [f"| {second.plan} | federated | 0.700 | 0.700 | 0.703 | 0 |"]
    assert len(after) == len(before) and after[-1] == "A note."


def test_the_readme_has_the_figures_of_the_page() -> None:
    """Together and on own patients, of every study in its table."""
    page = (BENCHMARKS / "accuracy.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    known = {
        (row[0], row[1]): [cell.split(" ")[0].lstrip("0") for cell in row[2:5]] for row in rows
    }
    readme = (BENCHMARKS.parent / "README.md").read_text("utf-8")
    lines = readme.split("| study | together: federated |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 4
    for line in lines:
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        study = name.split(",")[0].replace(" 3D", "")
        federated, alone, pooled = (
            known[study, arm] for arm in ("federated", "hospitals alone, mean", "pooled")
        )
        expected = [federated[0], alone[0], pooled[0], federated[2]]
        assert cells == [*expected, federated[1], alone[1], pooled[1]], study
