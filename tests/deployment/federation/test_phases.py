"""Processes are killed and cables pulled in every phase of a round; the model comes out the same.

A phase is held open by stopping (SIGSTOP) the process that would end it; then the victim is killed
(SIGKILL). Both hospitals have to answer in every round, and the delivered model must be the
simulation's, bit for bit: so no round was lost, none was counted twice, and none was half.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.integration
Make = Callable[..., Any]
BOTH = ["hospital 1", "hospital 2"]
ROUNDS = 40
VICTIMS = [
    "connector",
    "trainer",
    "daemon",
    "runner",
    "superlink",
    "service",
    "aggregator",
    "restart",
]
MODULES = {
    "runner": "fedward_server.runner",
    "superlink": "fedward.flower.superlink",
    "service": "fedward_server.service",
}


class Round:
    """A study's round as its processes' traces on disk show it."""

    def __init__(self, federation: Any, study: str, number: int) -> None:
        self.federation, self.study, self.daemon = federation, study, federation.daemons[number]
        self.number = number

    def finished(self) -> int:
        """Rounds that stand."""
        return len(self.federation.events(self.study, "round"))

    def in_hand(self, what: str) -> bool:
        """Whether the hospital's connector has such an order."""
        for path in (self.daemon.folder / "connector" / "spool").glob("*.json"):
            with suppress(OSError, ValueError):
                if json.loads(path.read_bytes())["what"] == what:
                    return True
        return False

    def waits_at_the_superlink(self) -> bool:
        """Whether an order to train was not fetched by the hospital yet."""
        query = """SELECT 1 FROM message_ins WHERE dst_node_id = ? AND delivered_at = ''
                   AND message_type LIKE 'train%'"""
        return bool(self.federation.superlink(query, self._node()))

    def trained(self) -> int:
        """How many updates the hospital's trainer has handed to its connector, by its audit log."""
        folder = self.daemon.folder / "state" / "audit"
        parts = folder.glob("*.jsonl")
        lines = [line for path in parts for line in path.read_bytes().splitlines()]
        return sum(b'"sent"' in line and b'"train"' in line for line in lines)

    def answered(self) -> bool:
        """Whether an answer of the hospital is there."""
        query = "SELECT 1 FROM message_res WHERE src_node_id = ?"
        return bool(self.federation.superlink(query, self._node()))

    def all_measured(self) -> bool:
        """Whether all answers of the round are in, and it does not stand yet."""
        events = self.federation.events(self.study, "round", "answered")
        last = [e for e in events[-2:] if e["kind"] == "answered" and e["what"] == "validation"]
        return len(last) == 2

    def process(self, which: str) -> int:
        """Of the hospital, or the study's runner; found before its phase, which is short."""
        found: dict[str, int] = {}

        def there() -> bool:
            found.update(self.daemon.children())
            found.update(self.federation.service.processes())
            return which in found

        wait(there)
        return found[which]

    def _node(self) -> int:
        return int(self.federation.node(self.number))


def wait(condition: Callable[[], object], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.002)


def in_time(condition: Callable[[], object], seconds: float) -> bool:
    with suppress(AssertionError):
        wait(condition, seconds)
        return True
    return False


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    with suppress(OSError):
        while "T" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            time.sleep(0.001)


def thaw(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def receiving(now: Round) -> int | None:
    """The order waits for the connector."""
    pid, done = now.process("connector"), now.finished()
    wait(lambda: now.finished() > done)
    freeze(pid)
    return pid if in_time(now.waits_at_the_superlink, 3.0) else _let_go(pid)


def computing(now: Round) -> int | None:
    """The trainer has the order."""
    pid = now.process("trainer")
    wait(lambda: now.in_hand("train"))
    freeze(pid)
    time.sleep(0.1)
    return pid if now.in_hand("train") and not now.answered() else _let_go(pid)


def sending(now: Round) -> int | None:
    """The update is on its way from the trainer to the aggregator."""
    pid, before = now.process("connector"), now.trained()
    wait(lambda: now.in_hand("train"))
    wait(lambda: now.trained() > before)
    freeze(pid)
    return pid if now.in_hand("train") and not now.answered() else _let_go(pid)


def aggregating(now: Round) -> int | None:
    """The runner has all answers, and the round does not stand yet: model, checkpoint, registry."""
    pid = now.process("fedward_server.runner")
    wait(now.all_measured)
    freeze(pid)
    return pid if now.all_measured() else _let_go(pid)


def evaluating(now: Round) -> int | None:
    """The trainer measures the model."""
    pid = now.process("trainer")
    wait(lambda: now.in_hand("evaluate"))
    freeze(pid)
    time.sleep(0.1)
    return pid if now.in_hand("evaluate") and not now.answered() else _let_go(pid)


def _let_go(pid: int) -> None:
    thaw(pid)


PHASES = [receiving, computing, sending, aggregating, evaluating]


@contextmanager
def held(now: Round, phase: Callable[[Round], int | None]) -> Iterator[None]:
    """Hold a phase open; tried again in the next round where it was over too soon."""
    for _ in range(20):
        pid = phase(now)
        if pid is not None:
            break
    else:
        pytest.fail("the phase is over before it can be held")
    try:
        yield
    finally:
        thaw(pid)


def kill(now: Round, victim: str) -> None:
    if victim in MODULES:
        os.kill(now.federation.service.processes()[MODULES[victim]], signal.SIGKILL)
    elif victim == "daemon":
        now.daemon.process.kill()
        now.daemon.process.wait()
    elif victim in ("aggregator", "restart"):
        end = now.federation.service.process
        end.kill() if victim == "aggregator" else end.terminate()
        end.wait()
    else:
        now.daemon.kill(victim)


def restart(killed: Any, children: dict[str, int]) -> None:
    """What systemd does when a supervisor ended: its children end with it, then it starts."""
    wait(lambda: not any(Path(f"/proc/{pid}/cwd").exists() for pid in children.values()))
    killed.start()


@pytest.fixture
def plan(make_plan: Make) -> Any:
    return make_plan(
        study={"name": "killed"},
        task={"classes": ["clear", "opacity"]},
        split={"given": None},
        # Large enough that a phase can be seen, and held, before it is over.
        model={"channels": [64, 128]},
        training={"rounds": ROUNDS, "local_epochs": 10},
        participation={"sites": 2, "quorum": 2, "deadline": 60.0},
    )


def is_as_if_nothing_happened(federation: Any, study: str, plan: Any, folder: Path) -> None:
    found = federation.finish(study)
    assert found["study"]["state"] == "finished", found["study"]
    assert [one["round"] for one in found["rounds"]] == list(range(1, plan.rounds + 1))
    told = [event["round"] for event in federation.events(study, "round")]
    assert told == list(range(1, plan.rounds + 1))
    assert all(sorted(one["sites"]) == BOTH for one in found["rounds"])
    alone = federation.simulate(plan, folder / "alone", 3, 1, 2)
    assert alone.model is not None
    delivered = federation.model(study, folder)
    for name, value in alone.model.items():
        np.testing.assert_array_equal(delivered[name], value)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_whoever_is_killed_in_this_phase(
    federation: Any, plan: Any, tmp_path: Path, phase: Callable[[Round], int | None]
) -> None:
    federation.ready(1, 2)
    study = federation.submit(plan, ",".join(BOTH), tmp_path, "--seed", 3)
    now = Round(federation, study, 1)
    for victim in VICTIMS:
        began = time.monotonic()
        service = federation.service
        children = {which: now.process(which) for which in ("trainer", "connector")}
        servers = service.processes()
        with held(now, phase):
            done = now.finished()
            kill(now, victim)
        if victim == "daemon":
            restart(now.daemon, children)
        if victim in ("aggregator", "restart"):
            restart(service, servers)
        wait(lambda done=done: now.finished() > done)
        print(phase.__name__, victim, round(time.monotonic() - began, 1))
    is_as_if_nothing_happened(federation, study, plan, tmp_path)


def test_everything_is_killed_at_once_and_the_disk_lost_what_was_not_synced(
    federation: Any, make_plan: Make, plan: Any, tmp_path: Path
) -> None:
    federation.ready(1, 2)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 5})})
    study = federation.submit(plan, ",".join(BOTH), tmp_path, "--seed", 3)
    now = Round(federation, study, 1)
    wait(lambda: now.finished() >= 2)
    service = federation.service
    both = [federation.daemons[number] for number in (1, 2)]
    all_of_them = [service.process.pid, *service.processes().values()]
    for daemon in both:
        all_of_them += [daemon.process.pid, *daemon.children().values()]
    for pid in all_of_them:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in (service.process, *(daemon.process for daemon in both)):
        process.wait()
    wait(lambda: not any(Path(f"/proc/{pid}/cwd").exists() for pid in all_of_them))
    # As after a power cut: the newest files are there, and empty.
    rounds = service.folder / "state" / "studies" / study / "rounds"
    newest = sorted(rounds.glob("round-*"))[-1]
    for path in newest.iterdir():
        path.write_bytes(b"")
    service.start()
    for daemon in both:
        daemon.start()
    is_as_if_nothing_happened(federation, study, plan, tmp_path)
    (restored,) = federation.events(study, "restored")
    assert restored["round"] == int(newest.name[-6:]) - 1


@pytest.mark.parametrize("phase", [receiving, computing, sending], ids=lambda p: p.__name__)
def test_a_cable_is_pulled_in_this_phase_and_put_back(
    federation: Any, plan: Any, tmp_path: Path, phase: Callable[[Round], int | None]
) -> None:
    federation.ready(1, 2)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 12})})
    study = federation.submit(plan, ",".join(BOTH), tmp_path, "--seed", 3)
    now = Round(federation, study, 1)
    try:
        with held(now, phase):
            done = now.finished()
            federation.network.cut(1)
        assert not in_time(lambda: now.finished() > done, 1.5)
    finally:
        federation.network.mend(1)
    is_as_if_nothing_happened(federation, study, plan, tmp_path)


def test_who_stays_away_costs_its_own_update_and_is_back_in_a_later_round(
    federation: Any, plan: Any, tmp_path: Path
) -> None:
    federation.ready(1, 2)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 900})})
    more = ("--quorum", 1, "--deadline", 6)
    study = federation.submit(plan, ",".join(BOTH), tmp_path, "--seed", 3, *more)
    now = Round(federation, study, 1)

    def sites_of_the_last() -> list[str]:
        return sorted(federation.events(study, "round")[-1]["sites"])

    try:
        with held(now, sending):
            done = now.finished()
            federation.network.cut(1)
        wait(lambda: now.finished() > done)
        closed = federation.events(study, "round")[done]
        assert sorted(closed["sites"]) == ["hospital 2"]
        (failure,) = closed["failures"]
        assert (failure["site"], failure["reason"]) == ("hospital 1", "no answer in time")
    finally:
        federation.network.mend(1)
    wait(lambda: sites_of_the_last() == BOTH)
    federation.service.ask("study", "stop", study)
    told = [event["round"] for event in federation.events(study, "round")]
    assert told == list(range(1, len(told) + 1))


def test_a_full_disk_makes_the_study_wait_and_loses_nothing(
    federation: Any, plan: Any, tmp_path: Path
) -> None:
    federation.ready(1, 2)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 6})})
    study = federation.submit(plan, ",".join(BOTH), tmp_path, "--seed", 3)
    now = Round(federation, study, 1)
    wait(lambda: now.finished() >= 1)
    filler = federation.disk.fill()
    try:
        done = now.finished()
        assert not in_time(lambda: now.finished() > done + 1, 4.0)
        health = federation.service.get("/readyz")
        assert health.status_code == 503
    finally:
        filler.unlink()
    is_as_if_nothing_happened(federation, study, plan, tmp_path)
    assert federation.show(study)["study"]["state"] == "finished"
