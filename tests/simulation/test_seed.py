"""Another seed tests other patients, so that figures over seeds say how much that matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward_client.cohort.training import Preparers, preparers
from fedward_client.worker_pool import Limits
from fedward_simulation.divided import divided_sites
from fedward_simulation.options import Options

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def crew() -> Iterator[Preparers]:
    with preparers(Limits(workers=1)) as made:
        yield made


def held_out(data: Path, plan: Any, crew: Preparers, seed: int) -> dict[str, list[bytes]]:
    """The test images of each hospital."""
    how = "iid" if data.suffix == ".npz" else "folders"
    options = Options(data=data, out=data.parent / "out", seed=seed, partition=how)
    sites = divided_sites(plan, options, crew, lambda text: None).sites
    return {
        s.name: sorted(np.asarray(s.images[i]).tobytes() for i in s.split["test"]) for s in sites
    }


def test_the_seed_of_a_run_divides_the_patients_too(
    folder_data: Path, npz_data: Path, make_plan: Make, crew: Preparers
) -> None:
    plan = make_plan()
    first, again, other = (held_out(folder_data, plan, crew, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.keys() == other.keys() == {"north", "south"}
    for site, images in first.items():
        assert len(other[site]) == len(images) and other[site] != images
    # Seed 0 is the plan's own division, and the plan's seed counts beside it.
    assert held_out(folder_data, make_plan(split={"seed": 1}), crew, 0) == other
    assert held_out(folder_data, make_plan(split={"seed": 2**63 - 1}), crew, 1) == first
    # A published division stays what it is, whoever has which patient.
    parts = [held_out(npz_data, plan, crew, seed) for seed in (0, 1)]
    published = [sorted(chain.from_iterable(part.values())) for part in parts]
    assert published[0] == published[1]
