"""A hospital that sends bytes which no compression makes, or which stand for a hostile update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from unguarded import UnguardedSites

from fedward.compression import COMPRESSED
from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.job import Job
from fedward_server.results import Arm
from fedward_server.round_loop import StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool

Make = Callable[..., Any]
Bytes = NDArray[np.uint8]
BROKEN = "compressed as its plan says"


def scaled(factor: float) -> Callable[[Bytes], Any]:
    """All scales of an int8 update times a factor: 14 arrays of the small network."""

    def change(content: Bytes) -> Any:
        scales = content[:56].view("<f4") * np.float32(factor)
        return np.concatenate([scales.astype("<f4").view(np.uint8), content[56:]])

    return change


def placed(place: int) -> Callable[[Bytes], Any]:
    """A sparse update with its last place moved."""

    def change(content: Bytes) -> Any:
        made, count = content.copy(), len(content) // 6
        made[4 * count - 4 : 4 * count] = np.array([place], "<u4").view(np.uint8)
        return made

    return change


@pytest.mark.parametrize(
    ("method", "change", "reason"),
    [
        ("int8", lambda c: c[:-1], BROKEN),
        ("int8", lambda c: np.zeros(10**6, np.uint8), BROKEN),
        ("int8", lambda c: c.astype(np.float32), BROKEN),
        ("int8", scaled(float("nan")), BROKEN),
        ("int8", scaled(-1.0), BROKEN),
        ("int8", scaled(float("inf")), BROKEN),
        ("int8", scaled(1e30), "within a distance of the model"),
        ("int8", scaled(100.0), "near the median of its round"),
        ("top-k", placed(0), BROKEN),
        ("top-k", placed(2**31), BROKEN),
        ("bfloat16", lambda c: np.full_like(c, 0xFF), "must be finite"),
    ],
    ids=[
        "short",
        "long",
        "floats",
        "scale not a number",
        "scale below 0",
        "scale infinite",
        "huge",
        "scaled up",
        "a place twice",
        "a place far out",
        "not numbers",
    ],
)
def test_a_hostile_update_costs_its_site_the_round_and_nobody_else(
    make_plan: Make,
    make_site: Make,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    change: Callable[[Bytes], Any],
    reason: str,
) -> None:
    identity.become_server()
    compression = {"method": method, **({"share": 0.1} if method == "top-k" else {})}
    plan = make_plan(
        training={"rounds": 1},
        compression=compression,
        participation={"sites": 3, "quorum": 2, "retries": 0},
    )
    train = Trainer.train

    def lying(self: Trainer, arrays: Any, order: Any) -> Any:
        update, outcome = train(self, arrays, order)
        if self.site.name == "site-3":
            update = {COMPRESSED: change(update[COMPRESSED])}
        return update, outcome

    monkeypatch.setattr(Trainer, "train", lying)
    sites = [make_site(f"site-{i}", patients=20, seed=i) for i in (1, 2, 3)]
    job = Job(plan, to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated"))
    job.most_change = 1000.0
    pool = Pool(State(UnguardedSites(sites, Runtime(randomness="seeded"))), 0)
    try:
        StudyRun(job, LocalGrid(pool, 3, job.site_states)).run()
    finally:
        pool.close()
    (failure,) = job.arm.rounds[0].failures
    assert failure.site == "site-3" and reason in failure.reason
    assert list(job.arm.rounds[0].sites) == ["site-1", "site-2"]
    assert all(np.isfinite(value).all() for value in job.arrays.values())
