"""A real hospital before a coordinator that a test plays itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from client.audit.log import audit_folder, audit_key
from client.audit.verify import entries, verify
from client.trainer.officer import ask
from fedward.errors import FedwardError
from fedward.models import build_model, to_arrays
from fedward.packing import pack
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder
from fedward.signing import fingerprint, public_bytes, sign_study
from server.flower.control import Link
from server.flower.runtime import RunSession

Make = Callable[..., Any]
KINDS = {"query": MessageType.QUERY, "train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}


class Coordinator:
    """Sends whatever it likes, as an application of Flower can."""

    def __init__(self, superlink: Any, folder: Path) -> None:
        self.superlink, self.key = superlink, Ed25519PrivateKey.generate()
        self.link = Link(superlink.address, superlink.ca, superlink.control_secret)
        self.session = RunSession(self.link, superlink.runtime_secret, folder / "lock")

    def order(self, plan: Plan, round_: int, study: str, /, **changes: Any) -> RecordDict:
        """A round's order with the fresh model; some of its fields changed."""
        mark = plan_hash(plan)
        signed: dict[str, Any] = {**sign_study(self.key, study, mark)}
        made = RoundOrder(plan=canonical(plan), plan_hash=mark, round=round_, seed=1, **signed)
        packed = Array(pack(to_arrays(build_model(plan, 0))))
        return RecordDict(
            {
                "config": ConfigRecord({**made.to_flat(), **changes}),
                "arrays": ArrayRecord({"packed": packed}),
            }
        )

    def send(self, node: int, content: RecordDict, what: str = "train", ttl: float = 120.0) -> str:
        """Send it; gives the message's id."""
        message = Message(content, node, KINDS[what])
        message.metadata.ttl = ttl
        (identifier,) = self.session._courier.deliver([message])
        assert identifier
        return identifier

    def reply(self, identifier: str, seconds: float = 120.0) -> RecordDict:
        """What the site answered."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for message in self.session._courier.collect([identifier], 1.0):
                assert not message.has_error(), message.error
                content: RecordDict = message.content
                return content
        raise AssertionError("no reply came")

    def ask(self, node: int, content: RecordDict, what: str = "train") -> RecordDict:
        """Send it and wait for the answer."""
        return self.reply(self.send(node, content, what))


class Site:
    """A hospital and what it says of itself, at the hospital."""

    def __init__(self, daemon: Any, node: int) -> None:
        self.daemon, self.node = daemon, node
        self.state: Path = daemon.folder / "state"

    def start(self) -> None:
        """Start it; what it said of its link before is forgotten."""
        (self.daemon.folder / "connector" / "link.json").unlink(missing_ok=True)
        self.daemon.start()

    @property
    def online(self) -> bool:
        return self.link.get("state") == "online"

    @property
    def link(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            told: dict[str, Any] = json.loads(
                (self.daemon.folder / "connector" / "link.json").read_text()
            )
            return told
        return {}

    @property
    def trainer(self) -> dict[str, Any]:
        with suppress(FedwardError, OSError):
            told: dict[str, Any] = ask(self.state / "admin.sock", "status")["trainer"]
            return told
        return {"doing": "", "step": 0}

    def step(self, study: str) -> int:
        """The step that it is at in training for a study; -1 while it does not train for it."""
        now = self.trainer
        at = now["doing"] == "training" and now.get("study") == study
        return int(now["step"]) if at else -1

    def told(self, event: str) -> list[dict[str, Any]]:
        """Entries of the audit log."""
        return [one.fields for one in entries(audit_folder(self.state)) if one.event == event]

    def row(self, study: str) -> dict[str, Any]:
        """What the ledger says of a study."""
        (found,) = [row for row in self.daemon.call("budget")["studies"] if row["study"] == study]
        row: dict[str, Any] = found
        return row

    @property
    def whole(self) -> bool:
        return verify(audit_folder(self.state), audit_key(self.state)).whole


@pytest.fixture(scope="module")
def coordinator(
    make_superlink: Make, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Coordinator]:
    """The other side."""
    made = Coordinator(make_superlink(), tmp_path_factory.mktemp("coordinator"))
    yield made
    made.session.close(complete=True)


@pytest.fixture(scope="module")
def make_hospital(coordinator: Coordinator, make_daemon: Make) -> Callable[..., Site]:
    """Hospitals that the coordinator has enrolled, and that do not run yet."""

    def build(number: int, policy: str = "", **settings: str) -> Site:
        superlink = coordinator.superlink
        mark = fingerprint(public_bytes(coordinator.key))
        daemon = make_daemon(number, superlink.address, superlink.ca, mark, policy=policy)
        text = daemon.config.read_text()
        for place, lines in settings.items():
            text = text.replace(f"[{place}]", f"[{place}]\n{lines}")
        daemon.config.write_text(text)
        return Site(daemon, coordinator.link.register(daemon.public_key, daemon.name))

    return build


@pytest.fixture(scope="module")
def hospital(make_hospital: Callable[..., Site], until: Make) -> Site:
    """A hospital that runs; what is said to it must be below two MiB."""
    site = make_hospital(
        1, "max_epsilon_per_cohort = 1000.0\nmax_delta = 0.01", server="max_download_mib = 2"
    )
    site.start()
    until(lambda: site.online)
    return site


@pytest.fixture
def plan(make_plan: Make) -> Plan:
    """A plan without privacy."""
    made: Plan = make_plan(
        task={"classes": ["clear", "opacity"]}, split={"given": None}, training={"rounds": 6}
    )
    return made


@pytest.fixture
def make_private(make_plan: Make) -> Callable[[int], Plan]:
    """A private plan of so many steps a round."""

    def build(steps: int = 2) -> Plan:
        made: Plan = make_plan(
            task={"classes": ["clear", "opacity"]}, split={"given": None},
            training={"batch_size": 6, "local_epochs": None, "local_steps": steps, "rounds": 6},
            privacy={"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0,
                     "sampling_rate": 0.3},
        )  # fmt: skip
        return made

    return build


def read_refusal(content: RecordDict) -> tuple[str, str]:
    record = content.config_records["refusal"]
    return str(record["kind"]), str(record["rule"])


def read_bytes(content: RecordDict) -> bytes:
    return content.array_records["arrays"]["packed"].data


@pytest.fixture(scope="session")
def refusal_of() -> Callable[[RecordDict], tuple[str, str]]:
    """Kind and rule of an answer that is a refusal."""
    return read_refusal


@pytest.fixture(scope="session")
def bytes_of() -> Callable[[RecordDict], bytes]:
    """The update of an answer, as it travelled."""
    return read_bytes
