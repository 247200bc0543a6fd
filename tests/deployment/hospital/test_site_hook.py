"""A real trainer that a strategy keeps arrays at: killed between rounds, and lied to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_start
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from live_federation import write_certificates
from safetensors.numpy import load_file

from fedward.errors import FedwardError
from fedward.flower import identity
from fedward.models import build_model, to_arrays
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import Refusal, RoundOrder
from fedward.rule_codes import RuleCode
from fedward.signing import fingerprint, public_bytes, sign_order
from fedward.tensors import digest, pack
from fedward_client.link.client import TrainerClient
from fedward_client.link.messages import TrainerMessage
from fedward_client.messages import to_order

pytestmark = pytest.mark.integration
Make = Callable[..., Any]
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TRAINER = """
import sys
from pathlib import Path
from control_variates import SPEC
from fedward.strategies import register
from fedward_client.config import load_config
from fedward_client.trainer.process import run_trainer
register(SPEC)
run_trainer(load_config(Path(sys.argv[1])))
"""


class Hospital:
    """A trainer's process that knows the strategy, and a connection to it."""

    def __init__(self, daemon: Any, environment: dict[str, str], until: Make) -> None:
        self.daemon, self.until = daemon, until
        path = f"{environment['PYTHONPATH']}:{FIXTURES}"
        self.environment = {**environment, "PYTHONPATH": path}

    def start(self) -> None:
        command = [sys.executable, "-c", TRAINER, str(self.daemon.config)]
        with (self.daemon.folder / "trainer.log").open("ab") as log:
            self.process = warm_start.popen(command, env=self.environment, stdout=log, stderr=log)
        self.until(self._attached)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.client.close()
        (self.daemon.folder / "run" / "t.sock").unlink(missing_ok=True)

    def _attached(self) -> bool:
        assert self.process.poll() is None, (self.daemon.folder / "trainer.log").read_text()
        try:
            self.client = TrainerClient(self.daemon.folder / "run" / "t.sock", "1", "hidden")
        except FedwardError:
            return False
        return True


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def hospital(
    make_daemon: Make,
    key: Ed25519PrivateKey,
    environment: dict[str, str],
    until: Make,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Hospital]:
    folder = tmp_path_factory.mktemp("certificates")
    write_certificates(folder)
    ca = (folder / "ca.pem").read_bytes()
    daemon = make_daemon(3, "127.0.0.1:1", ca, fingerprint(public_bytes(key)))
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace("[trainer]", "[trainer]\nallow_networked_trainer = true"))
    made = Hospital(daemon, environment, until)
    made.start()
    yield made
    made.client.close()
    made.process.terminate()
    made.process.wait(30)


def signed(
    key: Ed25519PrivateKey, plan: Plan, round_: int, study: str, arrays: dict[str, Any], **more: Any
) -> TrainerMessage:
    order = RoundOrder(
        plan=canonical(plan),
        plan_hash=plan_hash(plan),
        round=round_,
        study=study,
        arrays=digest(arrays),
        **more,
    )
    return TrainerMessage("order", dict(sign_order(key, order).to_flat()), arrays)


def plan_with(make_plan: Make, name: str, **settings: float) -> Plan:
    made: Plan = make_plan(
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        training={"rounds": 3, "local_epochs": 3},
        strategy={"name": name, "settings": settings},
    )
    return made


def test_killed_between_rounds_it_goes_on_from_the_state_before(
    hospital: Hospital, make_plan: Make, key: Ed25519PrivateKey, control_variates: object
) -> None:
    plan = plan_with(make_plan, "control-variates")
    names = list(to_arrays(build_model(plan, 0)))

    def ask(study: str, round_: int, arrays: dict[str, Any]) -> dict[str, Any]:
        answer = hospital.client.ask("train", signed(key, plan, round_, study, arrays))
        assert answer.kind == "update", answer.record
        assert list(answer.arrays) == [*names, *(f"change/{name}" for name in names)]
        return answer.arrays

    def following(before: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
        """What the aggregator of a single site sends in the next round."""
        shared = {f"shared/{n}": before[f"shared/{n}"] + update[f"change/{n}"] for n in names}
        return {name: update[name] for name in names} | shared

    model = to_arrays(build_model(plan, 0))
    sent = [model | {f"shared/{name}": np.zeros_like(model[name]) for name in names}]
    whole = []
    for round_ in (1, 2, 3):
        whole.append(ask("whole", round_, sent[-1]))
        sent.append(following(sent[-1], whole[-1]))
    for round_, then_killed in ((1, True), (2, True), (2, False), (3, False)):
        update = ask("killed", round_, sent[round_ - 1])
        for name, value in whole[round_ - 1].items():
            np.testing.assert_array_equal(update[name], value, err_msg=f"{round_} {name}")
        if then_killed:
            hospital.kill()
            hospital.start()
    # Without the rounds before, the round is another one: the state is what makes it.
    other = hospital.client.ask("train", signed(key, plan, 2, "other", sent[1]))
    assert any(not np.array_equal(other.arrays[n], value) for n, value in whole[1].items())
    # The last evaluation ends the study here, and its state is removed.
    test = signed(key, plan, 0, "whole", model, task="evaluate", part="test")
    assert hospital.client.ask("evaluate", test).kind == "counts"
    answer = hospital.client.ask("train", signed(key, plan, 3, "whole", sent[2]))
    assert Refusal.from_flat(answer.record).code is RuleCode.STATE_MISSING
    # Arrays that the coordinator did not sign, and a strategy that does not take them.
    taken = signed(key, plan, 3, "killed", sent[2])
    changed = sent[2] | {"shared/fc.bias": sent[2]["shared/fc.bias"] + 50}
    refused = hospital.client.ask("train", TrainerMessage("order", taken.record, changed))
    assert "signed" in Refusal.from_flat(refused.record).rule
    fedavg = plan_with(make_plan, "fedavg")
    refused = hospital.client.ask("train", signed(key, fedavg, 1, "plain", sent[0]))
    assert Refusal.from_flat(refused.record).code is RuleCode.ARRAYS_KNOWN


def test_killed_between_rounds_it_sends_the_same_compressed_bytes_and_counts_no_error_twice(
    hospital: Hospital, make_plan: Make, key: Ed25519PrivateKey
) -> None:
    plan: Plan = make_plan(
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        training={"rounds": 3, "local_epochs": 3},
        compression={"method": "top-k", "share": 0.05},
    )
    model = to_arrays(build_model(plan, 0))

    def ask(study: str, round_: int) -> bytes:
        answer = hospital.client.ask("train", signed(key, plan, round_, study, model))
        assert answer.kind == "update", answer.record
        assert list(answer.arrays) == ["compressed"]
        sent: bytes = answer.arrays["compressed"].tobytes()
        return sent

    whole = [ask("frugal", round_) for round_ in (1, 2, 3)]
    assert len(set(whole)) == 3  # from the same model: what is left of a round is in the next
    for round_, then_killed in ((1, True), (1, False), (2, True), (2, False), (3, False)):
        assert ask("frugal-killed", round_) == whole[round_ - 1], round_
        if then_killed:
            hospital.kill()
            hospital.start()


def test_a_proximal_weight_that_the_plan_does_not_have_is_ignored(
    hospital: Hospital, make_plan: Make, key: Ed25519PrivateKey
) -> None:
    """FedProx's server puts μ into the message's config; here a hostile one does, beside FedAvg."""
    identity.become_server()
    plan, prox = plan_with(make_plan, "fedavg"), plan_with(make_plan, "fedprox", mu=50.0)
    model = to_arrays(build_model(plan, 0))

    def ask(of: Plan, study: str, **added: float) -> dict[str, Any]:
        order = signed(key, of, 1, study, model)
        config = ConfigRecord({**order.record, "server-round": 1, **added})
        arrays = ArrayRecord({"packed": Array(pack(model))})
        content = RecordDict({"config": config, "arrays": arrays})
        what, packet = to_order(Message(content, 1, MessageType.TRAIN))
        answer = hospital.client.ask(what, packet)
        assert answer.kind == "update", answer.record
        return answer.arrays

    plain = ask(plan, "plain-1")
    lied = ask(plan, "plain-2", **{"proximal-mu": 50.0})
    held = ask(prox, "prox-1", **{"proximal-mu": 0.0})
    for name, value in plain.items():
        np.testing.assert_array_equal(lied[name], value)
    # The same weight in a signed plan is what changes the update.
    assert any(not np.array_equal(held[name], value) for name, value in plain.items())


def command(hospital: Hospital, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the hospital's people."""
    call = [sys.executable, "-m", "fedward_client.cli", *arguments]
    call += ["--config", str(hospital.daemon.config)]
    pipe = subprocess.PIPE
    return warm_start.run(call, stdout=pipe, stderr=pipe, text=True, env=hospital.environment)


@pytest.mark.parametrize(
    "personal",
    [{"method": "ditto", "weight": 0.1, "alone": True}, {"method": "fine-tuning", "rounds": 2}],
)
def test_a_model_of_the_hospital_s_own_survives_kills_and_stays_at_the_hospital(
    hospital: Hospital,
    make_plan: Make,
    key: Ed25519PrivateKey,
    tmp_path: Path,
    personal: dict[str, Any],
) -> None:
    plan: Plan = make_plan(
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        training={"rounds": 2, "local_epochs": 2},
        personal=personal,
    )
    own_round, method = plan.own_round or 0, personal["method"]
    model = to_arrays(build_model(plan, 0))

    def ask(study: str, round_: int, arrays: dict[str, Any], task: str = "train") -> TrainerMessage:
        more = {"task": task, "part": "test"} if task == "evaluate" else {}
        answer = hospital.client.ask(task, signed(key, plan, round_, study, arrays, **more))
        assert answer.kind in ("update", "counts"), answer.record
        return answer

    def go(study: str, *, killed: bool) -> None:
        sent = model
        for round_ in range(1, own_round + plan.passes(own_round)):
            made = ask(study, round_, sent)
            assert set(made.arrays) == (set(model) if round_ < own_round else set())
            if killed and round_ in (1, own_round):
                hospital.kill()
                hospital.start()
                again = ask(study, round_, sent)  # the reply was lost
                for name, value in made.arrays.items():
                    np.testing.assert_array_equal(again.arrays[name], value)
            sent = {name: made.arrays.get(name, value) for name, value in sent.items()}
            if round_ == own_round:
                break
        for round_ in plan.tests:
            ask(study, round_, sent, "evaluate")

    go(f"{method}-whole", killed=False)
    go(f"{method}-killed", killed=True)
    files = {}
    for study in (f"{method}-whole", f"{method}-killed"):
        for which in ("shared", "own"):
            out = tmp_path / f"{study}-{which}.safetensors"
            done = command(hospital, "model", "export", study, "--which", which, "--out", str(out))
            assert done.returncode == 0, done.stderr
            files[study, which] = load_file(out)
    for which in ("shared", "own"):
        one, other = (files[f"{method}-{study}", which] for study in ("whole", "killed"))
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])
    listed = json.loads(command(hospital, "model", "list", "--json").stdout)["models"]
    found = {(one["study"], one["which"]) for one in listed}
    assert {(f"{method}-{s}", w) for s in ("whole", "killed") for w in ("shared", "own")} <= found
    # What was sent in any round is not the own model, unless the hospital chose the shared one.
    done = command(hospital, "model", "export", f"{method}-whole", "--out", str(out))
    assert done.returncode != 0 and "replaces no file" in done.stderr
    assert command(hospital, "model", "remove", f"{method}-whole").returncode == 0
    done = command(hospital, "model", "remove", f"{method}-whole")
    assert done.returncode != 0 and "must be kept here" in done.stderr
