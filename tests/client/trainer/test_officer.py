"""What the site's officer sees before a decision, and can read after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedward.plan.load import from_canonical, plan_from, plan_hash
from fedward.plan.schema import Plan
from fedward_client.audit.log import audit_folder
from fedward_client.audit.verify import entries
from fedward_client.commands.study_card import card_lines
from fedward_client.policy.approvals import Approvals
from fedward_client.trainer.admin import Admin

Make = Callable[..., Any]
MANUAL = 'approval = "manual"'
POLICY = "max_epsilon_per_cohort = 100.0\nmax_delta = 0.01"


def admin_of(hospital: Any) -> Admin:
    return Admin(
        hospital.config, hospital.desk, hospital.approvals, hospital.ledger, hospital.audit
    )


def test_pending_says_what_for_with_whom_on_what_and_at_which_price(
    make_hospital: Make, private_plan: Plan
) -> None:
    hospital = make_hospital(POLICY, rule=MANUAL)
    study = private_plan.study.model_copy(
        update={"title": "Opacities", "intended_use": "To find opacities.\n  limits  none"}
    )
    plan = private_plan.model_copy(update={"study": study})
    hospital.ask("describe", plan, 0)
    (card,) = admin_of(hospital).do("pending", {}, "officer")["pending"]
    assert (card["title"], card["network"], card["rounds"]) == (
        "Opacities",
        plan.model.name,
        plan.rounds,
    )
    assert card["dataset"] == "chest" and card["patients"] == 24
    told = card["privacy"]
    assert told["epsilon"] == plan.privacy.epsilon and told["left"] == 100.0
    assert told["left_after"] == 100.0 - (plan.privacy.epsilon or 0.0)
    assert told["evaluation_left_after"] == told["evaluation_left"] - plan.metrics.epsilon
    limits = {one["limit"]: (one["asked"], one["allowed"]) for one in card["limits"]}
    assert limits["max_epsilon_per_study"] == (plan.privacy.epsilon, 8.0)
    assert limits["max_delta"] == (plan.privacy.delta, 0.01)
    assert limits["minimum_patients"] == (24, 10)
    lines = list(card_lines(card))
    text = "\n".join(lines)
    assert card["coordinator"] in text and plan_hash(plan) in text  # in full
    assert "model parameters and the counts" in text and "never an image" in text
    # A coordinator writes the purpose: it cannot pass for another line of the card.
    assert sum(line.startswith("  limits") for line in lines) == 1


def test_pending_says_that_the_site_would_train_models_of_its_own(
    make_hospital: Make, plan: Plan
) -> None:
    hospital = make_hospital(rule=MANUAL)
    content = plan.model_dump(mode="python")
    content["personal"] = {"method": "fine-tuning", "rounds": 1, "alone": True}
    hospital.ask("describe", plan_from(content), 0)
    (card,) = admin_of(hospital).do("pending", {}, "officer")["pending"]
    told = "\n".join(card_lines(card))
    assert "own_models: fine-tuning and alone, policy true" in told


def test_a_plan_is_kept_and_can_be_read_after_the_decision(
    make_hospital: Make, private_plan: Plan
) -> None:
    hospital = make_hospital(POLICY, rule=MANUAL)
    hospital.ask("describe", private_plan, 0)
    admin = admin_of(hospital)
    admin.do("approve", {"study": "tiny-1"}, "officer")
    hospital.close()
    hospital.open()
    shown = admin_of(hospital).do("plan", {"study": "tiny-1"}, "officer")["study"]
    assert shown["state"] == "approved" and shown["by"] == "officer"
    assert from_canonical(shown["text"]) == private_plan
    assert plan_hash(private_plan) in shown["words"]


def test_a_plan_that_was_changed_on_the_disk_is_not_shown(
    make_hospital: Make, private_plan: Plan
) -> None:
    hospital = make_hospital(POLICY, rule=MANUAL)
    hospital.ask("describe", private_plan, 0)
    (kept,) = (hospital.config.site.state / "plans").iterdir()
    kept.write_text(kept.read_text("utf-8").replace('"epsilon":', '"epsilon":1'), "utf-8")
    shown = admin_of(hospital).do("plan", {"study": "tiny-1"}, "officer")["study"]
    assert "plan" not in shown and shown["plan_hash"] == plan_hash(private_plan)


def test_plans_that_nobody_knows_any_more_are_removed(
    make_hospital: Make, private_plan: Plan, plan: Plan
) -> None:
    hospital = make_hospital(POLICY, rule=MANUAL)
    hospital.ask("describe", private_plan, 0)
    approvals = Approvals(hospital.config.site.state)
    approvals.settle("tiny-1", "denied", "officer")
    hospital.ask("describe", plan, 0, study="tiny-2")
    names = {path.stem for path in (hospital.config.site.state / "plans").iterdir()}
    assert names == {plan_hash(plan)}


def test_a_study_that_asks_again_and_again_is_written_down_once(
    make_hospital: Make, plan: Plan
) -> None:
    hospital = make_hospital(rule=MANUAL)

    def refusals() -> list[tuple[Any, Any]]:
        log = entries(audit_folder(hospital.config.site.state))
        return [(e.fields["study"], e.fields["kind"]) for e in log if e.event == "refused"]

    for _ in range(4):
        hospital.ask("describe", plan, 0)
    assert refusals() == [("tiny-1", "pending")]
    hospital.approvals.settle("tiny-1", "approved", "officer")
    assert hospital.ask("describe", plan, 0).kind == "facts"
    hospital.approvals.settle("tiny-1", "denied", "officer")
    for _ in range(3):
        hospital.ask("describe", plan, 0)
    assert refusals() == [("tiny-1", "pending"), ("tiny-1", "policy")]
