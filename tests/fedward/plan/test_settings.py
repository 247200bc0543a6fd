from __future__ import annotations

import inspect

import pytest
from flwr.serverapp import strategy as flower

from fedward.strategies import STRATEGIES

FLOWER = {
    "fedavgm": (flower.FedAvgM, {}),
    "fedadam": (flower.FedAdam, {}),
    "fedyogi": (flower.FedYogi, {}),
    "fedadagrad": (flower.FedAdagrad, {}),
    "fedtrimmedavg": (flower.FedTrimmedAvg, {}),
    "multikrum": (flower.MultiKrum, {"keep": "num_nodes_to_select"}),
}


@pytest.mark.parametrize("name", FLOWER)
def test_defaults_are_those_of_flower(name: str) -> None:
    kind, names = FLOWER[name]
    parameters = inspect.signature(kind).parameters
    for key, setting in STRATEGIES[name].settings.items():
        if setting.default is not None:
            assert parameters[names.get(key, key)].default == setting.default


@pytest.mark.parametrize("malicious", [0, 1, 2, 5])
def test_updates_needed_follow_the_papers(malicious: int) -> None:
    assert STRATEGIES["krum"].updates_needed(malicious) == 2 * malicious + 3
    assert STRATEGIES["multikrum"].updates_needed(malicious) == 2 * malicious + 3
    assert STRATEGIES["bulyan"].updates_needed(malicious) == 4 * malicious + 3
    assert STRATEGIES["fedavg"].updates_needed(malicious) == 1


def test_limits_hold_at_their_ends() -> None:
    beta = STRATEGIES["fedtrimmedavg"].settings["beta"]
    assert beta.allows(0) and beta.allows(0.499) and not beta.allows(0.5) and not beta.allows(-1e-9)
    tau = STRATEGIES["fedadam"].settings["tau"]
    assert tau.allows(1e-9) and not tau.allows(0)
    keep = STRATEGIES["multikrum"].settings["keep"]
    assert keep.allows(1) and not keep.allows(0) and not keep.allows(1.5)


def test_numbers_have_one_form() -> None:
    mu = STRATEGIES["fedprox"].normal({"mu": 1})["mu"]
    assert mu == 1.0 and isinstance(mu, float)
    krum = STRATEGIES["krum"]
    assert isinstance(krum.normal({"malicious": 2.0})["malicious"], int)
    assert krum.normal({"malicious": 0.5}) == {"malicious": 0.5}
