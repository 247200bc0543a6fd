"""A hospital's desk and a centring plan: charged as steps, released once, equal to a simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedward.dp.accounting import calibrate, epsilon_composed, epsilon_spent
from fedward.models import build_model, to_arrays
from fedward.plan import Plan, plan_from
from fedward.plan.schema import FEATURE_MEAN
from fedward.protocol import Refusal, SiteFacts, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward_client.cohort.training import prepare_cohort
from fedward_client.secret import site_secret
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

pytestmark = pytest.mark.integration
Make = Callable[..., Any]


@pytest.fixture
def plan(make_plan: Make) -> Plan:
    made: Plan = make_plan(
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        model={"feature_centering": True},
        training={
            "rounds": None,
            "learning_rate": None,
            "batch_size": 6,
            "local_epochs": None,
            "local_steps": 2,
        },
        stages=[{"name": "head", "rounds": 2, "learning_rate": 0.5, "train": ["fc.*"]}],
        privacy={
            "mechanism": "dp-sgd",
            "epsilon": 8.0,
            "delta": 1e-3,
            "clipping_norm": 1.0,
            "sampling_rate": 0.3,
            "centering_steps": 7,
        },
    )
    return made


def test_the_mean_is_charged_with_the_training_and_released_once(
    make_hospital: Make, plan: Plan
) -> None:
    hospital = make_hospital()
    facts = SiteFacts.from_flat(hospital.ask("describe", plan, 0).record)
    whole = calibrate(plan, facts.train_patients)
    assert whole.steps == 7 + 2 * 2

    def spent() -> float:
        return float(hospital.ledger.epsilon_of_study("tiny-1", 1e-3))

    first = hospital.ask("train", plan)
    assert first.kind == "update", first.record
    assert list(first.arrays) == [FEATURE_MEAN]
    assert TrainOutcome.from_flat(first.record).steps == 7
    of_steps = [
        epsilon_spent(whole.noise_multiplier, whole.sampling_rate, steps, 1e-3)
        for steps in (7, 9, 11)
    ]
    assert spent() == pytest.approx(of_steps[0])
    hospital.close()
    hospital.open()
    # Asked again, also with another model: the same mean, and no further charge.
    for model in (0, 1):
        again = hospital.ask("train", plan, model=model)
        assert again.record == first.record
        np.testing.assert_array_equal(again.arrays[FEATURE_MEAN], first.arrays[FEATURE_MEAN])
    assert spent() == pytest.approx(of_steps[0])
    for round_ in (2, 3):
        trained = hospital.ask("train", plan, round_)
        assert list(trained.arrays) == ["fc.weight", "fc.bias"]
        assert spent() == pytest.approx(of_steps[round_ - 1])
    # The whole study is one kind of mechanism to the ledger, held by the tight accountant.
    assert spent() <= 8.0
    assert spent() == pytest.approx(epsilon_composed([whole], 1e-3))
    refused = Refusal.from_flat(hospital.ask("train", plan, 1, study="tiny-2").record)
    assert refused.code is RuleCode.COHORT_BUDGET


def test_a_hospital_measures_what_a_simulated_site_measures(
    make_hospital: Make, make_order: Make, plan: Plan
) -> None:
    exact = plan_from(plan.model_dump(mode="python") | {"privacy": {"mechanism": "none"}})
    hospital, arrays = make_hospital(), to_arrays(build_model(exact, 0))
    ours = hospital.ask("train", exact)
    assert ours.kind == "update", ours.record
    site = prepare_cohort(
        hospital.config,
        "chest",
        "latest",
        exact,
        secret=site_secret(hospital.config.site.state),
        cache=hospital.folder / "simulated",
        crew=hospital.crew,
    )
    simulated, _ = Trainer(exact, site, Runtime(randomness="seeded")).train(
        arrays, make_order(exact, 1)
    )
    assert np.abs(simulated[FEATURE_MEAN]).max() > 0
    np.testing.assert_array_equal(ours.arrays[FEATURE_MEAN], simulated[FEATURE_MEAN])
