"""Arrays that do not train go to a hospital once, and are named by their digest after that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedward.flower import identity
from fedward.flower.grid import _packed
from fedward.models import build_model, to_arrays, trainable_names
from fedward.plan import Plan, load_plan
from fedward.protocol import RoundOrder
from fedward_client.connector.frozen import FrozenArrays, Lacking
from fedward_client.data.sample import PreparedSite
from fedward_client.link.messages import TrainerMessage
from fedward_client.messages import refusal, to_order, to_reply
from fedward_client.training.runtime import Runtime
from fedward_server.aggregation import record_of, size_of
from fedward_server.events import Event, RoundEnded
from fedward_server.results import Arm
from fedward_server.round_loop import Job, StudyRun
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites

Make = Callable[..., Any]
SITES = {1001: "site-1", 1002: "site-2"}
STUDIES = Path(__file__).resolve().parents[2] / "studies"
HEADER = 3000  # bytes of a message that are no arrays, at most


class Wire(LocalGrid):
    """Messages as they travel between hospitals, packed, into each one's real connector."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        super().__init__(pool, len(SITES))
        self.held = {node: FrozenArrays(folder / str(node)) for node in SITES}
        self.bytes, self.asked = Counter[int](), Counter[int]()
        self.refused: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand each over, or have its node say what it lacks."""
        return [self._carry(message) for message in messages]

    def _carry(self, message: Message) -> str:
        node, packed = message.metadata.dst_node_id, _packed(message, {})
        self.bytes[node] += size_of(packed.content)
        try:
            _, order = to_order(packed, self.held[node])
        except Lacking as error:
            identifier = identity.stamp(message)
            said = to_reply(refusal(SITES[node], None, error), TrainerMessage("order", {}))
            self.refused[identifier] = Message(said, reply_to=message)
            self.asked[node] += 1
            return identifier
        config = ConfigRecord(order.record)
        content = RecordDict({"arrays": record_of(order.arrays), "config": config})
        about = message.metadata
        (identifier,) = super().push_messages([Message(content, node, about.message_type)])
        return identifier

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies of trainers and of connectors."""
        ids = list(message_ids)
        said = [self.refused.pop(one) for one in ids if one in self.refused]
        return said + super().pull_messages(ids)


@pytest.fixture
def plan(make_plan: Make) -> Plan:
    made: Plan = make_plan(
        model={"channels": [16, 64]},
        training={"rounds": None, "learning_rate": None},
        stages=[
            {"name": "head", "rounds": 3, "learning_rate": 0.05, "train": ["fc.*"]},
            {"name": "all", "rounds": 1, "learning_rate": 0.01},
        ],
        strategy={"averaging": 0.5},
    )
    return made


@pytest.fixture
def pool(make_site: Make) -> Iterator[Pool]:
    identity.become_server()
    sites: list[PreparedSite] = [make_site(name, patients=20, seed=7) for name in SITES.values()]
    made = Pool(State(SimulatedSites(sites, Runtime(randomness="seeded"))), 0)
    yield made
    made.close()


def job_of(plan: Plan, **more: Any) -> Job:
    return Job(plan, to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated"), **more)


def between(plan: Plan, pool: Pool, folder: Path, after_round: Callable[[int, Wire], None]) -> Any:
    """A study over the wire; the job, the grid, and the orders as they were signed."""
    signed: list[RoundOrder] = []

    def sign(order: RoundOrder) -> RoundOrder:
        signed.append(order)
        return order

    def listen(event: Event) -> None:
        if isinstance(event, RoundEnded):
            after_round(event.result.round, wire)

    wire = Wire(pool, folder)
    job = job_of(plan, members=SITES, study="tiny-1", sign=sign, listen=listen)
    StudyRun(job, wire).run()
    return job, wire, signed


def expected(plan: Plan) -> tuple[int, int]:
    """Bytes of tensors that a site needs, and of a model with each order, from the plan alone."""
    model = build_model(plan, 0)
    size = {name: value.nbytes for name, value in to_arrays(model).items()}
    whole, needed, orders, trained, stage = sum(size.values()), 0, 0, 0, ""
    for round_ in range(1, plan.rounds + 1):
        own, _ = plan.stage_of(round_)
        trained = sum(size[name] for name in trainable_names(model, own.train))
        if own.name != stage:  # what does not train in it, once
            needed, stage = needed + whole - trained, own.name
        asked = 1 + plan.is_evaluated(round_, "validation")
        needed, orders = needed + asked * trained, orders + asked
    return needed + trained, (orders + 1) * whole  # and the test


def backbone_of(plan: Plan) -> int:
    """Bytes of what does not train in the first stage."""
    model = build_model(plan, 0)
    size = {name: value.nbytes for name, value in to_arrays(model).items()}
    return sum(size.values()) - sum(size[name] for name in trainable_names(model, ["fc.*"]))


def nothing(round_: int, wire: Wire) -> None: ...


def test_the_frozen_backbone_goes_down_once_and_the_model_is_the_same(
    plan: Plan, pool: Pool, tmp_path: Path
) -> None:
    job, wire, signed = between(plan, pool, tmp_path, nothing)
    assert job.complete
    needed, always = expected(plan)
    for node in SITES:
        assert needed <= wire.bytes[node] <= needed + 10 * HEADER
    # Else it would go down with each of the seven orders of its stage.
    assert backbone_of(plan) > 10 * HEADER and always > needed + 10 * HEADER
    assert wire.asked == {}
    # An order covers all arrays, whether they come with it or not.
    assert all(one.arrays for one in signed if one.task != "describe")
    assert len({one.frozen for one in signed if one.round in (1, 2, 3)}) == 1

    plain = job_of(plan)
    StudyRun(plain, LocalGrid(pool, len(SITES))).run()
    for name, value in plain.average.items():
        np.testing.assert_array_equal(job.average[name], value)
    assert plain.arm.test == job.arm.test


@pytest.mark.parametrize("damage", [False, True], ids=["evicted", "damaged"])
def test_a_site_that_lost_the_backbone_gets_it_again(
    plan: Plan, pool: Pool, tmp_path: Path, damage: bool
) -> None:
    def lose(round_: int, wire: Wire) -> None:
        if round_ == 1:
            for path in (tmp_path / "1001").iterdir():
                if damage:
                    path.write_bytes(b"damaged")
                else:
                    path.unlink()

    job, wire, _ = between(plan, pool, tmp_path, lose)
    assert job.complete
    assert [sorted(one.sites) for one in job.arm.rounds] == [["site-1", "site-2"]] * 4
    assert not [one.failures for one in job.arm.rounds if one.failures]
    assert wire.asked == {1001: 1}
    needed, backbone = expected(plan)[0], backbone_of(plan)
    assert needed + backbone <= wire.bytes[1001] <= needed + backbone + 10 * HEADER
    assert wire.bytes[1002] <= needed + 10 * HEADER


def test_a_site_that_keeps_nothing_is_asked_twice_and_no_more(
    plan: Plan, pool: Pool, tmp_path: Path
) -> None:
    def fill(round_: int, wire: Wire) -> None:
        wire.held[1001] = FrozenArrays(tmp_path / "full", most_bytes=0)

    job, wire, _ = between(plan, pool, tmp_path, fill)
    assert job.complete
    assert not [one.failures for one in job.arm.rounds if one.failures]
    # It is told to whom it was sent, and asks once for each order after the first round's.
    assert wire.asked[1001] <= 7


@pytest.mark.parametrize(
    ("name", "megabytes", "before"),
    [("pneumonia-transfer", 12.2, 1472), ("covid-ct-transfer", 12.0, 1472)],
)
def test_a_shipped_transfer_study_sends_a_hospital_few_tensors(
    name: str, megabytes: float, before: float
) -> None:
    """The figures of the documentation, by the count that the wire is held against above."""
    needed, always = expected(load_plan(STUDIES / f"{name}.toml"))
    assert needed / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert always / 1e6 == pytest.approx(before, rel=0.01)
    assert needed < 60e6
