"""Real hospital daemons at a real SuperLink over TLS, driven by the rounds of the aggregator."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward.flower.control_client import ControlClient
from fedward.flower.server_session import RunSession
from fedward.models import build_model, describe, to_arrays, traffic
from fedward.plan.load import plan_from
from fedward.plan.schema import Plan
from fedward.signing import fingerprint, public_bytes, sign_order
from fedward_client.audit.log import audit_folder, audit_key
from fedward_client.audit.verify import verify
from fedward_client.kept_models import KeptModels
from fedward_server.events import Event, RoundEnded, SiteRefused
from fedward_server.job import Job
from fedward_server.report.stats import contributed
from fedward_server.results import Arm
from fedward_server.round_loop import StudyRun
from fedward_simulation.options import Hospital, Options
from fedward_simulation.study import Study

pytestmark = pytest.mark.integration
Make = Callable[..., Any]


class Aggregator:
    """The aggregator's side of a test: one study at a time over a real SuperLink."""

    def __init__(self, superlink: Any, folder: Path) -> None:
        self.superlink, self.folder = superlink, folder
        self.link = ControlClient(superlink.address, superlink.ca, superlink.control_secret)
        self.key = Ed25519PrivateKey.generate()
        self.members: dict[int, str] = {}
        self.events: list[Event] = []

    @property
    def coordinator(self) -> str:
        return fingerprint(public_bytes(self.key))

    def enrol(self, daemon: Any) -> None:
        self.members[self.link.register(daemon.public_key, daemon.name)] = daemon.name

    def job(self, plan: Plan, study: str = "tiny-1", seed: int = 0, **more: Any) -> Job:
        arm = Arm(name="federated", kind="federated", epsilon=plan.privacy.epsilon)
        return Job(
            plan,
            to_arrays(build_model(plan, seed)),
            arm,
            seed,
            self.events.append,
            members=self.members,
            study=study,
            sign=lambda one: sign_order(self.key, one),
            **more,
        )

    def run(self, job: Job) -> Job:
        secret = self.superlink.runtime_secret
        session = RunSession(self.link, secret, self.folder / "lock")
        try:
            StudyRun(job, session.grid).run()
        finally:
            session.close(complete=job.complete)
        return job


PICKY = """
[[policy.studies]]
match = "picky*"
dataset = "chest"
models = ["unet"]
"""


@pytest.fixture(scope="module")
def aggregator(make_superlink: Make, tmp_path_factory: pytest.TempPathFactory) -> Aggregator:
    return Aggregator(make_superlink(), tmp_path_factory.mktemp("aggregator"))


@pytest.fixture(scope="module")
def two(aggregator: Aggregator, make_daemon: Make) -> list[Any]:
    """Two hospitals that run; the second lets no CNN into studies that are called picky."""
    made = []
    for number in (1, 2):
        daemon = make_daemon(
            number,
            aggregator.superlink.address,
            aggregator.superlink.ca,
            aggregator.coordinator,
            rules=PICKY if number == 2 else "",
        )
        aggregator.enrol(daemon)
        daemon.start()
        made.append(daemon)
    return made


@pytest.fixture
def plan(make_plan: Make) -> Plan:
    made: Plan = make_plan(
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        participation={"deadline": 120.0, "retries": 0},
    )
    return made


def test_a_study_between_hospitals_is_the_simulation_bit_for_bit(
    aggregator: Aggregator, two: list[Any], plan: Plan, tmp_path: Path
) -> None:
    # A backbone that is frozen first: it travels once, and is named by its digest after that.
    content = plan.model_dump(mode="python")
    content["training"] |= {"rounds": None, "learning_rate": None}
    content["stages"] = [
        {"name": "head", "rounds": 2, "learning_rate": 0.05, "train": ["fc.*"]},
        {"name": "all", "rounds": 1, "learning_rate": 0.01},
    ]
    content["personal"] = {"method": "fine-tuning", "rounds": 2, "alone": True}
    # Weights follow the figures: the loss, since two AUCs of four patients each are often equal.
    content["strategy"] = {"name": "afl", "settings": {"eta": 3.0}}
    content["metrics"] |= {"report": ["auc", "accuracy", "loss"], "primary": "loss"}
    content["compression"] = {"method": "int4", "rounding": "stochastic", "download": "int6"}
    plan = plan_from(content)
    job = aggregator.run(aggregator.job(plan, seed=3))
    assert job.complete
    down = [one.bytes_down for one in job.arm.rounds]
    assert down[1] < down[0] / 2
    moved = [traffic(plan, round_) for round_ in (1, 2, 3)]
    assert [one.bytes_up for one in job.arm.rounds] == [2 * up for up, _ in moved]
    assert down[2] == 2 * (moved[2][1] + 128)  # an array's header
    assert sum(moved[2]) < 2 * describe(plan).bytes / 5
    kept = [list((daemon.folder / "connector" / "spool" / "frozen").iterdir()) for daemon in two]
    assert [len(files) for files in kept] == [1, 1]
    assert all(sorted(r.sites) == ["hospital 1", "hospital 2"] for r in job.arm.rounds)

    # The same two frozen cohorts on one machine.
    hospitals = tuple(Hospital(daemon.config) for daemon in two)
    options = Options(
        data=None,
        out=tmp_path / "sim",
        seed=3,
        hospitals=hospitals,
        policy=two[0].config,  # the other has the same
    )
    study = Study(plan, options)
    study.run()
    assert study.model is not None
    for name, value in study.model.items():
        np.testing.assert_array_equal(job.average[name], value)
    alone = study.results.arms[0].test
    assert alone is not None
    assert job.arm.test is not None
    assert job.arm.test.pooled == alone.pooled
    shares = [sorted(one.share or 0.0 for one in r.sites.values()) for r in job.arm.rounds]
    assert shares[0] != shares[-1]
    # What each contributed was worked out from the same updates, and is in the report.
    here, there = contributed(job.arm), contributed(study.results.arms[0])
    assert len(here) == 2 and all(one.rounds == 3 for one in here.values())
    for one, other in zip(here.values(), there.values(), strict=True):
        assert one.share == pytest.approx(other.share, abs=0.02)
        assert one.agreement == pytest.approx(other.agreement, abs=0.02)
    # So are the models of the hospitals' own, which never left them.
    for kind in ("own", "alone"):
        here, there = getattr(job.arm, kind), getattr(study.results.arms[0], kind)
        assert here is not None and not here.not_measured, here
        assert len(here.per_site) == 2
        assert list(here.per_site.values()) == list(there.per_site.values())
    for daemon in two:
        kept_here = KeptModels(daemon.folder / "state").all()
        assert [one.which for one in kept_here] == ["own", "shared"]

    for daemon in two:
        status = daemon.call("status")
        assert status["trainer"]["walls"] is True  # type: ignore[index]
        assert status["trainer"]["connector"] == "hidden"  # type: ignore[index]
        assert status["link"]["state"] == "online"  # type: ignore[index]
        state = daemon.folder / "state"
        assert verify(audit_folder(state), audit_key(state)).whole


def test_a_private_study_survives_kills_and_its_ledger_counts(
    aggregator: Aggregator, two: list[Any], make_plan: Make, until: Make
) -> None:
    plan = make_plan(
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        training={"rounds": 4, "batch_size": 6, "local_epochs": None, "local_steps": 2},
        privacy={
            "mechanism": "dp-sgd",
            "epsilon": 8.0,
            "delta": 1e-3,
            "clipping_norm": 1.0,
            "sampling_rate": 0.3,
        },
        participation={"deadline": 60.0, "retries": 2, "quorum": 1},
    )
    job = aggregator.job(plan, "tiny-private")
    kills = iter([(0, "trainer"), (1, "connector"), (0, "connector")])

    def listen(event: Event) -> None:
        aggregator.events.append(event)
        if isinstance(event, RoundEnded) and (next_ := next(kills, None)):
            two[next_[0]].kill(next_[1])

    job.listen = listen
    aggregator.run(job)
    assert job.complete
    assert [r.round for r in job.arm.rounds] == [1, 2, 3, 4]
    for daemon in two:
        rows = daemon.call("budget")["studies"]
        (row,) = [row for row in rows if row["study"] == "tiny-private"]  # type: ignore[attr-defined]
        assert row["charged"] >= 2
        assert 0 < row["epsilon"] <= 8.0
        until(lambda daemon=daemon: set(daemon.children()) == {"trainer", "connector"})


def test_a_site_refuses_in_its_own_words_and_the_other_goes_on(
    aggregator: Aggregator, two: list[Any], plan: Plan
) -> None:
    aggregator.events.clear()
    part = plan.participation.model_copy(update={"sites": 1})
    alone = plan.model_copy(update={"participation": part})
    job = aggregator.run(aggregator.job(alone, "picky-1", quorum=1, deadline=60.0))
    assert job.complete
    (refused,) = [event for event in aggregator.events if isinstance(event, SiteRefused)]
    assert (refused.site, refused.kind) == ("hospital 2", "policy")
    assert "model.name" in refused.reason
    assert all(list(r.sites) == ["hospital 1"] for r in job.arm.rounds)


def test_a_study_goes_on_over_a_superlink_that_was_killed(
    aggregator: Aggregator, two: list[Any], plan: Plan
) -> None:
    job = aggregator.job(plan, "tiny-killed")
    superlink = aggregator.superlink

    def restart(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.result.round == 1:
            superlink.kill()
            superlink.start()

    job.listen = restart
    thread = threading.Thread(target=aggregator.run, args=(job,))
    thread.start()
    thread.join(180)
    assert not thread.is_alive()
    assert job.complete
    assert len(job.arm.rounds) == 2


def test_nothing_that_names_a_patient_is_anywhere_but_at_the_hospital(
    aggregator: Aggregator, two: list[Any], plan: Plan
) -> None:
    job = aggregator.run(aggregator.job(plan, "tiny-searched"))
    text = json.dumps(job.arm.model_dump(mode="json"))
    text += json.dumps([facts.model_dump() for facts in job.facts.values()])
    for daemon in two:
        text += daemon.log + (daemon.folder / "connector" / "link.json").read_text()
        for part in ("hospital-1/", "hospital-2/", ".dcm", "1.2.826", "SYNTH", str(daemon.folder)):
            assert part not in text, part


def test_the_doctor_looks_at_everything_and_tells_no_secret(two: list[Any], until: Make) -> None:
    until(lambda: "whole" in two[0].call("audit", "verify"))  # it has begun its log
    found = two[0].call("doctor")
    lines = {line["name"]: line for line in found["lines"]}
    for name in (
        "certificate",
        "clock",
        "enrolment",
        "disk",
        "trainer's network",
        "connector and images",
        "dataset chest",
    ):
        assert lines[name]["status"] != "fail", lines[name]
    for name in ("trainer's network", "connector and images", "enrolment"):
        assert lines[name]["status"] == "pass", lines[name]
    text = json.dumps(found)
    for secret in ("site.secret", "PRIVATE KEY", str(two[0].folder)):
        assert secret not in text
    assert two[0].call("audit", "verify")["whole"] is True


def test_a_stop_is_prompt_and_clean_and_leaves_no_process(two: list[Any], until: Make) -> None:
    for daemon in two:
        until(lambda daemon=daemon: len(daemon.children()) == 2)
        children = daemon.children().values()
        assert len(children) == 2
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 12
        assert not any(Path(f"/proc/{number}").exists() for number in children)
        assert "Traceback" not in daemon.log
        assert not (daemon.folder / "run" / "t.sock").exists()
