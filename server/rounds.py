"""Run a study's rounds over a grid: who takes part, what counts, what stands after each round."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedward.errors import DivergenceError, StudyError
from fedward.metrics import AnyCounts
from fedward.models import build_model, trainable_names
from fedward.packing import digest
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Stage
from fedward.protocol import RoundOrder
from server.arms import figures, test_figures
from server.events import (
    RoundEnded,
    SiteAnswered,
    SiteRefused,
    SiteWarned,
    StudyPaused,
    StudyResumed,
)
from server.exchange import Moment
from server.gather import Gathered, let_go, record_of, size_of
from server.job import Job
from server.members import Members
from server.replies import Bad, Measured, Update, read_counts, read_update
from server.results import Failure, Round, SiteRound
from server.spent import charge, charge_ordered, settle
from strategies.averaging import blend, decay_at
from strategies.memory import folds, memory_of, remember
from strategies.registry import build_strategy
from strategies.robust import dominates
from strategies.settings import StrategySettings

__all__ = ["Job", "StudyRun"]
_LOG = logging.getLogger("fedward.server")
_LOOK_AGAIN: Final = 0.5
_LONGEST: Final = 300.0


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
        self._members = Members(job, grid, lambda: self._order(0, "describe", {}))
        self._model = build_model(job.plan, seed=0)
        self._strategy: tuple[str, Strategy] | None = None
        self._open: tuple[int, Gathered] | None = None
        self._told_heavy: set[str] = set()
        self._started = time.perf_counter()

    def run(self) -> None:
        """Enrol, train the rounds that are missing, test.

        Raises
        ------
        StudyError
            Too few sites, or a round without quorum after its retries; not where the job is
            patient, which waits instead.
        DivergenceError
            Training diverged at most sites.
        """
        self._started = time.perf_counter() - self.job.arm.seconds
        try:
            self._patiently(self._members.enrol)
            while self.job.round <= self.plan.rounds:
                self._patiently(self._round)
                if self.job.stop.is_set():
                    return
            self._patiently(self._finish)
        finally:
            settle(self.job.arm)
            self._note_time()

    def _note_time(self) -> None:
        self.job.arm.seconds = time.perf_counter() - self._started

    def _patiently(self, step: Any) -> None:
        """Do a step; a patient job that lacks sites waits for them and does it again."""
        pause = _LOOK_AGAIN
        while not self.job.stop.is_set():
            try:
                step()
                return
            except DivergenceError:
                raise  # waiting does not mend it
            except StudyError as error:
                if not self.job.patient:
                    raise
                self._wait(str(error), pause)
                # Sites that are there and fail each time are asked less and less often.
                pause = min(2 * pause, _LONGEST)

    def _wait(self, reason: str, pause: float) -> None:
        name, round_ = self.job.arm.name, self.job.round
        self.job.listen(StudyPaused(name, round_, reason))
        while not self.job.stop.wait(pause):
            self._members.refresh()
            if self._members.connected() >= self.job.needed:
                self.job.listen(StudyResumed(name, round_))
                return
            pause = min(2 * pause, 10.0)

    def _round(self) -> None:
        started, round_ = time.perf_counter(), self.job.round
        stage, place = self.plan.stage_of(round_)
        result = Round(round=round_, stage=stage.name, seconds=0.0)
        if self.job.members is not None:
            self._members.refresh()
        names = trainable_names(self._model, stage.train)
        gathered = self._updates(round_, stage, place, names, result)
        if self.job.stop.is_set():
            return
        self._open = None
        self._aggregate(stage, place, gathered, names)
        if self.plan.is_evaluated(round_, "validation"):
            self._validate(round_, result)
        result.seconds = time.perf_counter() - started
        self.job.arm.rounds.append(result)
        self._note_time()
        self.job.save(self.job)
        self.job.listen(RoundEnded(self.job.arm.name, result, self.plan.rounds))

    def _updates(
        self, round_: int, stage: Stage, place: int, names: Iterable[str], result: Round
    ) -> Gathered:
        expected = {name: self.job.arrays[name] for name in names}
        gathered, needed = self._gathered_so_far(round_, stage), self.job.needed
        for _ in range(self.plan.participation.retries + 1):
            self._ask(round_, stage, place, expected, gathered, result)
            if len(gathered.updates) >= needed and self._outliers(gathered, result):
                # Whose update the mean had already sends it again, as it was.
                self._ask(round_, stage, place, expected, gathered, result)
            if len(gathered.updates) >= needed or self.job.stop.is_set():
                for site in gathered.updates:  # only now is it known that none is an outlier
                    self._members.note(site, None)
                self._note(gathered, result)
                return gathered
        raise StudyError(
            "a round needs its quorum of updates",
            value=f"{len(gathered.updates)} of {needed} in round {round_}; "
            + "; ".join(f"{failure.site}: {failure.reason}" for failure in result.failures[-5:]),
            fix="Bring the sites back, or lower participation.quorum",
            where="participation.quorum",
        )

    def _ask(
        self, round_: int, stage: Stage, place: int, expected: Mapping[str, NDArray[Any]],
        gathered: Gathered, result: Round,
    ) -> None:  # fmt: skip
        messages = self._train_messages(round_, stage, place, expected, gathered)
        result.bytes_down += sum(size_of(message.content) for message in messages)
        result.failures = self._collect(messages, round_, expected, gathered)

    def _outliers(self, gathered: Gathered, result: Round) -> bool:
        """Refuse updates of a norm far beyond the median; whether others must be sent again."""
        sizes = {site: self._size_of(site) for site in gathered.updates}
        found = gathered.outliers(sizes, self.plan.strategy.max_norm_ratio)
        for site, bad in found.items():
            result.failures.append(Failure(site=site, reason=bad.reason, kind=bad.kind))
            self._members.note(site, bad)
        result.failures.sort(key=lambda failure: failure.site)
        return bool(found) and not gathered.updates

    def _size_of(self, site: str) -> float:
        """What the norm of a site's update may grow with (see :class:`NormBound`)."""
        facts = self.job.facts.get(site)
        # What its weight counts: who claims little to widen the bound has little weight.
        weighting = self.plan.strategy.weighting
        return 1.0 if facts is None else float(getattr(facts, f"train_{weighting}"))

    def _gathered_so_far(self, round_: int, stage: Stage) -> Gathered:
        # What came before a pause counts after it.
        if self._open is None or self._open[0] != round_:
            fold, share = folds(self._strategy_of(stage)), self.plan.strategy.max_share
            self._open = (round_, Gathered(fold=fold, max_share=share))
        return self._open[1]

    def _train_messages(
        self,
        round_: int,
        stage: Stage,
        place: int,
        expected: Mapping[str, NDArray[Any]],
        there: Gathered,
    ) -> list[Message]:
        # A repeated round asks only whose update is missing: training twice would cost privacy.
        nodes = self._members.nodes
        had = there.updates.keys() | there.refused.keys()
        missing = [node for node, site in nodes.items() if site not in had]
        grid = Moment(self._everyone, missing, self.job.stop)
        if not grid.get_node_ids():  # Flower would wait for one without end
            return []
        account = self.plan.is_evaluated(round_, "validation")
        order = self._order(round_, "train", self.job.arrays, account=account)
        messages = list(
            self._strategy_of(stage).configure_train(place + 1, record_of(expected), order, grid)
        )
        frozen = {name: value for name, value in self.job.arrays.items() if name not in expected}
        for message in messages:
            message.content["frozen"] = record_of(frozen)
            # Nobody shall train for a round that is over.
            message.metadata.ttl = self.job.patience
        return messages

    def _collect(
        self,
        messages: list[Message],
        round_: int,
        expected: Mapping[str, Any],
        gathered: Gathered,
    ) -> list[Failure]:
        """Add the valid updates; give why each site that has none has none."""
        nodes = dict(self._members.nodes)
        asked = {nodes[message.metadata.dst_node_id] for message in messages}
        silent = {
            site: Bad("no answer in time" if site in asked else "not connected", "silent")
            for site in nodes.values()
        }
        failures = self._members.absent() | silent | gathered.refused
        diverged: dict[str, Bad] = {}
        for site in gathered.updates:
            failures.pop(site, None)
        try:
            for site, reply in self._replies(messages, nodes):
                update = read_update(
                    reply,
                    site,
                    round_,
                    expected,
                    self.job.facts.get(site),
                    self.job.most_change,
                    self.plan.strategy.weighting,
                )
                if isinstance(update, Update):
                    update = gathered.too_far(update, self._size_of(site)) or update
                self._tell(round_, site, "train")
                if update.outcome is not None:
                    charge(self.job.arm, update.outcome, self.plan.privacy.delta)
                if isinstance(update, Bad):
                    let_go(reply)
                    failures[site] = update
                    if update.diverged:
                        diverged[site] = update
                    else:
                        self._members.note(site, update)
                    if update.uncharged:
                        asked.discard(site)
                else:
                    gathered.add(site, update)
                    failures.pop(site, None)
        finally:
            for site in asked & self.job.facts.keys():
                charge_ordered(self.job.arm, self.plan, self.job.facts[site], round_)
        self._blame(diverged, round_, len(nodes))
        return [
            Failure(site=site, reason=bad.reason, kind=bad.kind)
            for site, bad in sorted(failures.items())
        ]

    def _replies(
        self, messages: list[Message], nodes: Mapping[int, str]
    ) -> Iterator[tuple[str, Message]]:
        """Send, and give each site's reply as it comes, up to the deadline."""
        deadline = self.job.patience
        for node, reply in self._members.grid.replies(messages, deadline, self._members.cut_off):
            yield nodes[node], reply

    def _blame(self, diverged: Mapping[str, Bad], round_: int, sites: int) -> None:
        """Updates out of all proportion: of one site its fault, of half of them or more the plan's.

        Counted over all sites of the study: one that answers alone does not end it.
        """
        if diverged and len(diverged) >= min(sites, max(2, sites / 2)):
            told = "; ".join(f"{site}: {bad.reason}" for site, bad in sorted(diverged.items())[:3])
            raise self._divergence(f"{len(diverged)} of {sites} sites in round {round_}; {told}")
        for site, bad in diverged.items():
            self._members.note(site, bad)

    def _divergence(self, value: str) -> DivergenceError:
        return DivergenceError(
            "updates must stay finite and near the model at more than half of the sites: training "
            "diverges",
            value=value, where="training.learning_rate",
            fix="Lower the learning rate (or that of the stage, or of the strategy) and submit the "
            "plan again; no site is quarantined for this",
        )  # fmt: skip

    def _note(self, gathered: Gathered, result: Round) -> None:
        looked = self.plan.is_evaluated(result.round, "validation")
        if looked:
            settle(self.job.arm)
        weights = gathered.weights()
        total = sum(weights.values())
        for update in gathered.ordered():
            out = update.outcome
            share = weights[out.site] / total
            result.bytes_up += update.size
            spent = self.job.arm.privacy.get(out.site)
            result.sites[out.site] = SiteRound(
                patients=out.patients, images=out.images, steps=out.steps, loss=out.loss,
                seconds=out.seconds, cpu_seconds=out.cpu_seconds,
                epsilon=spent.epsilon if spent and looked else None, share=share,
            )  # fmt: skip
            if dominates(share, len(weights)):
                self._warn_heavy(out.site, share)
        told = [(site.loss, site.images) for site in result.sites.values() if site.loss is not None]
        if total := sum(images for _, images in told):
            result.train_loss = sum(loss * images for loss, images in told) / total

    def _warn_heavy(self, site: str, share: float) -> None:
        if site not in self._told_heavy:
            self._told_heavy.add(site)
            reason = (
                f"{site} has {share:.1%} of the weight of a round: the model is mostly its. See "
                "strategy.max_share."
            )
            self.job.listen(SiteWarned(self.job.arm.name, self.job.round, site, reason))

    def _aggregate(
        self, stage: Stage, place: int, gathered: Gathered, names: Iterable[str]
    ) -> None:
        strategy = self._strategy_of(stage)
        node = next(iter(self._members.nodes), 0)
        try:
            arrays, _ = strategy.aggregate_train(place + 1, gathered.messages(node))
        except AppExitException as error:
            raise StudyError(
                "the updates must be combinable", value=type(error).__name__
            ) from error
        if arrays is None:
            raise StudyError(
                "the strategy must find enough updates", value=len(gathered.updates),
                fix="Raise the quorum",
            )  # fmt: skip
        new = dict(self.job.arrays)
        for name, array in arrays.items():
            new[name] = array.numpy().astype(self.job.arrays[name].dtype)
            if not np.isfinite(new[name]).all():
                raise self._divergence(f"the model after round {self.job.round}, {name}")
        self.job.arrays = new
        self.job.memory, self.job.memory_stage = memory_of(strategy, tuple(names)), stage.name
        decay = decay_at(self.job.round, self.plan.strategy.averaging)
        self.job.average = blend(self.job.average, new, decay)

    def _strategy_of(self, stage: Stage) -> Strategy:
        # Momentum over arrays of another stage would move layers that no longer train.
        if self._strategy is None or self._strategy[0] != stage.name:
            settings = StrategySettings(values=self.plan.strategy.settings)
            strategy = build_strategy(self.plan.strategy.name, settings)
            if self.job.memory_stage == stage.name:
                remember(strategy, self.job.memory, trainable_names(self._model, stage.train))
            self._strategy = (stage.name, strategy)
        return self._strategy[1]

    def _validate(self, round_: int, result: Round) -> None:
        sites = {s for s, facts in self.job.facts.items() if facts.validation_images}
        if not sites:
            return
        counts = self._measure(round_, "validation", sites)
        if self.job.stop.is_set():  # of some of the sites they would pass for those of all
            return
        per_site, result.validation = figures(self.plan, counts)
        for site, values in per_site.items():
            if site in result.sites:
                result.sites[site].validation = values

    def _finish(self) -> None:
        """Measure the model on the test patients; then the study is complete."""
        facts = self.job.facts
        images = {site: one.test_images for site, one in facts.items()}
        counts = self._measure(0, "test", {site for site, number in images.items() if number})
        if self.job.stop.is_set():
            return
        if self.job.patient and any(images.values()) and not counts:
            raise StudyError("a study needs a site to be tested on", fix="Bring a site back")
        self.job.arm.test = test_figures(self.plan, counts, images) if counts else None
        self.job.complete = self.job.arm.test is not None
        self._note_time()
        self.job.save(self.job)

    def _measure(self, round_: int, part: str, sites: set[str]) -> dict[str, AnyCounts]:
        order = self._order(round_, "evaluate", self.job.average, part=part)
        content = RecordDict({"arrays": record_of(self.job.average), "config": order})
        nodes = dict(self._members.nodes)
        members = [node for node in self._members.grid.get_node_ids() if nodes[node] in sites]
        messages = [Message(content, node, MessageType.EVALUATE) for node in members]
        deadline = self.job.patience
        for message in messages:
            message.metadata.ttl = deadline
        counts: dict[str, AnyCounts] = {}
        for node, reply in self._members.grid.replies(messages, deadline, self._members.cut_off):
            site = nodes[node]
            facts = self.job.facts.get(site)
            measured = read_counts(reply, site, round_, part, self.plan, facts)
            self._tell(round_, site, part)
            if isinstance(measured, Measured):
                counts[site] = measured.counts
                self._members.note(site, None, "counts")
            else:
                self._unmeasured(site, measured)
        return counts

    def _unmeasured(self, site: str, bad: Bad) -> None:
        _LOG.warning("%s could not be measured: %s", site, bad.reason)
        if bad.kind == "invalid":
            told = SiteRefused(self.job.arm.name, self.job.round, site, bad.kind, bad.reason)
            self.job.listen(told)
        self._members.note(site, bad, "counts")

    def _order(
        self, round_: int, task: str, arrays: Mapping[str, NDArray[Any]], **more: Any
    ) -> ConfigRecord:
        order = RoundOrder(
            plan=self._canonical,
            plan_hash=self._hash,
            round=round_,
            task=task,  # type: ignore[arg-type]
            seed=self.job.seed,
            study=self.job.study,
            **more,
        )
        if self.job.sign is not None:
            named = order.model_copy(update={"arrays": digest(arrays) if arrays else ""})
            order = self.job.sign(named)
        return ConfigRecord(order.to_flat())  # type: ignore[arg-type]

    def _tell(self, round_: int, site: str, what: str) -> None:
        self.job.listen(SiteAnswered(self.job.arm.name, round_, site, what))
