"""Work that nobody counted: rounds beyond those that train, answers beyond the one approved.

The attacker holds the coordinator's key, and signs orders that the plan's own numbers do not rule
out at first sight: to train in a round that only tests, and to evaluate, at a hospital that agreed
to one test of the finished model, every model on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedward.dp.accounting import calibrate
from fedward.models import build_model, to_arrays
from fedward.plan.schema import Plan
from fedward.protocol import Refusal
from fedward.rule_codes import RuleCode
from fedward_client.link.messages import TrainerMessage
from fedward_client.training.runtime import Runtime
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}


class Hospital:
    """The hospital's own service, which believes every signature."""

    def __init__(self, site: Any, plan: Plan, make_order: Make) -> None:
        self.plan, self._order = plan, make_order
        self.sites = SimulatedSites([site], Runtime(randomness="seeded"))
        self.trainer = self.sites.trainer_of(site, plan)
        self._model = to_arrays(build_model(plan, 0))
        self._context = Context(1, 7, {"partition-id": 0}, RecordDict(), {})

    def ask(self, what: str, round_: int, **more: Any) -> TrainerMessage:
        order = self._order(self.plan, round_, task=what, **more)
        packet = TrainerMessage("order", dict(order.to_flat()), self._model)
        return self.sites.answer(self._context, what, packet)

    def refused(self, what: str, round_: int, code: RuleCode, **more: Any) -> Refusal:
        answer = self.ask(what, round_, **more)
        assert answer.kind == "refusal", (what, round_, answer.kind)
        refusal = Refusal.from_flat(answer.record)
        assert refusal.code == code, refusal.rule
        return refusal

    def tested(self) -> dict[str, np.ndarray]:
        """The model whose figures leave in the last round: what the hospital trained alone."""
        order = self._order(self.plan, self.plan.alone_round, task="evaluate", part="test")
        return dict(self.trainer.model_of(self._model, order))


@pytest.mark.parametrize("method", [{}, {"method": "ditto", "weight": 0.5}])
def test_a_round_that_only_tests_trains_nothing(
    make_plan: Make, make_site: Make, make_order: Make, method: dict[str, Any]
) -> None:
    """It cost no steps, and left the model that is tested next trained by as many again."""
    site = make_site()
    plan = make_plan(
        training={"rounds": 1, "batch_size": 12},
        privacy=PRIVATE,
        personal={"alone": True, **method},
    )
    hospital = Hospital(site, plan, make_order)
    update = hospital.ask("train", 1)
    assert update.record["steps"] == calibrate(plan, site.patients_in("train")).steps
    before = hospital.tested()
    for round_ in range(2, plan.last_round + 2):
        refusal = hospital.refused("train", round_, RuleCode.ROUNDS)
        assert (refusal.charged, refusal.values["rounds"]) == (False, 1)
    for name, value in hospital.tested().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_hospital_that_only_evaluates_answers_one_test(
    make_plan: Make, make_site: Make, make_order: Make
) -> None:
    """It answered each validation, and the tests of models that it does not have."""
    plan = make_plan(personal={"method": "fedper", "alone": True})
    hospital = Hospital(make_site(), plan, make_order)
    for round_, part in ((1, "validation"), (2, "validation"), (3, "test"), (4, "test")):
        assert plan.is_evaluated(round_, part)
        hospital.refused("evaluate", round_, RuleCode.EVALUATE_ONLY, part=part, evaluate_only=True)
    assert hospital.ask("evaluate", 0, part="test", evaluate_only=True).kind == "counts"
