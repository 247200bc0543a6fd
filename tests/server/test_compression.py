"""Studies with compressed updates: the model, the bytes, and the same result however it is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.compression import (
    compress,
    compress_model,
    decompress,
    decompress_model,
    moved,
)
from fedward.flower import identity
from fedward.models import build_model, to_arrays, traffic
from fedward.plan import Plan, plan_hash
from fedward.strategies import STRATEGIES
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.checkpoints import Checkpoints
from fedward_server.events import Event, RoundEnded
from fedward_server.job import Job
from fedward_server.results import Arm
from fedward_server.round_loop import StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
SEEDED = Runtime(randomness="seeded")
SETTINGS = {
    "fedprox": {"mu": 0.1},
    "feddyn": {"alpha": 0.1},
    "q-fedavg": {"q": 1.0, "lipschitz": 100.0},
    **{key: {"malicious": 0} for key in ("krum", "multikrum", "bulyan")},
}


@pytest.fixture(autouse=True)
def _identity() -> None:
    identity.become_server()


def job_of(plan: Plan, **more: Any) -> Job:
    return Job(plan, to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated"), **more)


def run(job: Job, sites: list[PreparedSite], workers: int = 0) -> Job:
    pool = Pool(State(SimulatedSites(sites, SEEDED)), workers)
    try:
        StudyRun(job, LocalGrid(pool, len(sites), job.site_states)).run()
    finally:
        pool.close()
    return job


@pytest.mark.parametrize(
    ("compression", "size"),
    [
        ({"method": "int8"}, lambda n, tensors: n + 4 * tensors),
        ({"method": "int8", "download": "int6"}, lambda n, tensors: n + 4 * tensors),
        (None, lambda n, tensors: 4 * n),
    ],
    ids=["up", "up and down", "none"],
)
def test_the_model_is_the_mean_of_what_arrived_and_its_bytes_are_counted(
    make_plan: Make, make_site: Make, make_order: Make, compression: Any, size: Any
) -> None:
    """Against rounds that are worked out here, from trainers that compress nothing."""
    sites = [make_site(f"site-{i}", patients=20 * i, seed=i) for i in (1, 2)]
    plan, plain = make_plan(compression=compression), make_plan()
    job = run(job_of(plan, seed=3), sites)
    model = to_arrays(build_model(plan, 0))
    shapes = {name: value.shape for name, value in model.items()}
    left: list[dict[str, Any]] = [{}, {}]
    how = plan.compression
    for round_ in (1, 2):
        whole = model
        if how is not None and how.download:
            content = compress_model(how, whole)["compressed"]
            model = decompress_model(how, content, shapes)
        mean = {name: np.zeros(shape) for name, shape in shapes.items()}
        weights = [len(site.split["train"]) for site in sites]
        for place, site in enumerate(sites):
            update, _ = Trainer(plain, site, SEEDED).train(
                model, make_order(plain, round=round_, seed=3)
            )
            if how is not None:
                rng = np.random.default_rng(0)
                sent, left[place] = compress(how, model, update, left[place], rng)
                update = moved(model, decompress(how, sent, shapes))
            for name, value in update.items():
                mean[name] += weights[place] / sum(weights) * value.astype(np.float64)
        # What was rounded away of the model on its way down stays with the aggregator.
        model = {
            name: (value + whole[name] - model[name]).astype(np.float32)
            for name, value in mean.items()
        }
    for name, value in model.items():
        np.testing.assert_allclose(job.arrays[name], value, rtol=1e-6, atol=1e-7)
    numbers = sum(value.size for value in model.values())
    assert [one.bytes_up for one in job.arm.rounds] == [2 * size(numbers, len(model))] * 2
    assert [traffic(plan, round_)[0] for round_ in (1, 2)] == [size(numbers, len(model))] * 2
    headers = 128 * (1 if how is not None and how.download else len(model))
    down = traffic(plan, 1)[1] + headers
    assert [one.bytes_down for one in job.arm.rounds] == [2 * down] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_study_broken_off_after_each_round_ends_as_one_that_was_not(
    make_plan: Make, make_site: Make, tmp_path: Path, workers: int
) -> None:
    sites = [make_site(f"site-{i}", seed=i) for i in (1, 2)]
    plan = make_plan(
        training={"rounds": 3},
        personal={"method": "ditto", "weight": 0.1},
        compression={"method": "top-k", "share": 0.05, "download": "int6"},
    )
    whole = run(job_of(plan, seed=5), sites)
    for _ in range(6):
        kept = Checkpoints(tmp_path / "study", plan_hash(plan))
        job = job_of(plan, seed=5, save=kept.save)
        kept.restore(job)
        if job.complete:
            break

        def stop_after_a_round(event: Event, job: Job = job) -> None:
            if isinstance(event, RoundEnded):
                job.stop.set()

        job.listen = stop_after_a_round
        run(job, sites, workers)
    assert job.complete and len(job.arm.rounds) == 3
    for name, value in whole.arrays.items():
        np.testing.assert_array_equal(job.arrays[name], value)
    assert all("3/residual/fc.bias" in state for state in whole.site_states.values())
    for place, state in whole.site_states.items():
        assert all(np.array_equal(v, job.site_states[place][n]) for n, v in state.items())


@pytest.mark.parametrize("name", [name for name, spec in STRATEGIES.items() if not spec.sent])
def test_every_strategy_goes_on_with_what_arrived(
    make_plan: Make, make_site: Make, name: str
) -> None:
    sites = [make_site(f"site-{i}", patients=20, seed=i) for i in (1, 2, 3)]
    base = {
        "training": {"rounds": 2, "optimizer": "sgd"},
        "strategy": {"name": name, "settings": SETTINGS.get(name, {})},
        "participation": {"sites": 3, "quorum": 3},
    }
    start = to_arrays(build_model(make_plan(**base), 0))
    plain, fine, coarse = (
        run(job_of(make_plan(**base, compression=one), seed=2), sites).arrays
        for one in (None, {"method": "int8", "download": "bfloat16"}, {"method": "int4"})
    )

    def distance(one: Any, other: Any) -> float:
        return float(np.sqrt(sum(((one[n] - other[n]) ** 2).sum() for n in start)))

    # Server optimisers divide by second moments: a small error of a small update is not small.
    assert distance(fine, plain) < distance(coarse, plain) < distance(plain, start)
    assert distance(fine, plain) < 0.1 * distance(plain, start)


def test_a_site_that_misses_rounds_goes_on_with_what_it_had_left(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    plan = make_plan(training={"rounds": 4}, compression={"method": "int4"})
    model, trainer = to_arrays(build_model(plan, 0)), Trainer(plan, make_site(), SEEDED)
    trainer.train(model, make_order(plan, round=1))
    kept = trainer.state.before(2)
    assert all(np.array_equal(v, kept[n]) for n, v in trainer.state.before(4).items())


def test_the_mean_of_the_features_travels_as_it_is(make_plan: Make) -> None:
    plan = make_plan(
        model={"feature_centering": True}, compression={"method": "top-k", "share": 0.1}
    )
    assert plan.rounds == 3
    assert [plan.compression_of(r) is not None for r in (1, 2, 3, 4)] == [False, True, True, False]
