"""What each site adds to a round, from its updates: against Shapley values by permutations."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedward.strategies.consistency import disagreement
from fedward_server.report.stats import contributed
from fedward_server.results import Arm, Round, SiteRound
from fedward_strategies.contribution import SIZE, Sketch, added

Values = NDArray[np.float64]


def sketch(seed: int, *arrays: NDArray[Any]) -> Values:
    made = Sketch((seed, 1), sum(array.size for array in arrays))
    for array in arrays:
        made.add(array)
    return made.kept().astype(np.float64)


def test_the_pull_is_a_shapley_value_and_the_agreement_a_cosine() -> None:
    rng = np.random.default_rng(3)
    sites = ["d", "a", "c", "b"]
    parts = {site: [rng.normal(size=(3, 5)), rng.normal(size=7)] for site in sites}
    shares = dict(zip(sites, (0.4, 0.1, 0.3, 0.2), strict=True))
    moved = {s: np.concatenate([one.ravel() for one in parts[s]]) for s in sites}
    found = added({s: sketch(0, *parts[s]) for s in sites}, shares)

    def worth(group: tuple[str, ...]) -> float:
        steps = [shares[s] * moved[s] for s in group]
        return float((np.sum(steps, axis=0) ** 2).sum() - sum((one**2).sum() for one in steps))

    orders = list(permutations(sites))
    for site in sites:
        gains = []
        for order in orders:
            before = order[: order.index(site)]
            gains.append(worth((*before, site)) - (worth(before) if before else 0.0))
        assert found[site].pull == pytest.approx(np.mean(gains), rel=1e-5)
        others = sum(shares[s] * moved[s] / np.linalg.norm(moved[s]) for s in sites if s != site)
        cosine = moved[site] @ others / np.linalg.norm(moved[site]) / np.linalg.norm(others)
        assert found[site].agreement == pytest.approx(cosine, rel=1e-5)
    assert sum(one.pull for one in found.values()) == pytest.approx(worth(tuple(sites)), rel=1e-5)


def test_a_site_alone_and_updates_of_nothing() -> None:
    assert added({"a": np.ones(3)}, {"a": 1.0}) == {} == added({}, {})
    found = added({"a": np.zeros(3), "b": np.ones(3)}, {"a": 0.5, "b": 0.5})
    assert set(found.values()) == {(0.0, 0.0)}


def test_sketches_keep_inner_products_of_what_is_larger_than_they_are() -> None:
    rng = np.random.default_rng(1)
    size = 700_000  # several chunks, and arrays that end within one
    common = rng.normal(size=size)
    one, other = (common + 2.0 * rng.normal(size=size) for _ in range(2))
    errors = []
    for seed in range(4):
        kept = [sketch(seed, v[:300_001].reshape(-1, 1), v[300_001:]) for v in (one, other)]
        assert all(one.shape == (SIZE,) for one in kept)
        error = kept[0] @ kept[1] - one @ other
        errors.append(error / np.linalg.norm(one) / np.linalg.norm(other))
        assert kept[0] @ kept[0] == pytest.approx(one @ one, rel=0.05)
    # Four times the standard deviation that is stated; and other draws err otherwise.
    assert np.abs(errors).max() < 4 * np.sqrt(2 / SIZE) and np.ptp(errors) > 1e-4


def test_noise_of_its_own_is_no_contribution() -> None:
    """As privacy adds it: the loudest site does not contribute most."""
    rng, pulls = np.random.default_rng(0), dict.fromkeys("abc", 0.0)
    common = rng.normal(size=400)
    for _ in range(60):
        loud = {"a": 1.0, "b": 1.0, "c": 6.0}
        moved = {s: common + n * rng.normal(size=400) for s, n in loud.items()}
        for site, one in added(moved, dict.fromkeys("abc", 1 / 3)).items():
            pulls[site] += one.pull
    total = sum(pulls.values())
    assert [pulls[s] / total for s in "abc"] == pytest.approx([1 / 3] * 3, abs=0.05)


def test_contributions_of_a_study_are_sums_over_the_rounds_of_a_site() -> None:
    def told(round_: int, **pulls: float | None) -> Round:
        sites = {
            name: SiteRound(
                patients=1,
                images=1,
                steps=1,
                seconds=0.0,
                pull=pull,
                agreement=None if pull is None else pull / 10,
            )
            for name, pull in pulls.items()
        }
        return Round(round=round_, stage="all", seconds=0.0, sites=sites)

    rounds = [told(1, a=3.0, b=1.0), told(2, a=None), told(3, a=4.0, b=2.0, c=-2.0)]
    found = contributed(Arm(name="t", kind="federated", rounds=rounds))
    assert {s: one.share for s, one in found.items()} == {"a": 7 / 8, "b": 3 / 8, "c": -2 / 8}
    assert found["a"].agreement == pytest.approx(0.35) and found["a"].rounds == 2
    against = contributed(Arm(name="t", kind="federated", rounds=[told(1, a=-1.0, b=-1.0)]))
    assert {one.share for one in against.values()} == {None}


def test_disagreement_adds_up_and_is_made_good() -> None:
    assert disagreement((-0.5, -0.5, None, -0.5), 0.0) == pytest.approx(1.5)
    assert disagreement((-0.5, 0.9, -0.2), 0.0) == pytest.approx(0.2)
    assert disagreement((-0.05, 0.05) * 9, 0.1) == 0.0 == disagreement((), 0.0)
