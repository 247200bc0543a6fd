"""A data format is one entry: configuration, command line, pages and container follow from it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.config import DatasetSection
from fedward_client.data import dataset as datasets
from fedward_client.data.dataset import DatasetSpec, detect, read_dataset
from fedward_client.data.readers.registry import READERS, Reader, ReaderSpec
from fedward_client.data.sample import Dataset, Image, Sample
from fedward_simulation.cli import app

ROOT = Path(__file__).parents[3]
TASK = Task(kind="classification", classes=("a", "b"))


@pytest.mark.parametrize("name", READERS)
def test_every_format_is_known_where_a_user_names_it(name: str) -> None:
    made = DatasetSection(root=Path("x"), format=name, task="classification", classes=("a", "b"))
    assert made.format == name
    pages = [(ROOT / "docs" / page).read_text("utf-8") for page in ("data.md", "simulate.md")]
    assert f"### {name}\n" in pages[0] and all(f"`{name}`" in page for page in pages)
    needed = (ROOT / "docker" / "requirements" / "trainer.txt").read_text("utf-8").splitlines()
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    client = [one.split(">")[0] for one in extra["optional-dependencies"]["client"]]
    for package in READERS[name].packages:
        assert package in needed and package in client


def test_an_unknown_format_is_refused_with_those_that_there_are() -> None:
    done = CliRunner().invoke(app, ["run", "pneumonia", "--data", ".", "--format", "jpg2"])
    assert done.exit_code == 2
    assert all(name in " ".join(done.output.split()) for name in READERS)


def test_a_format_is_added_by_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of ``.f32`` files is recognised and read."""

    def read(root: Path, task: Task, spec: DatasetSpec) -> Dataset:
        def load(file: Path) -> Image:
            return Image(np.fromfile(file, np.float32).reshape(1, 2, 2), (1.0, 1.0))

        files = sorted(root.glob("*.f32"))
        return Dataset(tuple(Sample(f.stem, lambda f=f: load(f), (0,)) for f in files), ())  # type: ignore[misc]

    raw = ReaderSpec("raw", "raw floats", lambda: Reader(lambda f: f.suffix == ".f32", read))
    np.arange(4, dtype=np.float32).tofile(tmp_path / "one.f32")
    with pytest.raises(DataError):
        detect(tmp_path)
    monkeypatch.setattr(datasets, "READERS", {**READERS, "raw": raw})
    assert detect(tmp_path) == "raw"
    (sample,) = read_dataset(DatasetSpec(tmp_path), TASK).samples
    assert sample.load().pixels.tolist() == [[[0.0, 1.0], [2.0, 3.0]]]
