"""Every strategy by name, through real Flower messages, against arithmetic written out in numpy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from scipy.optimize import minimize

from fedward.errors import PlanError
from fedward.flower import identity
from fedward.flower.study_grid import StudyGrid
from fedward.strategies import Contribution, ServerRound, SitePast
from fedward_simulation.local import LocalGrid
from fedward_simulation.pool import Pool
from fedward_strategies.fold import Fold
from fedward_strategies.memory import memory_of
from fedward_strategies.registry import STRATEGIES, build_strategy
from fedward_strategies.rule import RuleStrategy
from fedward_strategies.settings import StrategySettings

Model = dict[str, NDArray[np.float32]]
Values = NDArray[np.float64]
SITES, SHAPES = 7, {"w": (3, 4), "b": (5,)}
WEIGHTS = np.array([10.0, 20.0, 5.0, 40.0, 15.0, 30.0, 25.0])
STEPS, ABSENT = [1, 2, 1, 4, 2, 3, 3], 2
NAMES = [f"site-{place}" for place in range(SITES)]
# How far each site was from perfect in two evaluations; the third site withheld the second one.
SHORT = np.array([[0.1, 0.2, 0.3, 0.2, 0.6, 0.1, 0.4], [0.2, 0.1, np.nan, 0.3, 0.5, 0.2, 0.3]])
AGREED = np.array([[0.5, -0.2, 0.1, -0.7, 0.0, 0.3, -0.1]])


@pytest.fixture(autouse=True)
def _identity() -> None:
    identity.become_server()


def flat(model: Model) -> Values:
    return np.concatenate([value.ravel() for value in model.values()]).astype(np.float64)


def random_model(seed: int, scale: float = 1.0) -> Model:
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}


def updates_of(model: Model, round_: int) -> list[Model]:
    """Each site's model: the shared one, moved a little; the last site is an outlier."""
    moved = []
    for site in range(SITES):
        step = random_model(100 * round_ + site, 8.0 if site == SITES - 1 else 0.3)
        moved.append({name: value + step[name] for name, value in model.items()})
    return moved


def record(model: Model) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in model.items()})


def reply(update: Model, weight: float, ask: Message) -> Message:
    content = {"arrays": record(update), "metrics": MetricRecord({"num-examples": weight})}
    return Message(RecordDict(content), reply_to=ask)  # type: ignore[arg-type]


def run(name: str, settings: dict[str, float]) -> list[tuple[Model, list[Model], Model]]:
    """Two rounds: (model before, updates, model after) of each."""
    strategy = build_strategy(name, StrategySettings(values=settings))
    grid = StudyGrid(
        nodes := LocalGrid(Pool(None, 0), SITES), nodes.get_node_ids(), threading.Event()
    )
    model, rounds = random_model(0), []
    for round_ in (1, 2):
        asked = list(strategy.configure_train(round_, record(model), ConfigRecord({}), grid))
        assert sorted(m.metadata.dst_node_id for m in asked) == grid.get_node_ids()
        for message in asked:
            identity.stamp(message)
        updates = updates_of(model, round_)
        weights = WEIGHTS
        if isinstance(strategy, RuleStrategy):
            strategy.sites = SITES + ABSENT
            pasts = {
                name: SitePast(
                    tuple(None if np.isnan(v) else v for v in SHORT[: round_ - 1, at]),
                    tuple(AGREED[: round_ - 1, at]),
                )
                for at, name in enumerate(NAMES)
            }
            favour = strategy.rule.favour(pasts)
            favoured = [w * favour.get(s, 1.0) for w, s in zip(WEIGHTS, NAMES, strict=True)]
            norms = np.linalg.norm(stacked(updates) - flat(model), axis=1).tolist()
            strategy.contributions = list(map(Contribution, favoured, STEPS, NAMES, norms))
            weights = np.array([strategy.rule.weight(one) for one in strategy.contributions])
        if STRATEGIES[name].sent:
            changes = [random_model(1000 * round_ + site) for site in range(SITES)]
            sent = [
                update | {f"change/{name}": value for name, value in change.items()}
                for update, change in zip(updates, changes, strict=True)
            ]
        else:
            sent = updates
        replies = [reply(u, w, a) for u, w, a in zip(sent, weights, asked, strict=True)]
        if not STRATEGIES[name].needs_all:
            # As the aggregator has it: updates are added to a mean as they come.
            fold = Fold()
            for one, weight in zip(sent, weights, strict=True):
                fold.add(one, float(weight))
            replies = [reply(fold.mean(), fold.weight, asked[0])]
        arrays, _ = strategy.aggregate_train(round_, replies)
        assert arrays is not None
        after = {key: array.numpy() for key, array in arrays.items()}
        rounds.append((model, updates, after))
        model = {key: value.astype(np.float32) for key, value in after.items()}
    return rounds


def stacked(updates: Iterable[Model]) -> Values:
    return np.stack([flat(update) for update in updates])


def mean(updates: Sequence[Model], weights: Values = WEIGHTS) -> Values:
    return np.asarray((weights[:, None] * stacked(updates)).sum(0) / weights.sum())


class Scaffold:
    """Karimireddy et al., 2020, algorithm 1: x + ηg mean(Δy); c + S/N mean(Δc)."""

    def __call__(self, before: Values, updates: list[Model], round_: int) -> Values:
        return np.asarray(before + 0.7 * (mean(updates) - before))


class Dynamic:
    """Acar et al., 2021, algorithm 1, lines 11 and 12."""

    h: Values | float = 0.0

    def __call__(self, before: Values, updates: list[Model], round_: int) -> Values:
        moved = stacked(updates) - before
        self.h = self.h - 0.5 / (SITES + ABSENT) * moved.sum(axis=0)
        return np.asarray(before + moved.mean(axis=0) - self.h / 0.5)


def normalised(before: Values, updates: list[Model], round_: int) -> Values:
    """Wang et al., 2020, equation 4, with the steps of SGD without momentum."""
    p, tau = WEIGHTS / WEIGHTS.sum(), np.array(STEPS, float)
    directions = (before - stacked(updates)) / tau[:, None]
    return np.asarray(before - (p @ tau) * (p @ directions))


def geometric(before: Values, updates: list[Model], round_: int) -> Values:
    """The minimum of the weighted distances, by another method than Weiszfeld's."""
    points = stacked(updates)

    def total(point: Values) -> float:
        return float(WEIGHTS @ np.linalg.norm(points - point, axis=1))

    return np.asarray(minimize(total, mean(updates), method="BFGS", tol=1e-10).x)


def clipped(before: Values, updates: list[Model], round_: int) -> Values:
    moved = stacked(updates) - before
    norms = np.linalg.norm(moved, axis=1)
    most = 1.5 * np.median(norms)
    kept = moved * np.minimum(1.0, most / norms)[:, None]
    return np.asarray(before + WEIGHTS @ kept / WEIGHTS.sum())


def fair(before: Values, updates: list[Model], round_: int) -> Values:
    """Li et al., 2020, algorithm 2, as it is written there; FedAvg before the first evaluation."""
    if round_ == 1:
        return mean(updates)
    q, lipschitz, loss = 2.0, 3.0, SHORT[0]
    delta = lipschitz * (before - stacked(updates))
    p = WEIGHTS / WEIGHTS.sum()
    h = q * loss ** (q - 1) * (delta**2).sum(axis=1) + lipschitz * loss**q
    return np.asarray(before - (p * loss**q) @ delta / (p @ h))


class Agnostic:
    """Mohri et al., 2019: ascent of the mixture by exponentiated gradients, step by step."""

    mixture: Values = WEIGHTS / WEIGHTS.sum()

    def __call__(self, before: Values, updates: list[Model], round_: int) -> Values:
        if round_ > 1:
            ascended = self.mixture * np.exp(0.7 * SHORT[0])
            self.mixture = ascended / ascended.sum()
        return np.asarray(self.mixture @ stacked(updates))


def consistent(before: Values, updates: list[Model], round_: int) -> Values:
    """Weights fall with disagreement beyond the allowance of 0.05; none is known at first."""
    agreed = AGREED[0] if round_ == 2 else np.zeros(SITES)
    return mean(updates, WEIGHTS * np.exp(-3.0 * np.maximum(0.0, -agreed - 0.05)))


class Averaged:
    """Weighted mean."""

    def __call__(self, before: Values, updates: list[Model], round_: int) -> Values:
        return mean(updates)


class Momentum:
    """v = m v + (w - mean); w - lr v."""

    velocity: Values | float = 0.0

    def __call__(self, before: Values, updates: list[Model], round_: int) -> Values:
        self.velocity = 0.6 * self.velocity + (before - mean(updates))
        return np.asarray(before - 0.5 * self.velocity)


class Adaptive:
    """Reddi et al., 2021, algorithm 2, with Flower's bias correction for Adam."""

    def __init__(self, kind: str) -> None:
        self.kind, self.m, self.v = kind, np.zeros(17), np.zeros(17)

    def __call__(self, before: Values, updates: list[Model], round_: int) -> Values:
        delta, eta, tau = mean(updates) - before, 0.2, 0.01
        beta_1 = 0.0 if self.kind == "adagrad" else 0.8
        self.m = beta_1 * self.m + (1 - beta_1) * delta
        if self.kind == "adagrad":
            self.v = self.v + delta**2
        elif self.kind == "yogi":
            self.v = self.v - 0.1 * delta**2 * np.sign(self.v - delta**2)
        else:
            self.v = 0.9 * self.v + 0.1 * delta**2
            eta *= np.sqrt(1 - 0.9 ** (round_ + 1)) / (1 - 0.8 ** (round_ + 1))
        return np.asarray(before + eta * self.m / (np.sqrt(self.v) + tau))


def median(before: Values, updates: list[Model], round_: int) -> Values:
    return np.asarray(np.sort(stacked(updates), axis=0)[SITES // 2])


def trimmed(before: Values, updates: list[Model], round_: int) -> Values:
    return np.asarray(np.sort(stacked(updates), axis=0)[2:-2].mean(axis=0))  # int(0.3 * 7) = 2


def krum_order(updates: list[Model], malicious: int) -> list[int]:
    points, scores = stacked(updates), []
    for site, point in enumerate(points):
        others = np.delete(points, site, axis=0)
        distances = np.sort(((others - point) ** 2).sum(axis=1))
        scores.append(distances[: SITES - malicious - 2].sum())
    return [int(i) for i in np.argsort(scores)]


def krum(before: Values, updates: list[Model], round_: int) -> Values:
    return flat(updates[krum_order(updates, 2)[0]])


def multikrum(before: Values, updates: list[Model], round_: int) -> Values:
    best = krum_order(updates, 2)[:3]
    return mean([updates[i] for i in best], WEIGHTS[best])


def bulyan(before: Values, updates: list[Model], round_: int) -> Values:
    kept = stacked([updates[i] for i in krum_order(updates, 1)[: SITES - 2]])
    middle = np.median(kept, axis=0)
    out = np.empty_like(middle)
    for place in range(len(out)):
        near = sorted(kept[:, place], key=lambda value: abs(value - middle[place]))
        out[place] = np.mean(near[: SITES - 4])
    return out


MOMENTS = {"eta": 0.2, "beta_1": 0.8, "beta_2": 0.9, "tau": 0.01}
CASES: dict[str, tuple[dict[str, float], Callable[[], Callable[..., Values]]]] = {
    "fedavg": ({}, Averaged),
    "fedprox": ({"mu": 0.1}, Averaged),
    "fedavgm": ({"server_learning_rate": 0.5, "server_momentum": 0.6}, Momentum),
    "fedadam": (MOMENTS, lambda: Adaptive("adam")),
    "fedyogi": (MOMENTS, lambda: Adaptive("yogi")),
    "fedadagrad": ({"eta": 0.2, "tau": 0.01}, lambda: Adaptive("adagrad")),
    "scaffold": ({"server_learning_rate": 0.7}, Scaffold),
    "feddyn": ({"alpha": 0.5}, Dynamic),
    "fednova": ({}, lambda: normalised),
    "q-fedavg": ({"q": 2.0, "lipschitz": 3.0}, lambda: fair),
    "afl": ({"eta": 0.7}, Agnostic),
    "consistency": ({"rate": 3.0, "allowance": 0.05}, lambda: consistent),
    "rfa": ({"iterations": 200}, lambda: geometric),
    "norm-clipping": ({"factor": 1.5}, lambda: clipped),
    "fedmedian": ({}, lambda: median),
    "fedtrimmedavg": ({"beta": 0.3}, lambda: trimmed),
    "krum": ({"malicious": 2}, lambda: krum),
    "multikrum": ({"malicious": 2, "keep": 3}, lambda: multikrum),
    "bulyan": ({"malicious": 1}, lambda: bulyan),
}


def test_every_strategy_of_the_plan_is_there_and_tested() -> None:
    assert set(STRATEGIES) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_rounds_equal_the_arithmetic(name: str) -> None:
    settings, make = CASES[name]
    rule = make()
    for round_, (before, updates, after) in enumerate(run(name, settings), start=1):
        expected = rule(flat(before), updates, round_)
        np.testing.assert_allclose(flat(after), expected, rtol=2e-5, atol=2e-5)
        assert list(after) == list(SHAPES)
        assert all(after[key].shape == shape for key, shape in SHAPES.items())


def test_robust_strategies_leave_the_outlier_out() -> None:
    for name in ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "rfa"):
        before, updates, after = run(name, CASES[name][0])[0]
        outlier = np.abs(flat(updates[-1]) - flat(before)).max()
        assert np.abs(flat(after) - flat(before)).max() < outlier / 5


def test_the_control_variate_moves_by_the_share_of_sites_that_take_part() -> None:
    make = build_strategy("scaffold", StrategySettings())
    assert isinstance(make, RuleStrategy)
    before = np.zeros(17)
    for round_ in (1, 2):
        change = random_model(round_)
        make.sites, make.contributions = 4, [Contribution(1.0, 1)] * 3
        make.rule.combine(
            ServerRound(
                model=random_model(0),
                updates=[random_model(0)],
                sent={"change": change},
                contributions=make.contributions,
                sites=4,
            )
        )
        before = before + 0.75 * flat(change)
        kept = memory_of(make, STRATEGIES["scaffold"], tuple(SHAPES))
        np.testing.assert_allclose(flat(kept), before, rtol=1e-6)


def test_fednova_counts_what_momentum_adds_to_a_step() -> None:
    from fedward.strategies.fednova import effective_steps

    for steps in (1, 2, 7):
        moved = velocity = 0.0
        for _ in range(steps):  # a gradient of 1 each time
            velocity = 0.9 * velocity + 1.0
            moved += velocity
        assert effective_steps(steps, 0.9) == pytest.approx(moved)
        assert effective_steps(steps, 0.0) == steps


def test_a_site_without_a_figure_counts_as_an_ordinary_one() -> None:
    pasts = {"a": SitePast((0.2, 0.4)), "b": SitePast((0.6, None)), "c": SitePast((None, None))}
    afl = build_strategy("afl", StrategySettings(values={"eta": 1.0}))
    fair = build_strategy("q-fedavg", StrategySettings(values={"q": 1.0, "lipschitz": 1.0}))
    assert isinstance(afl, RuleStrategy) and isinstance(fair, RuleStrategy)
    assert afl.rule.favour(pasts) == pytest.approx({"a": np.exp(-0.2), "b": np.exp(0.2), "c": 1.0})
    # The last figure that is known; without any, the mean of the others'.
    assert fair.rule.favour(pasts) == pytest.approx({"a": 0.8, "b": 1.2, "c": 1.0})
    nobody = {"a": SitePast((None,)), "b": SitePast((None,))}
    assert set(afl.rule.favour(nobody).values()) == {1.0} and not fair.rule.favour(nobody)


def test_fedprox_tells_the_sites_its_weight() -> None:
    strategy = build_strategy("fedprox", StrategySettings(values={"mu": 0.25}))
    nodes = LocalGrid(Pool(None, 0), 2)
    grid: Any = StudyGrid(nodes, nodes.get_node_ids(), threading.Event())
    for message in strategy.configure_train(1, record(random_model(0)), ConfigRecord({}), grid):
        assert message.content.config_records["config"]["proximal-mu"] == 0.25


def test_an_unknown_name_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match="fedsomething"):
        build_strategy("fedsomething", StrategySettings())
