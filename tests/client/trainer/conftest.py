"""A hospital with a frozen cohort, its policy, and orders of a coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from fedward.models import build_model, to_arrays
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder
from fedward.signing import fingerprint, public_bytes, sign_order
from fedward.tensors import digest
from fedward_client.audit.log import AuditLog, audit_folder, audit_key
from fedward_client.cli import app
from fedward_client.cohort.training import preparers
from fedward_client.config import SiteConfig, load_config
from fedward_client.ledger import Ledger
from fedward_client.ledger.releases import Releases
from fedward_client.link.messages import TrainerMessage
from fedward_client.policy.approvals import Approvals
from fedward_client.secret import site_secret
from fedward_client.trainer.executor import Executor
from fedward_client.trainer.service import TrainerService
from fedward_client.trainer.status import StatusBoard
from fedward_client.trainer.study_context import StudyContexts
from fedward_client.trainer.trainer_cache import TrainerCache
from fedward_client.trainer.watchdog import OrdersInHand
from fedward_client.training.runtime import Runtime
from fedward_simulation.cohort import write_cohort

SITE = """
version = 1
[site]
name = "north"
state = "state"
[datasets.chest]
root = "data/hospital-1"
format = "dicom"
task = "classification"
classes = ["clear", "opacity"]
[policy]
coordinators = ["{coordinator}"]
approval = "within-policy"
require_privacy = false
minimum_patients = 10
minimum_count = 1
rounding = 9
{policy}
[[policy.studies]]
match = "tiny*"
dataset = "chest"
{rule}
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One synthetic hospital as DICOM files."""
    folder = tmp_path_factory.mktemp("data")
    write_cohort(folder, 0, "classification", 24, 1)
    return folder


@dataclass
class Hospital:
    """A trainer's desk over a real frozen cohort, and a coordinator's key."""

    folder: Path
    key: Ed25519PrivateKey
    config: SiteConfig = field(init=False)
    desk: TrainerService = field(init=False)
    crew: Any = None

    def open(self) -> TrainerService:
        self.config = load_config(self.folder / "site.toml")
        state = self.config.site.state
        secret = site_secret(state)
        self.audit = AuditLog(audit_folder(state), audit_key(state))
        self.ledger = Ledger(state)
        self.board = StatusBoard("north")
        self.board.set(walls=True)
        cases = StudyContexts(self.config, self.audit)
        for row in self.ledger.studies():
            cases.pin(row["study"], row["dataset"], row["cohort"])
        self.approvals = Approvals(state)
        self.trainers = TrainerCache(
            self.config, self.ledger, self.board, secret, Runtime(), self.crew
        )
        releases = Releases(state / "releases")
        self.work = Executor(cases, self.trainers, self.ledger, releases, self.audit)
        self.trainers.between_steps = self.work.check_going
        in_hand = OrdersInHand(state)
        in_hand.note_last_end()
        self.desk = TrainerService(
            cases, self.work, self.audit, self.approvals, self.board, in_hand
        )
        return self.desk

    def close(self) -> None:
        self.ledger.close()

    def order(
        self,
        plan: Plan,
        round_: int,
        study: str = "tiny-1",
        task: str = "train",
        model: int = 0,
        **more: Any,
    ) -> TrainerMessage:
        arrays = to_arrays(build_model(plan, model)) if task != "describe" else {}
        order = RoundOrder(
            plan=canonical(plan),
            plan_hash=plan_hash(plan),
            round=round_,
            study=study,
            task=task,
            arrays=digest(arrays) if arrays else "",
            **more,
        )
        return TrainerMessage("order", dict(sign_order(self.key, order).to_flat()), arrays)

    def ask(self, what: str, plan: Plan, round_: int = 1, **more: Any) -> TrainerMessage:
        return self.desk.answer(what, self.order(plan, round_, task=what, **more))


@pytest.fixture
def make_hospital(tmp_path: Path, data: Path) -> Iterator[Callable[..., Hospital]]:
    """Builds the hospital; ``policy`` and ``rule`` are lines for site.toml."""
    made: list[Hospital] = []
    with preparers() as crew:

        def build(policy: str = "", rule: str = "") -> Hospital:
            key = Ed25519PrivateKey.generate()
            if not (tmp_path / "data").exists():
                (tmp_path / "data").symlink_to(data)
                # The secret divides the patients, of whom few are validated: the same each time.
                (tmp_path / "state").mkdir(mode=0o700)
                (tmp_path / "state" / "site.secret").write_bytes(bytes(range(32)))
                (tmp_path / "state" / "site.secret").chmod(0o600)
            text = SITE.format(coordinator=fingerprint(public_bytes(key)), policy=policy, rule=rule)
            (tmp_path / "site.toml").write_text(text)
            done = CliRunner().invoke(
                app, ["data", "freeze", "chest", "--config", str(tmp_path / "site.toml")]
            )
            assert done.exit_code == 0, done.output
            hospital = Hospital(tmp_path, key, crew=crew)
            hospital.open()
            made.append(hospital)
            return hospital

        yield build
        for one in made:
            one.close()


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    """A small study of the hospital's classes."""
    return make_plan(task={"classes": ["clear", "opacity"]}, split={"given": None})


@pytest.fixture
def private_plan(make_plan: Callable[..., Plan]) -> Plan:
    """The same with patient-level privacy."""
    return make_plan(
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        training={"batch_size": 6, "local_epochs": None, "local_steps": 2},
        privacy={
            "mechanism": "dp-sgd",
            "epsilon": 8.0,
            "delta": 1e-3,
            "clipping_norm": 1.0,
            "sampling_rate": 0.3,
        },
    )
