"""Run a study's rounds over a grid: who takes part, what counts, what stands after each round."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedward.errors import FedwardError, StudyError
from fedward.metrics import Counts
from fedward.models import build_model, trainable_names
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan, Stage
from fedward.protocol import RoundOrder, SiteFacts
from server.arms import figures, test_figures
from server.events import Listener, RoundEnded, SiteAnswered, StudyStarted, ignore
from server.exchange import StudyGrid
from server.replies import Bad, Measured, Update, read_counts, read_facts, read_update
from server.results import Arm, Failure, Round, SitePrivacy, SiteRound
from strategies.averaging import blend, decay_at
from strategies.registry import build_strategy
from strategies.settings import StrategySettings

_LOG = logging.getLogger("fedward.server")
Arrays = dict[str, NDArray[Any]]


@dataclass
class Job:
    """A study to run, and what stands of it after each round.

    Attributes
    ----------
    plan : Plan
        What to do.
    arrays : dict
        The global model that the next round starts from.
    average : dict
        The model that is delivered: the moving average, or the same as ``arrays``.
    arm : Arm
        Results so far.
    stop : threading.Event
        Ends the study at the next occasion.
    """

    plan: Plan
    arrays: Arrays
    arm: Arm
    seed: int = 0
    listen: Listener = ignore
    stop: threading.Event = field(default_factory=threading.Event)
    average: Arrays = field(default_factory=dict)
    facts: dict[str, SiteFacts] = field(default_factory=dict)
    complete: bool = False
    error: FedwardError | None = None

    def __post_init__(self) -> None:
        self.average = self.average or dict(self.arrays)


class StudyRun:
    """Drives one job over one grid.

    Parameters
    ----------
    job : Job
        Read and updated.
    grid : Grid
        Flower's grid, or one like it.
    """

    def __init__(self, job: Job, grid: Grid) -> None:
        self.job, self.plan = job, job.plan
        self._canonical, self._hash = canonical(job.plan), plan_hash(job.plan)
        self._everyone = grid
        self._nodes: dict[int, str] = {}
        self._grid = StudyGrid(grid, (), job.stop)
        self._model = build_model(job.plan, seed=0)
        self._strategy: tuple[str, Strategy] | None = None

    def run(self) -> None:
        """Enrol, train all rounds, test.

        Raises
        ------
        StudyError
            Too few sites, or a round without quorum after its retries.
        """
        started = time.perf_counter()
        try:
            self._enrol()
            for round_ in range(len(self.job.arm.rounds) + 1, self.plan.rounds + 1):
                if self.job.stop.is_set():
                    return
                self._round(round_)
            self.job.arm.test = self._test()
            self.job.complete = self.job.arm.test is not None
        finally:
            self.job.arm.seconds = time.perf_counter() - started

    def _enrol(self) -> None:
        nodes = self._wait_for_nodes()
        everyone = StudyGrid(self._everyone, nodes, self.job.stop)
        order = self._order(0)
        record = RecordDict({"config": order})
        asked = [Message(record, node, MessageType.QUERY) for node in nodes]
        refused: set[str] = set()
        for reply in everyone.replies(asked, self.plan.participation.deadline):
            facts = read_facts(reply)
            reason = facts.reason if isinstance(facts, Bad) else self._objection(facts)
            if isinstance(facts, Bad) or reason:
                _LOG.warning("a site cannot take part: %s", reason)
                refused.add(reason)
            else:
                self._nodes[reply.metadata.src_node_id] = facts.site
                self.job.facts[facts.site] = facts
        if len(self._nodes) < self.plan.participation.sites and not self.job.stop.is_set():
            raise StudyError(
                "a study needs the planned number of sites",
                value=f"{len(self._nodes)} of {self.plan.participation.sites}"
                + (f"; refused: {'; '.join(sorted(refused))}" if refused else ""),
                fix="Wait for more sites, or lower participation.sites",
                where="participation.sites",
            )
        self._grid = StudyGrid(self._everyone, self._nodes, self.job.stop)
        sites = tuple(sorted(self._nodes.values()))
        self.job.listen(StudyStarted(self.job.arm.name, self.plan.rounds, sites))

    def _objection(self, facts: SiteFacts) -> str:
        if facts.site in self._nodes.values():
            return "two sites of one study cannot have the same name"
        least = self.plan.participation.minimum_patients
        return f"a site needs {least} patients" if facts.patients < least else ""

    def _wait_for_nodes(self) -> list[int]:
        end = time.monotonic() + self.plan.participation.deadline
        while not self.job.stop.is_set():
            nodes = sorted(self._everyone.get_node_ids())
            if len(nodes) >= self.plan.participation.sites or time.monotonic() > end:
                return nodes
            self.job.stop.wait(0.05)
        return []

    def _round(self, round_: int) -> None:
        started = time.perf_counter()
        stage, place = self.plan.stage_of(round_)
        result = Round(round=round_, stage=stage.name, seconds=0.0)
        names = trainable_names(self._model, stage.train)
        updates = self._updates(round_, stage, place, names, result)
        if self.job.stop.is_set():
            return
        self._aggregate(stage, place, updates)
        if round_ % self.plan.metrics.evaluate_every == 0 or round_ == self.plan.rounds:
            self._validate(round_, result)
        result.seconds = time.perf_counter() - started
        self.job.arm.rounds.append(result)
        self.job.listen(RoundEnded(self.job.arm.name, result, self.plan.rounds))

    def _updates(
        self, round_: int, stage: Stage, place: int, names: Iterable[str], result: Round
    ) -> list[Update]:
        expected = {name: self.job.arrays[name] for name in names}
        updates: dict[str, Update] = {}
        for _ in range(self.plan.participation.retries + 1):
            messages = self._train_messages(round_, stage, place, expected, updates)
            result.bytes_down += sum(_size(message.content) for message in messages)
            failures = self._collect(messages, round_, expected, updates)
            result.failures = [Failure(site=s, reason=r) for s, r in sorted(failures.items())]
            if len(updates) >= self.plan.participation.needed or self.job.stop.is_set():
                ordered = [updates[site] for site in sorted(updates)]
                self._note(ordered, result)
                return ordered
        raise StudyError(
            "a round needs its quorum of updates",
            value=f"{len(updates)} of {self.plan.participation.needed} in round {round_}; "
            + "; ".join(f"{failure.site}: {failure.reason}" for failure in result.failures[-5:]),
            fix="Bring the sites back, or lower participation.quorum",
            where="participation.quorum",
        )

    def _train_messages(
        self,
        round_: int,
        stage: Stage,
        place: int,
        expected: Mapping[str, NDArray[Any]],
        there: Mapping[str, Update],
    ) -> list[Message]:
        # A repeated round asks only whose update is missing: training twice would cost privacy.
        missing = [node for node, site in self._nodes.items() if site not in there]
        grid = StudyGrid(self._everyone, missing, self.job.stop)
        if not grid.get_node_ids():  # Flower would wait for one without end
            return []
        account = round_ % self.plan.metrics.evaluate_every == 0 or round_ == self.plan.rounds
        messages = list(
            self._strategy_of(stage).configure_train(
                place + 1, _record(expected), self._order(round_, account=account), grid
            )
        )
        frozen = {name: value for name, value in self.job.arrays.items() if name not in expected}
        for message in messages:
            message.content["frozen"] = _record(frozen)
        return messages

    def _collect(
        self,
        messages: list[Message],
        round_: int,
        expected: Mapping[str, Any],
        updates: dict[str, Update],
    ) -> dict[str, str]:
        """Add the valid updates; give the reason of each site that has none."""
        asked = {self._nodes[message.metadata.dst_node_id] for message in messages}
        missing = set(self._nodes.values()) - set(updates)
        failures = {s: "no answer in time" if s in asked else "not connected" for s in missing}
        for reply in self._grid.replies(messages, self.plan.participation.deadline):
            site = self._nodes[reply.metadata.src_node_id]
            update = read_update(reply, site, round_, expected)
            self._tell(round_, site, "train")
            if isinstance(update, Bad):
                failures[site] = update.reason
            else:
                updates[site] = update
                failures.pop(site, None)
        return failures

    def _note(self, updates: Iterable[Update], result: Round) -> None:
        for update in updates:
            out = update.outcome
            result.bytes_up += update.size
            result.sites[out.site] = SiteRound(
                patients=out.patients, images=out.images, steps=out.steps, loss=out.loss,
                seconds=out.seconds, cpu_seconds=out.cpu_seconds, epsilon=out.epsilon,
            )  # fmt: skip
            if out.noise_multiplier and out.sampling_rate and out.delta and out.epsilon is not None:
                self.job.arm.privacy[out.site] = SitePrivacy(
                    epsilon=out.epsilon, delta=out.delta, noise_multiplier=out.noise_multiplier,
                    sampling_rate=out.sampling_rate, steps=out.steps * result.round,
                )  # fmt: skip
        told = [(site.loss, site.images) for site in result.sites.values() if site.loss is not None]
        if total := sum(images for _, images in told):
            result.train_loss = sum(loss * images for loss, images in told) / total

    def _aggregate(self, stage: Stage, place: int, updates: list[Update]) -> None:
        try:
            arrays, _ = self._strategy_of(stage).aggregate_train(
                place + 1, [update.message for update in updates]
            )
        except AppExitException as error:
            raise StudyError(
                "the updates must be combinable", value=type(error).__name__
            ) from error
        if arrays is None:
            raise StudyError(
                "the strategy must find enough updates", value=len(updates), fix="Raise the quorum"
            )
        new = dict(self.job.arrays)
        for name, array in arrays.items():
            new[name] = array.numpy().astype(self.job.arrays[name].dtype)
        self.job.arrays = new
        step = len(self.job.arm.rounds) + 1
        decay = decay_at(step, self.plan.strategy.averaging)
        self.job.average = blend(self.job.average, new, decay)

    def _strategy_of(self, stage: Stage) -> Strategy:
        # Momentum over arrays of another stage would move layers that no longer train.
        if self._strategy is None or self._strategy[0] != stage.name:
            settings = StrategySettings(values=self.plan.strategy.settings)
            self._strategy = (stage.name, build_strategy(self.plan.strategy.name, settings))
        return self._strategy[1]

    def _validate(self, round_: int, result: Round) -> None:
        sites = {s for s, facts in self.job.facts.items() if facts.validation_images}
        if not sites:
            return
        per_site, result.validation = figures(self.plan, self._measure(round_, "validation", sites))
        for site, values in per_site.items():
            if site in result.sites:
                result.sites[site].validation = values

    def _test(self) -> Any:
        sites = {site for site, facts in self.job.facts.items() if facts.test_images}
        counts = self._measure(0, "test", sites)
        images = {site: facts.test_images for site, facts in self.job.facts.items()}
        return test_figures(self.plan, counts, images) if counts else None

    def _measure(self, round_: int, part: str, sites: set[str]) -> dict[str, Counts]:
        order = self._order(round_, part=part)
        content = RecordDict({"arrays": _record(self.job.average), "config": order})
        members = [node for node in self._grid.get_node_ids() if self._nodes[node] in sites]
        messages = [Message(content, node, MessageType.EVALUATE) for node in members]
        counts: dict[str, Counts] = {}
        for reply in self._grid.replies(messages, self.plan.participation.deadline):
            site = self._nodes[reply.metadata.src_node_id]
            measured = read_counts(reply, site, round_, part, self.plan.task)
            self._tell(round_, site, part)
            if isinstance(measured, Measured):
                counts[site] = measured.counts
            else:
                _LOG.warning("%s could not be measured: %s", site, measured.reason)
        return counts

    def _order(self, round_: int, **more: Any) -> ConfigRecord:
        order = RoundOrder(
            plan=self._canonical, plan_hash=self._hash, round=round_, seed=self.job.seed, **more
        )
        return ConfigRecord(order.to_flat())  # type: ignore[arg-type]

    def _tell(self, round_: int, site: str, what: str) -> None:
        self.job.listen(SiteAnswered(self.job.arm.name, round_, site, what))


def _record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def _size(content: RecordDict) -> int:
    return sum(len(a.data) for record in content.array_records.values() for a in record.values())
