"""The trainer's desk over a real frozen cohort."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward.errors import ProtocolError
from fedward.plan.load import SCHEMA_VERSION, canonical, plan_from
from fedward.plan.schema import Plan
from fedward.protocol import EvaluateOutcome, Refusal, RoundOrder, SiteFacts, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward.signing import encoded_public_key, sign_order
from fedward_client.audit.log import audit_folder, audit_key
from fedward_client.audit.verify import entries, verify
from fedward_client.commands.study_card import card_lines
from fedward_client.link.messages import TrainerMessage
from fedward_client.trainer.admin import Admin

Make = Callable[..., Any]
pytestmark = pytest.mark.integration


def refused(packet: TrainerMessage, kind: str, words: str) -> None:
    assert packet.kind == "refusal", packet.record
    refusal = Refusal.from_flat(packet.record)
    assert refusal.kind == kind
    assert words in refusal.rule, refusal.rule


def told(hospital: Any) -> list[str]:
    return [one.event for one in entries(audit_folder(hospital.config.site.state))]


def test_a_study_is_described_trained_and_measured(make_hospital: Make, plan: Plan) -> None:
    hospital = make_hospital()
    facts = SiteFacts.from_flat(hospital.ask("describe", plan, 0).record)
    assert (facts.site, facts.patients) == ("north", 24)
    answer = hospital.ask("train", plan)
    outcome = TrainOutcome.from_flat(answer.record)
    assert outcome.patients == facts.train_patients
    assert all(np.isfinite(value).all() for value in answer.arrays.values())
    counts = hospital.ask("evaluate", plan, 1, part="validation")
    assert EvaluateOutcome.from_flat(counts.record).images == facts.validation_images
    assert set(told(hospital)) >= {"plan", "decision", "charge", "sent"}
    state = hospital.config.site.state
    assert verify(audit_folder(state), audit_key(state)).whole
    # The seed alone decides, so a simulation of the same study can be compared.
    again = hospital.ask("train", plan)
    for name, value in answer.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], value)


def test_an_evaluation_is_answered_once_and_the_answer_is_kept(
    make_hospital: Make, plan: Plan
) -> None:
    hospital = make_hospital()
    first = hospital.ask("evaluate", plan, 1)
    outcome = EvaluateOutcome.from_flat(first.record)
    assert (outcome.unit, outcome.noise) == (1, 0.5)  # ε = 2 for each of two validations
    assert outcome.epsilon == 2.0 and list(first.arrays) == ["scores"]
    hospital.close()
    hospital.open()
    again = hospital.ask("evaluate", plan, 1)
    assert again.record == first.record
    np.testing.assert_array_equal(again.arrays["scores"], first.arrays["scores"])
    refused(hospital.ask("evaluate", plan, 1, model=1), "budget", "once, with one model")
    assert hospital.ledger.evaluations.epsilon_of_study("tiny-1") == 2.0
    assert hospital.ask("evaluate", plan, 2).kind == "counts"
    assert hospital.ask("evaluate", plan, 0, part="test").kind == "counts"
    # Validation and test patients are different people: 2 + 2 for the ones, 4 for the others.
    assert hospital.ledger.evaluations.epsilon_of_study("tiny-1") == 4.0
    told = [
        one
        for one in entries(audit_folder(hospital.config.site.state))
        if one.event == "evaluation"
    ]
    assert [one.fields["epsilon"] for one in told] == [2.0, 2.0, 4.0]


@pytest.mark.parametrize(("round_", "part"), [(0, "validation"), (3, "validation"), (1, "test")])
def test_only_the_evaluations_of_the_plan_are_answered(
    make_hospital: Make, plan: Plan, round_: int, part: str
) -> None:
    hospital = make_hospital()
    answer = hospital.ask("evaluate", plan, round_, part=part)
    refused(answer, "protocol", "rounds that its plan names")
    assert "evaluation" not in told(hospital)


def test_evaluations_of_all_studies_share_a_budget(make_hospital: Make, plan: Plan) -> None:
    hospital = make_hospital("max_evaluation_epsilon_per_cohort = 10.0")
    for study in ("tiny-1", "tiny-2"):
        assert hospital.ask("evaluate", plan, 0, part="test", study=study).kind == "counts"
    # The third study would end at 12: it is told before its first round.
    refused(hospital.ask("describe", plan, 0, study="tiny-3"), "budget", "budget for them")
    refused(hospital.ask("evaluate", plan, 0, part="test", study="tiny-3"), "budget", "for them")
    greedy = plan.model_copy(update={"metrics": plan.metrics.model_copy(update={"epsilon": 9.0})})
    refused(hospital.ask("describe", greedy, 0, study="tiny-4"), "policy", "ε of evaluations")


def test_the_tests_of_own_models_share_the_budget_of_the_one_test(
    make_hospital: Make, plan: Plan
) -> None:
    hospital = make_hospital("max_evaluation_epsilon_per_cohort = 10.0")
    content = plan.model_dump(mode="python") | {"personal": {"method": "fedper", "alone": True}}
    personal = plan_from(content)
    assert hospital.ask("train", personal, 1).kind == "update"
    for round_ in personal.tests:
        answer = hospital.ask("evaluate", personal, round_, part="test")
        assert EvaluateOutcome.from_flat(answer.record).epsilon == pytest.approx(4.0 / 3)
    assert hospital.ledger.evaluations.epsilon_of_study("tiny-1") == pytest.approx(4.0)
    assert hospital.ask("evaluate", plan, 0, part="test", study="tiny-2").kind == "counts"
    # It would end at 12, though its first test alone would not: told before its first round.
    refused(hospital.ask("describe", personal, 0, study="tiny-3"), "budget", "budget for them")


def test_a_hospital_that_only_evaluates_is_charged_for_its_one_test_alone(
    make_hospital: Make, private_plan: Plan
) -> None:
    # The study's training is beyond the policy and the budget; its one test is not.
    hospital = make_hospital(
        "max_epsilon_per_study = 1.0\nmax_epsilon_per_cohort = 1.0\nminimum_sites = 2"
        "\nmax_evaluation_epsilon_per_cohort = 4.0"
    )
    refused(
        hospital.ask("describe", private_plan, 0, study="tiny-2"), "policy", "site allows a study"
    )
    only = {"evaluate_only": True}
    assert hospital.ask("describe", private_plan, 0, **only).kind == "facts"
    refused(hospital.ask("train", private_plan, 1, **only), "protocol", "only evaluates")
    answer = hospital.ask("evaluate", private_plan, 0, part="test", **only)
    assert EvaluateOutcome.from_flat(answer.record).epsilon == 4.0
    assert hospital.ledger.epsilon_of_study("tiny-1", 1e-3) == 0.0
    assert hospital.ledger.evaluations.epsilon_of_study("tiny-1") == 4.0
    refused(hospital.ask("train", private_plan, 1), "policy", "site allows a study")


def test_who_approved_an_evaluation_has_not_approved_training(
    make_hospital: Make, private_plan: Plan
) -> None:
    hospital = make_hospital(
        "max_epsilon_per_cohort = 100.0\nmax_delta = 0.01", rule='approval = "manual"'
    )
    only = {"evaluate_only": True}
    refused(hospital.ask("describe", private_plan, 0, **only), "pending", "approved")
    admin = Admin(
        hospital.config, hospital.desk, hospital.approvals, hospital.ledger, hospital.audit
    )
    (card,) = admin.do("pending", {}, "officer")["pending"]
    told = "\n".join(card_lines(card))
    assert "none at this site: it only evaluates" in told and "nothing is trained here" in told
    assert not {one["limit"] for one in card["limits"]} & {"require_privacy", "max_delta"}
    admin.do("approve", {"study": "tiny-1"}, "officer")
    assert hospital.ask("describe", private_plan, 0, **only).kind == "facts"
    refused(hospital.ask("train", private_plan, 1), "pending", "approved")
    (wider,) = hospital.approvals.pending()
    assert not wider.evaluate_only


def test_an_evaluation_that_breaks_off_is_tried_a_few_times(
    make_hospital: Make, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = make_hospital()

    def fail(*given: Any, **named: Any) -> Any:
        raise OSError("no disk")

    with monkeypatch.context() as broken:
        broken.setattr("fedward_client.training.trainer.evaluate", fail)
        refused(hospital.ask("evaluate", plan, 1), "error", "unexpected")
    assert hospital.ask("evaluate", plan, 1).kind == "counts"
    with monkeypatch.context() as broken:
        broken.setattr("fedward_client.training.trainer.evaluate", fail)
        for _ in range(3):
            refused(hospital.ask("evaluate", plan, 2), "error", "unexpected")
    refused(hospital.ask("evaluate", plan, 2), "budget", "a few times")


def test_a_policy_may_let_exact_counts_out(make_hospital: Make, plan: Plan) -> None:
    hospital = make_hospital('counts = "minimum-cells"', "count_noise = 0.0")
    exact = hospital.ask("evaluate", plan, 1)
    assert set(exact.arrays) == {"scores", "confusion", "calibration", "loss"}
    outcome = EvaluateOutcome.from_flat(exact.record)
    assert outcome.noise is None and outcome.epsilon is None
    assert exact.arrays["loss"][1] == outcome.images
    assert hospital.ledger.evaluations.epsilon_of_study("tiny-1") is None
    assert hospital.ledger.evaluations.without_bound(hospital.ledger.cohorts()[0][0]) == ["tiny-1"]


def test_small_cells_are_withheld_where_counts_have_no_epsilon(
    make_hospital: Make, plan: Plan
) -> None:
    hospital = make_hospital('counts = "minimum-cells"', "minimum_count = 3")
    answer = hospital.ask("evaluate", plan, 0, part="test")
    outcome = EvaluateOutcome.from_flat(answer.record)
    assert (outcome.unit, outcome.noise, outcome.epsilon) == (1, 1.0, None)
    cells = answer.arrays["scores"]
    assert (cells[cells != 0] >= 3).all()


def test_a_repeated_private_round_gives_the_same_update_even_after_a_restart(
    make_hospital: Make, private_plan: Plan
) -> None:
    hospital = make_hospital()
    first = hospital.ask("train", private_plan)
    assert first.kind == "update", first.record
    assert TrainOutcome.from_flat(first.record).loss is None
    spent = hospital.ledger.epsilon_of_study("tiny-1", 1e-3)
    assert 0 < spent < 8
    second = hospital.ask("train", private_plan)
    hospital.close()
    hospital.open()
    third = hospital.ask("train", private_plan)
    for other in (second, third):
        assert other.record == first.record
        assert list(other.arrays) == list(first.arrays)
        for name, value in first.arrays.items():
            np.testing.assert_array_equal(other.arrays[name], value)
    assert hospital.ledger.epsilon_of_study("tiny-1", 1e-3) == spent
    fresh = hospital.ask("train", private_plan, 2)
    assert fresh.kind == "update"
    assert hospital.ledger.epsilon_of_study("tiny-1", 1e-3) > spent
    refused(hospital.ask("train", private_plan, 3), "protocol", "rounds 1 to 2")


def test_the_policy_refuses_before_an_image_is_opened(
    make_hospital: Make, plan: Plan, private_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = make_hospital(
        "max_epsilon_per_cohort = 4.0\nmax_delta = 0.01",
        "require_privacy = true\nmax_epsilon_per_study = 9.0",
    )

    def fail(*args: Any, **more: Any) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr("fedward_client.trainer.trainer_cache.prepare_cohort", fail)
    refused(hospital.ask("train", plan), "policy", "must be differentially private")
    refused(hospital.ask("train", private_plan), "policy", "all studies together")
    refused(hospital.ask("describe", plan, 0, study="other-1"), "policy", "private")
    stranger = encoded_public_key(Ed25519PrivateKey.generate())
    order = hospital.order(plan, 1)
    forged = {**order.record, "coordinator": stranger}
    refused(
        hospital.desk.answer("train", TrainerMessage("order", forged, order.arrays)),
        "protocol",
        "signed by its coordinator",
    )
    assert "charge" not in told(hospital)


def test_a_round_that_asks_too_few_sites_is_refused_whoever_brings_it(
    make_hospital: Make, plan: Plan
) -> None:
    hospital = make_hospital("minimum_sites = 3")
    answer = hospital.ask("train", plan, sites=2)
    refused(answer, "policy", RuleCode.SITES.text)
    assert Refusal.from_flat(answer.record).value == "participation.sites 2 (limit 3)"
    assert answer.record["charged"] is False
    refused(hospital.ask("describe", plan, 0, sites=2), "policy", RuleCode.SITES.text)
    # A connector that was taken over says that there are more.
    order = hospital.order(plan, 1, sites=2)
    more = TrainerMessage("order", {**order.record, "sites": 3}, order.arrays)
    refused(hospital.desk.answer("train", more), "protocol", "signed by its coordinator")
    assert "charge" not in told(hospital)
    assert hospital.ask("train", plan, sites=3).kind == "update"
    # An evaluation tells of this site's patients alone, however many others are asked.
    assert hospital.ask("evaluate", plan, 1, part="validation", sites=1).kind == "counts"


def test_what_a_coordinator_signed_of_the_sites_can_be_shown_later(
    make_hospital: Make, plan: Plan
) -> None:
    hospital = make_hospital("minimum_sites = 2")
    for _ in range(2):
        assert hospital.ask("train", plan, sites=5).kind == "update"
    kept = [
        e.fields for e in entries(audit_folder(hospital.config.site.state)) if e.event == "order"
    ]
    (one,) = kept
    assert (one["study"], one["round"], one["task"], one["sites"]) == ("tiny-1", 1, "train", 5)
    assert json.loads(one["signed"].partition("\n")[2])["sites"] == 5
    public = hospital.key.public_key()
    public.verify(base64.b64decode(one["signature"]), one["signed"].encode())
    with pytest.raises(InvalidSignature):
        public.verify(
            base64.b64decode(one["signature"]),
            one["signed"].replace('"sites":5', '"sites":1').encode(),
        )


def test_an_officer_approves_denies_and_pauses(make_hospital: Make, plan: Plan) -> None:
    hospital = make_hospital(rule='approval = "manual"')
    refused(hospital.ask("describe", plan, 0), "pending", "it waits for that")
    (waiting,) = hospital.approvals.pending()
    assert waiting.study == "tiny-1"
    hospital.approvals.settle("tiny-1", "approved", "officer")
    assert hospital.ask("describe", plan, 0).kind == "facts"
    hospital.desk.pause(paused=True)
    paused = hospital.ask("train", plan)
    refused(paused, "paused", "must not be paused")
    assert paused.record["charged"] is False
    hospital.desk.pause(paused=False)
    assert hospital.ask("train", plan).kind == "update"
    hospital.approvals.settle("tiny-1", "denied", "officer")
    denied = hospital.ask("train", plan)
    refused(denied, "policy", "it was denied")
    assert "charged" not in denied.record


def test_in_quiet_hours_it_measures_but_does_not_train(make_hospital: Make, plan: Plan) -> None:
    hospital = make_hospital(policy='quiet_hours = ["Mon-Fri 07:00-18:00"]')
    hospital.desk._now = lambda: datetime(2026, 3, 2, 12)  # a Monday
    assert hospital.ask("evaluate", plan, 1, part="validation").kind == "counts"
    refused(hospital.ask("train", plan), "paused", "outside its quiet hours")
    assert "charge" not in told(hospital)
    hospital.desk._now = lambda: datetime(2026, 3, 2, 18)
    assert hospital.ask("train", plan).kind == "update"


def test_the_budget_ends_a_study_in_a_typed_refusal(
    make_hospital: Make, private_plan: Plan
) -> None:
    hospital = make_hospital("max_epsilon_per_cohort = 8.1")
    assert hospital.ask("train", private_plan).kind == "update"
    refused(hospital.ask("describe", private_plan, 0, study="tiny-2"), "budget", "budget")
    refused(hospital.ask("train", private_plan, 1, study="tiny-2"), "budget", "budget")


def test_a_trainer_with_a_network_opens_nothing(make_hospital: Make, plan: Plan) -> None:
    hospital = make_hospital()
    hospital.board.set(walls=False)
    refused(hospital.ask("train", plan), "policy", "no network")


def test_a_changed_file_is_found_and_named_by_no_name(
    make_hospital: Make, plan: Plan, tmp_path: Any
) -> None:
    import shutil

    hospital = make_hospital()
    real = (tmp_path / "data").resolve()
    (tmp_path / "data").unlink()
    shutil.copytree(real, tmp_path / "data")
    victim = sorted((tmp_path / "data").rglob("*.dcm"))[0]
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x07")
    answer = hospital.ask("train", plan)
    refused(answer, "data", "must not have changed")
    assert victim.name not in json.dumps(answer.record)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"unreadable": "x"},
        {"plan": "{}", "plan_hash": "0" * 64, "round": 1},
        {"plan": 3, "round": "one"},
        {"study": "../../etc", "signature": base64.b64encode(b"x").decode()},
    ],
)
def test_garbage_is_refused_and_written_down(make_hospital: Make, record: dict[str, Any]) -> None:
    hospital = make_hospital()
    refused(hospital.desk.answer("train", TrainerMessage("order", record)), "protocol", "valid")
    refused(
        hospital.desk.garbage(ProtocolError("a packet must begin with its head")),
        "protocol",
        "valid",
    )
    assert told(hospital).count("refused") == 2


def test_an_order_that_is_given_up_ends_at_the_next_step(
    make_hospital: Make, make_plan: Make
) -> None:
    endless = make_plan(
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        training={"local_epochs": None, "local_steps": 100_000, "rounds": 2},
    )
    hospital = make_hospital()
    answers: list[TrainerMessage] = []
    thread = threading.Thread(target=lambda: answers.append(hospital.ask("train", endless)))
    thread.start()
    while not hospital.board.get()["step"]:
        assert hospital.board.wait(30)
    waiting = threading.Thread(target=lambda: answers.append(hospital.ask("train", endless)))
    waiting.start()
    while not hospital.desk.status()["waiting"]:
        hospital.board.wait(0.05)
    assert hospital.desk.cancel("tiny-1") == 2
    for one in (thread, waiting):
        one.join(30)
    assert [one.kind for one in answers] == ["refusal", "refusal"]
    assert hospital.board.get()["doing"] == "idle"


def test_what_goes_wrong_inside_is_not_told_outside(
    make_hospital: Make, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = make_hospital()
    planted = "/data/ward-7/DOE^JANE/1.2.840.113619.2.55 born 1961-04-03"

    def fail(*args: Any, **more: Any) -> None:
        raise RuntimeError(planted)

    monkeypatch.setattr("fedward_client.trainer.trainer_cache.prepare_cohort", fail)
    answer = hospital.ask("train", plan)
    refused(answer, "error", "unexpected error")
    text = json.dumps(answer.record) + json.dumps(hospital.desk.status())
    folder = audit_folder(hospital.config.site.state)
    text += "".join(path.read_text() for path in folder.iterdir() if path.suffix != ".lock")
    for part in ("ward-7", "DOE", "JANE", "1.2.840", "1961"):
        assert part not in text


@pytest.mark.parametrize("found", ["1 of 3 places can be read", "", "Hidden", "hidden\n"])
def test_a_connector_that_can_read_images_brings_no_order(
    make_hospital: Callable[..., Any], plan: Plan, found: str
) -> None:
    hospital = make_hospital()
    hospital.desk.attached(found)
    for what in ("describe", "train", "evaluate"):
        answer = hospital.ask(what, plan)
        assert (answer.kind, answer.record["code"]) == ("refusal", RuleCode.CONNECTOR.wire)
    assert "no order is carried out" in " ".join(hospital.board.get()["warnings"])
    hospital.desk.detached()
    hospital.desk.attached("hidden")
    assert hospital.board.get()["warnings"] == []
    assert hospital.ask("train", plan).kind == "update"


@pytest.mark.parametrize("stated", [{}, {"schema": SCHEMA_VERSION + 1}], ids=["hidden", "stated"])
@pytest.mark.parametrize(
    "change",
    [
        {"training": {"warmup-DOE": 2}},
        {"DOE": {"number": 1.0}},
        {"model": {"name": "DOE-net"}},
        {"strategy": {"name": "fedadam", "settings": {"DOE": 1.0}}},
    ],
    ids=["key", "table", "word", "setting"],
)
def test_a_plan_of_a_later_release_is_refused_as_such(
    make_hospital: Make, plan: Plan, change: dict[str, Any], stated: dict[str, int]
) -> None:
    """Also where the aggregator hides the version that the plan needs; and nobody learns the
    site's release whom the site does not accept."""
    hospital = make_hospital()
    content = json.loads(canonical(plan)) | stated
    for section, keys in change.items():
        content[section] = content.get(section, {}) | keys
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    order = RoundOrder(
        plan=text,
        plan_hash=hashlib.sha256(text.encode()).hexdigest(),
        round=0,
        task="describe",
        study="tiny-1",
    )

    def ask(key: Ed25519PrivateKey) -> Refusal:
        packet = TrainerMessage("order", dict(sign_order(key, order).to_flat()))
        answer = hospital.desk.answer("describe", packet)
        assert "DOE" not in str(answer.record)
        return Refusal.from_flat(answer.record)

    known = ask(hospital.key)
    assert (known.kind, known.release, known.plan_schema) == (
        "schema",
        version("fedward"),
        SCHEMA_VERSION,
    )
    stranger = ask(Ed25519PrivateKey.generate())
    assert (stranger.kind, stranger.release, stranger.plan_schema) == ("policy", None, None)
    assert hospital.ask("describe", plan, 0).kind == "facts"
    assert hospital.ledger.studies() == []
