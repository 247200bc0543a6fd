"""Five hospitals, each in a network of its own, against the same study on one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.integration
Make = Callable[..., Any]
FIVE = (1, 2, 3, 4, 5)

CLASSIFICATION: dict[str, Any] = {
    "study": {"name": "chest"},
    "task": {"classes": ["clear", "opacity"]},
    "preprocessing": {"size": [32, 32]},
    "split": {"given": None},
    "participation": {"sites": 5, "quorum": 5, "deadline": 120.0},
}
SEGMENTATION: dict[str, Any] = {
    **CLASSIFICATION,
    "study": {"name": "lungs"},
    "task": {"kind": "segmentation", "classes": ["lung"]},
    "model": {"name": "unet", "channels": [4, 8]},
    "training": {"rounds": 2, "loss": "dice_ce"},
    "metrics": {"report": ["dice", "iou"], "primary": "dice"},
}
REAL: dict[str, Any] = {
    **SEGMENTATION,
    "study": {"name": "real"},
    "preprocessing": {"size": [64, 64]},
}


@pytest.mark.parametrize(
    "kind", [CLASSIFICATION, SEGMENTATION, REAL], ids=["chest", "lungs", "real images"]
)
def test_five_hospitals_make_the_model_of_the_simulation_bit_for_bit(
    federation: Any,
    make_plan: Make,
    tmp_path: Path,
    kind: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    if kind is REAL:
        request.getfixturevalue("shared_data")
    plan = make_plan(**kind)
    names = federation.ready(*FIVE, dataset=plan.study.name)
    study = federation.submit(plan, ",".join(names), tmp_path, "--seed", 5)
    found = federation.finish(study)
    assert found["study"]["state"] == "finished", found
    assert [sorted(one["sites"]) for one in found["rounds"]] == [names] * 2

    alone = federation.simulate(plan, tmp_path / "alone", 5, *FIVE)
    assert alone.model is not None
    delivered = federation.model(study, tmp_path)
    assert delivered.keys() == alone.model.keys()
    for name, value in alone.model.items():
        np.testing.assert_array_equal(delivered[name], value)
    url = f"/v1/studies/{study}/results"
    told = federation.service.get(url, federation.service.token).json()["arms"][0]
    expected = alone.results.arms[0].model_dump(mode="json")
    # What a site's policy rounds and withholds, the simulation under it does as well.
    assert told["test"] == expected["test"]
    for here, there in zip(found["rounds"], expected["rounds"], strict=True):
        assert here["validation"] == there["validation"]
        assert here["train_loss"] == there["train_loss"]


def test_privacy_costs_what_the_simulation_says_and_a_replayed_study_nothing(
    federation: Any, make_plan: Make, tmp_path: Path
) -> None:
    plan = make_plan(
        **{
            **CLASSIFICATION,
            "study": {"name": "private"},
            "training": {"batch_size": 6, "local_epochs": None, "local_steps": 2},
            "privacy": {
                "mechanism": "dp-sgd",
                "epsilon": 8.0,
                "delta": 1e-3,
                "clipping_norm": 1.0,
                "sampling_rate": 0.3,
            },
        }
    )
    names = federation.ready(*FIVE)
    study = federation.submit(plan, ",".join(names), tmp_path, "--seed", 5)
    found = federation.finish(study)
    assert found["study"]["state"] == "finished", found
    url = f"/v1/studies/{study}/results"
    told = federation.service.get(url, federation.service.token).json()["arms"][0]

    alone = federation.simulate(plan, tmp_path / "alone", 5, *FIVE)
    expected = alone.results.arms[0].model_dump(mode="json")
    assert sorted(told["privacy"]) == names
    assert told["privacy"] == expected["privacy"]
    assert all(0 < spent["epsilon"] <= 8.0 for spent in told["privacy"].values())
    for here, there in zip(found["rounds"], expected["rounds"], strict=True):
        assert sorted(here["sites"]) == sorted(there["sites"])
        for site, one in here["sites"].items():
            other = there["sites"][site]
            for key in ("patients", "images", "steps", "epsilon"):
                assert one[key] == other[key], (site, key)
    assert told["test"]["images"] == expected["test"]["images"]
    # The noise is the hospitals' own: the same study twice is not the same model.
    assert alone.model is not None
    delivered = federation.model(study, tmp_path)
    assert any(not np.array_equal(delivered[name], value) for name, value in alone.model.items())

    # Whoever replays the study's orders hears again what was released, and it costs nothing.
    before = federation.daemons[3].call("budget")
    again = federation.replay(study, plan, 5, tmp_path)
    assert again.complete
    for name, value in delivered.items():
        np.testing.assert_array_equal(again.average[name], value)
    assert federation.daemons[3].call("budget") == before


def test_each_hospital_has_a_network_of_its_own(federation: Any) -> None:
    if federation.network.why_not:
        pytest.skip(federation.network.why_not)
    federation.ready(*FIVE)
    for number, daemon in federation.daemons.items():
        assert federation.network.interfaces(number) == ["eth0"]
        inside = {
            which: Path(f"/proc/{pid}/ns/net").readlink()
            for which, pid in daemon.children().items()
        }
        assert len({*inside.values(), Path("/proc/self/ns/net").readlink()}) == 3, inside


def test_who_is_not_named_receives_nothing(
    federation: Any, make_plan: Make, tmp_path: Path
) -> None:
    federation.ready(*FIVE)
    before = {number: federation.orders(number) for number in FIVE}
    plan = make_plan(**{**CLASSIFICATION, "participation": {"sites": 2, "quorum": 2}})
    study = federation.submit(plan, "hospital 2,hospital 4", tmp_path)
    found = federation.finish(study)
    assert [sorted(one["sites"]) for one in found["rounds"]] == [["hospital 2", "hospital 4"]] * 2
    after = {number: federation.orders(number) for number in FIVE}
    # Described, trained twice, measured twice and at the end.
    assert {n: after[n] - before[n] for n in after} == {1: 0, 2: 6, 3: 0, 4: 6, 5: 0}
