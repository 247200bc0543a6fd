"""Run a study's rounds over a grid: who takes part, what counts, what stands after each round."""

from __future__ import annotations

import functools
import gc
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedward.compression import COMPRESSED, compress_model, decompress_model
from fedward.errors import DivergenceError, ModelError, PlanError, StudyError
from fedward.flower.errors import AppExitException
from fedward.flower.study_grid import GridSnapshot
from fedward.models import build_model, shared_names, trainable_names
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import CENTERING, Stage
from fedward.protocol import RoundOrder
from fedward.strategies import STRATEGIES, StrategySpec, array_names
from fedward.tasks.private_counts import AnyCounts
from fedward.tensors import FROZEN, digest
from fedward_server.aggregation import Aggregation, free_arrays, record_of, size_of
from fedward_server.delivered import average_decay, best_round, out_of_patience
from fedward_server.events import (
    RoundEnded,
    SiteAnswered,
    SiteRefused,
    SiteWarned,
    StudyPaused,
    StudyResumed,
)
from fedward_server.job import Arrays, Job
from fedward_server.metrics_summary import figures, tested
from fedward_server.participants import NO_ANSWER, NOT_HERE, PASSING, Participants, named
from fedward_server.pasts import pasts
from fedward_server.privacy_spent import charge, charge_ordered, settle
from fedward_server.reply_validation import (
    InvalidReply,
    SiteEvaluation,
    Update,
    lacks_arrays,
    read_counts,
    read_update,
)
from fedward_server.results import Failure, Round, SiteRound, TestFigures
from fedward_strategies.averaging import blend
from fedward_strategies.contribution import Sketch
from fedward_strategies.memory import memory_of, remember
from fedward_strategies.registry import build_strategy
from fedward_strategies.robust import dominates
from fedward_strategies.rule import RuleStrategy
from fedward_strategies.settings import StrategySettings

__all__ = ["Job", "StudyRun"]
_LOG = logging.getLogger("fedward.server")
_LOOK_AGAIN: Final = 0.5
_LONGEST: Final = 300.0


Measured = tuple[dict[str, AnyCounts], dict[str, InvalidReply]]


@dataclass(frozen=True)
class Frozen:
    """Arrays that do not train in a stage, and their digest; "" where they always travel."""

    record: ArrayRecord
    mark: str

    def on(self, message: Message) -> Message:
        """The message with them."""
        about = message.metadata
        content = RecordDict({**message.content, FROZEN: self.record})
        return Message(
            content, about.dst_node_id, about.message_type, ttl=about.ttl, group_id=about.group_id
        )


@functools.cache
def _set_imports_apart() -> None:
    """Have the garbage collector pass over what this process has imported.

    Some of Flower's strategies, such as Bulyan, have it look at all objects after each array of
    each update: a quarter of a second each time where torch and MONAI are loaded.
    """
    gc.collect()
    gc.freeze()


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
        self._members = Participants(job, grid, self._describe)
        self._model = build_model(job.plan, seed=0)
        self._strategy: tuple[str, Strategy] | None = None
        self._open: tuple[int, Aggregation] | None = None
        self._told_heavy: set[str] = set()
        self._given_up: set[str] = set()
        self._bytes_down = 0
        # Whoever could foresee how updates are sketched could make one that looks like another.
        self._secret = job.seed if job.members is None else secrets.randbits(64)
        self._started = time.perf_counter()

    def _describe(self, **more: Any) -> ConfigRecord:
        # What a site is told before the study is how many may take part at most.
        everyone = self.job.members is None
        known = self._everyone.get_node_ids() if everyone else self._members.named_to_train
        return self._order(0, "describe", {}, sites=len(list(known)), **more)

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
        _set_imports_apart()
        try:
            self._patiently(self._members.enrol, start=True)
            while self.job.round <= self.plan.rounds and not self._out_of_patience():
                self._patiently(self._round)
                if self.job.stop.is_set():
                    return
            self._patiently(self._finish)
        finally:
            settle(self.job.arm)
            self._note_time()

    def _out_of_patience(self) -> bool:
        return out_of_patience(self.plan, self.job.arm.rounds)

    def _note_time(self) -> None:
        self.job.arm.seconds = time.perf_counter() - self._started

    def _patiently(self, step: Callable[[], None], start: bool = False) -> None:
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
                reason = error.__str__
            if start:
                self._wait(self._why_not, _LOOK_AGAIN, self._connected(self._members.least))
            else:
                self._wait(reason, pause, self._connected(self.job.needed))
            # Sites that are there and fail each time are asked less and less often.
            pause = min(2 * pause, _LONGEST)

    def _why_not(self) -> str:
        """Why the study cannot start as it is now: sites come, go and change their minds."""
        return str(self._members.too_few())

    def _connected(self, sites: int) -> Callable[[], bool]:
        """Whether so many of the sites that train are there."""
        return lambda: self._members.connected() >= sites

    def _wait(
        self,
        reason: Callable[[], str],
        pause: float,
        ready: Callable[[], bool],
        end: float = math.inf,
    ) -> None:
        """Until it is worth a try, an operator resumes the study, or the time is up."""
        name, round_ = self.job.arm.name, self.job.round
        told = ""
        while (left := end - time.monotonic()) > 0:
            if told != (told := reason()):
                self.job.listen(StudyPaused(name, round_, told))
            if self._rest(min(pause, left)):
                return
            self._members.refresh()
            if ready():
                self.job.listen(StudyResumed(name, round_))
                return
            pause = min(2 * pause, 10.0)

    def _rest(self, seconds: float) -> bool:
        """Let time pass; whether somebody ended that: the study stops, or is to try again."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.job.again.is_set():
            if self.job.stop.wait(min(left, _LOOK_AGAIN)):
                return True
        if resumed := self.job.again.is_set():
            self.job.again.clear()
            self._members.ask_again()
        return resumed

    def _round(self) -> None:
        started, round_ = time.perf_counter(), self.job.round
        stage, place = self.plan.stage_of(round_)
        result = Round(round=round_, stage=stage.name, seconds=0.0)
        if self.job.members is not None:
            self._members.refresh()
        names = shared_names(self._model, self.plan, round_)
        gathered = self._updates(round_, stage, place, names, result)
        if self.job.stop.is_set():
            return
        self._open = None
        self._aggregate(stage, place, gathered, self._as_received(round_, names))
        if self.plan.is_evaluated(round_, "validation"):
            self._validate(round_, result)
        result.seconds = time.perf_counter() - started
        self.job.arm.rounds.append(result)
        if self.plan.training.keep == "best" and self._best() == round_:
            self.job.best = dict(self.job.average)
        self._note_time()
        self.job.save(self.job)
        self.job.listen(RoundEnded(self.job.arm.name, result, self.plan.rounds))

    def _updates(
        self, round_: int, stage: Stage, place: int, names: Iterable[str], result: Round
    ) -> Aggregation:
        expected = self._as_received(round_, names)
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
            + "; ".join(f"{one.site}: {one.reason.rstrip('.')}" for one in result.failures[-5:]),
            fix="Bring the sites back, or lower participation.quorum",
            where="participation.quorum",
        )

    def _ask(
        self,
        round_: int,
        stage: Stage,
        place: int,
        expected: Mapping[str, NDArray[Any]],
        gathered: Aggregation,
        result: Round,
    ) -> None:
        frozen = self._frozen(self.job.arrays, expected)
        messages = self._train_messages(round_, stage, place, expected, gathered, frozen)
        before = self._bytes_down
        result.failures = self._collect(messages, round_, expected, gathered, frozen)
        result.bytes_down += self._bytes_down - before

    def _outliers(self, gathered: Aggregation, result: Round) -> bool:
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

    def _gathered_so_far(self, round_: int, stage: Stage) -> Aggregation:
        # What came before a pause counts after it.
        if self._open is None or self._open[0] != round_:
            fold, share = not self.plan.strategy.spec.needs_all, self.plan.strategy.max_share
            strategy = self._strategy_of(stage)
            made = Aggregation(fold=fold, max_share=share)
            if isinstance(strategy, RuleStrategy):
                made = Aggregation(
                    fold=fold,
                    max_share=share,
                    weigh=strategy.rule.weight,
                    favour=strategy.rule.favour(pasts(self.plan, self.job.arm.rounds)),
                    passes=self.plan.passes(round_),
                )
            self._open = (round_, made)
        return self._open[1]

    def _train_messages(
        self,
        round_: int,
        stage: Stage,
        place: int,
        expected: Mapping[str, NDArray[Any]],
        there: Aggregation,
        frozen: Frozen,
    ) -> list[Message]:
        # A repeated round asks only whose update is missing: training twice would cost privacy.
        nodes = self._members.nodes
        had = there.updates.keys() | there.refused.keys()
        missing = [node for node, site in nodes.items() if site not in had]
        grid = GridSnapshot(self._everyone, missing, self.job.stop)
        if not grid.get_node_ids():  # Flower would wait for one without end
            return []
        account = self.plan.is_evaluated(round_, "validation")
        asked = len(there.updates.keys() | {nodes[node] for node in grid.get_node_ids()})
        besides = self._besides(stage, expected)
        model: Mapping[str, NDArray[Any]] = expected
        how = self.plan.compression_of(round_)
        if how is not None and how.download is not None:
            model = compress_model(how, {name: self.job.arrays[name] for name in expected})
        still = {name: one for name, one in self.job.arrays.items() if name not in expected}
        sent = {**still, **model, **besides}
        order = self._order(round_, "train", sent, account=account, sites=asked, frozen=frozen.mark)
        record = record_of({**expected, **besides})
        messages = list(self._strategy_of(stage).configure_train(place + 1, record, order, grid))
        # The strategy is told of the model as the sites have it.
        travels = record if model is expected else record_of({**model, **besides})
        for message in messages:
            message.content["arrays"] = travels
            # Nobody shall train for a round that is over.
            message.metadata.ttl = self.job.patience
        return messages

    def _as_received(self, round_: int, names: Iterable[str]) -> Arrays:
        """The arrays that train, as the sites have them before a round."""
        arrays = {name: self.job.arrays[name] for name in names}
        how = self.plan.compression_of(round_)
        if how is None or how.download is None:
            return arrays
        shapes = {name: value.shape for name, value in arrays.items()}
        content = compress_model(how, arrays)[COMPRESSED]
        return decompress_model(how, content, shapes)

    def _besides(self, stage: Stage, expected: Mapping[str, NDArray[Any]]) -> Arrays:
        """What the strategy has the sites receive beside the model; zeros before there is any."""
        spec = self._spec_of(stage)
        memory = memory_of(self._strategy_of(stage), spec, tuple(expected))
        return {
            name: memory[name].astype(np.float32) if name in memory else np.zeros_like(expected[of])
            for name, (_, of) in array_names(spec.received, expected).items()
        }

    def _collect(
        self,
        messages: list[Message],
        round_: int,
        expected: Mapping[str, Any],
        gathered: Aggregation,
        frozen: Frozen,
    ) -> list[Failure]:
        """Add the valid updates; give why each site that has none has none."""
        nodes = dict(self._members.nodes)
        asked = {nodes[message.metadata.dst_node_id] for message in messages}
        silent = {site: NO_ANSWER if site in asked else NOT_HERE for site in nodes.values()}
        failures = self._members.absent() | silent | gathered.refused
        diverged: dict[str, InvalidReply] = {}
        parameters = sum(array.size for array in expected.values())
        seed = (self._secret, round_)
        trains = not self.plan.is_centering(round_)
        for site in gathered.updates:
            failures.pop(site, None)
        try:
            for node, reply in self._replies(messages, frozen):
                site = nodes[node]
                update = read_update(
                    reply,
                    site,
                    round_,
                    expected,
                    self.plan,
                    self.job.facts.get(site),
                    self.job.most_change,
                    Sketch(seed, parameters) if trains else None,
                )
                if isinstance(update, Update):
                    update = gathered.too_far(update, self._size_of(site)) or update
                self._tell(round_, site, "train")
                if update.outcome is not None:
                    charge(self.job.arm, update.outcome, self.plan.privacy.delta)
                if isinstance(update, InvalidReply):
                    free_arrays(reply)
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
        self, messages: list[Message], frozen: Frozen, passes: int = 1
    ) -> Iterator[tuple[int, Message]]:
        """Send, and give each node's reply as it comes, up to the deadline of so many rounds.

        Frozen arrays go along where a node does not hold them; one that says so is asked again.
        """
        end = time.monotonic() + self.job.patience * passes
        bare = {message.metadata.dst_node_id: message for message in messages}
        held = {node for node in bare if frozen.mark and self.job.held.get(node) == frozen.mark}
        sent = [one if node in held else frozen.on(one) for node, one in bare.items()]
        while sent:
            self._bytes_down += sum(size_of(message.content) for message in sent)
            again = []
            left = max(0.0, end - time.monotonic())
            for node, reply in self._members.grid.replies(sent, left, self._members.cut_off):
                lacking = lacks_arrays(reply)
                if lacking and node in held:
                    held.discard(node)
                    self.job.held.pop(node, None)
                    again.append(frozen.on(bare[node]))
                    continue
                if frozen.mark and reply.has_content() and not lacking:
                    self.job.held[node] = frozen.mark
                yield node, reply
            sent = again

    def _frozen(self, arrays: Mapping[str, NDArray[Any]], train: Iterable[str]) -> Frozen:
        """The arrays that do not train now; named by their digest between hospitals alone."""
        still = {name: arrays[name] for name in arrays if name not in set(train)}
        return Frozen(record_of(still), digest(still) if still and self.job.study else "")

    def _blame(self, diverged: Mapping[str, InvalidReply], round_: int, sites: int) -> None:
        """Updates out of all proportion: of one site its fault, of half of them or more the plan's.

        Counted over all sites of the study: one that answers alone does not end it.
        """
        if diverged and len(diverged) >= min(sites, max(2, sites / 2)):
            first = sorted(diverged.items())[:3]
            told = "; ".join(f"{site}: {bad.reason.rstrip('.')}" for site, bad in first)
            raise self._divergence(f"{len(diverged)} of {sites} sites in round {round_}; {told}")
        for site, bad in diverged.items():
            self._members.note(site, bad)

    def _divergence(self, value: str) -> DivergenceError:
        return DivergenceError(
            "updates must stay finite and near the model at more than half of the sites: training "
            "diverges",
            value=value,
            where="training.learning_rate",
            fix="Lower the learning rate (or that of the stage, or of the strategy) and submit the "
            "plan again; no site is quarantined for this",
        )

    def _note(self, gathered: Aggregation, result: Round) -> None:
        looked = self.plan.is_evaluated(result.round, "validation")
        if looked:
            settle(self.job.arm)
        weights = gathered.weights()
        total = sum(weights.values())
        contributed = gathered.added(weighted=self.plan.strategy.spec.weighted)
        for update in gathered.ordered():
            out = update.outcome
            own = contributed.get(out.site)
            share = weights[out.site] / total
            result.bytes_up += update.size
            spent = self.job.arm.privacy.get(out.site)
            result.sites[out.site] = SiteRound(
                patients=out.patients,
                images=out.images,
                steps=out.steps,
                loss=out.loss,
                seconds=out.seconds,
                cpu_seconds=out.cpu_seconds,
                epsilon=spent.epsilon if spent and looked else None,
                share=share,
                pull=own.pull if own else None,
                agreement=own.agreement if own else None,
            )
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
        self,
        stage: Stage,
        place: int,
        gathered: Aggregation,
        received: Mapping[str, NDArray[Any]],
    ) -> None:
        strategy = self._strategy_of(stage)
        node = next(iter(self._members.nodes), 0)
        if isinstance(strategy, RuleStrategy):
            strategy.contributions = gathered.contributions()
            strategy.sites = len(self._members.named_to_train)
        try:
            arrays, _ = strategy.aggregate_train(place + 1, gathered.messages(node))
        except AppExitException as error:
            # No StudyError: waiting for sites does not mend it.
            raise ModelError(
                "the updates must be combinable",
                value=type(error).__name__,
                fix="Submit the plan again with another strategy",
            ) from error
        if arrays is None:
            raise PlanError(
                "the strategy must find enough updates",
                value=len(gathered.updates),
                fix="Submit the plan again with a higher quorum",
                where="participation.quorum",
            )
        new = dict(self.job.arrays)
        for name, array in arrays.items():
            new[name] = array.numpy().astype(self.job.arrays[name].dtype)
            if received[name] is not self.job.arrays[name]:
                new[name] += self.job.arrays[name] - received[name]
            if not np.isfinite(new[name]).all():
                raise self._divergence(f"the model after round {self.job.round}, {name}")
        self.job.arrays = new
        memory = memory_of(strategy, self._spec_of(stage), tuple(received))
        self.job.memory, self.job.memory_stage = memory, stage.name
        decay = average_decay(self.plan, self.job.round)
        self.job.average = blend(self.job.average, new, decay)

    def _strategy_of(self, stage: Stage) -> Strategy:
        # Momentum over arrays of another stage would move layers that no longer train.
        if self._strategy is None or self._strategy[0] != stage.name:
            training = self.plan.training
            momentum = training.momentum if training.optimizer == "sgd" else 0.0
            settings = StrategySettings(values=self.plan.strategy.settings, momentum=momentum)
            strategy = build_strategy(self._spec_of(stage).name, settings)
            if self.job.memory_stage == stage.name:
                names = shared_names(self._model, self.plan, self.job.round)
                remember(strategy, self._spec_of(stage), self.job.memory, names)
            self._strategy = (stage.name, strategy)
        return self._strategy[1]

    def _spec_of(self, stage: Stage) -> StrategySpec:
        """The plan's strategy; features are averaged, unless it compares the sites' answers."""
        spec = self.plan.strategy.spec
        return spec if stage.name != CENTERING or spec.needs_all else STRATEGIES["fedavg"]

    def _validate(self, round_: int, result: Round) -> None:
        facts = self.job.facts.items()
        sites = {s for s, one in facts if one.validation_images} - self.job.evaluate_only
        if not sites:
            return
        counts, _ = self._measure(round_, "validation", sites)
        if self.job.stop.is_set():  # of some of the sites they would pass for those of all
            return
        per_site, result.validation = figures(self.plan, counts)
        for site, values in per_site.items():
            if site in result.sites:
                result.sites[site].validation = values

    def _best(self) -> int | None:
        return best_round(self.plan, self.job.arm.rounds)

    def _finish(self) -> None:
        """Measure the model on the test patients; then the study is complete, measured or not.

        A patient job waits for sites that may come back as long as a round waits, and no longer:
        for one to be tested on, for each whose own model is still to be made, and for each that
        only evaluates.
        """
        facts, arm, plan = self.job.facts, self.job.arm, self.plan
        arm.ended_early = len(arm.rounds) < plan.rounds
        if plan.training.keep == "best" and self.job.best:
            self.job.average, arm.best_round = dict(self.job.best), self._best()
        sizes = {site: (one.test_images, one.test_patients) for site, one in facts.items()}
        unseen = {site: sizes.pop(site) for site in self.job.evaluate_only if site in sizes}
        own = [one for one in plan.tests if one]
        counts, missing = self._caught_up(
            lambda sites: self._measure(0, "test", sites), _with_images(sizes), each=bool(own)
        )
        if self.job.stop.is_set():
            return
        failures = _failures(missing)
        arm.test, arm.unmeasured = tested(plan, counts, sizes, failures, named(missing))
        if plan.own_round is not None:
            arm.own = self._own_models(plan.own_round, sizes)
        if plan.alone_round is not None:
            arm.alone = self._own_models(plan.alone_round, sizes)
        if self.job.evaluate_only:
            arm.unseen = self._unseen(unseen)
        if self.job.stop.is_set():
            return
        self.job.complete = True
        self._note_time()
        self.job.save(self.job)

    def _caught_up(
        self, step: Callable[[set[str]], Measured], sites: set[str], *, each: bool
    ) -> Measured:
        """Do a step at sites; where that can still come, also at those that are away at first.

        Parameters
        ----------
        step : callable
            Gives the counts of the sites that it is given, and why the others of them have none.
        sites : set of str
            Where.
        each : bool
            Whether a patient job waits for every site that may come back, once and for as long as
            a round waits; otherwise only while there are no counts at all.

        Returns
        -------
        counts, missing : dict
            Of all sites.
        """
        counts: dict[str, AnyCounts] = {}
        missing: dict[str, InvalidReply] = {}
        end, pause, left = time.monotonic() + self.job.patience, _LOOK_AGAIN, set(sites)
        while left and not self.job.stop.is_set():
            found, without = step(left)
            counts |= found
            missing = {s: bad for s, bad in missing.items() if s not in left} | without
            passing = {site for site, bad in without.items() if bad.kind in PASSING}
            if counts or each:
                here = set((self.job.members or {}).values())
                passing = (passing & here - self._given_up) if each else set()
            if not passing or not self.job.patient or time.monotonic() >= end:
                self._given_up |= passing
                break
            left, rule = passing, "a site to be tested on"
            if each:
                rule = "at its end each site that may come back, for as long as a round waits"
            reason = f"a study needs {rule}; {named({site: without[site] for site in left})}"
            self._wait(reason.__str__, pause, partial(self._any_is_there, left), end)
            pause = min(2 * pause, _LONGEST)
        return counts, missing

    def _any_is_there(self, sites: set[str]) -> bool:
        known = self._members.everybody
        return any(known[node] in sites for node in self._members.grid.get_node_ids())

    def _own_models(self, round_: int, sizes: Mapping[str, tuple[int, int]]) -> TestFigures | None:
        """Have each site make its own model where that is still to be done, and test it there."""
        made: set[str] = set()

        def step(sites: set[str]) -> Measured:
            still = sites - made if self.plan.passes(round_) else set[str]()
            failed = self._fine_tune(round_, still) if still else {}
            made.update(sites - failed.keys())
            ready = (sites & _with_images(sizes)) - failed.keys()
            counts, missing = self._measure(round_, "test", ready) if ready else ({}, {})
            return counts, missing | failed

        counts, missing = self._caught_up(step, set(sizes), each=True)
        missing = {site: bad for site, bad in missing.items() if sizes[site][0]}
        failures = _failures(missing)
        return tested(self.plan, counts, sizes, failures, named(missing), answers_by_site=False)[0]

    def _unseen(self, sizes: Mapping[str, tuple[int, int]]) -> TestFigures:
        """Measure the delivered model at the sites that took no part in training."""
        sites = set(self.job.evaluate_only) - (sizes.keys() - _with_images(sizes))
        counts, missing = self._caught_up(
            lambda these: self._measure(0, "test", these), sites, each=True
        )
        known = {
            site: (one.test_images, one.test_patients)
            for site, one in self.job.facts.items()
            if site in self.job.evaluate_only
        }
        failures = _failures(missing)
        found, _ = tested(self.plan, counts, known, failures, answers_by_site=False)
        return found or TestFigures(per_site={}, pooled={}, not_measured=failures)

    def _fine_tune(self, round_: int, sites: set[str]) -> dict[str, InvalidReply]:
        """Have these sites train the delivered model on by themselves; why some could not.

        What comes back says how many steps there were. The arrays stay at the site.
        """
        nodes = {node: site for node, site in self._members.nodes.items() if site in sites}
        members = [node for node in self._members.grid.get_node_ids() if node in nodes]
        train = trainable_names(self._model, self.plan.stage_of(round_)[0].train)
        frozen = self._frozen(self.job.average, train)
        order = self._order(
            round_, "train", self.job.average, sites=len(members), frozen=frozen.mark
        )
        fresh = record_of({name: self.job.average[name] for name in train})
        content = RecordDict({"arrays": fresh, "config": order})
        messages = [Message(content, node, MessageType.TRAIN) for node in members]
        passes = self.plan.passes(round_)
        for message in messages:
            message.metadata.ttl = self.job.patience * passes
        asked = {nodes[node] for node in members}
        failed = {site: NO_ANSWER if site in asked else NOT_HERE for site in sorted(sites)}
        failed |= {site: bad for site, bad in self._members.absent().items() if site in sites}
        before = self._bytes_down
        try:
            for node, reply in self._replies(messages, frozen, passes):
                site = nodes[node]
                facts = self.job.facts.get(site)
                update = read_update(reply, site, round_, {}, self.plan, facts)
                self._tell(round_, site, "own")
                if update.outcome is not None:
                    charge(self.job.arm, update.outcome, self.plan.privacy.delta)
                if isinstance(update, InvalidReply):
                    failed[site] = update
                    if update.uncharged:
                        asked.discard(site)
                else:
                    failed.pop(site, None)
        finally:
            self.job.arm.own_bytes_down += self._bytes_down - before
            for site in asked & self.job.facts.keys():
                charge_ordered(self.job.arm, self.plan, self.job.facts[site], round_)
        return failed

    def _measure(
        self, round_: int, part: str, sites: set[str]
    ) -> tuple[dict[str, AnyCounts], dict[str, InvalidReply]]:
        """The counts of these sites, and why each of them that sent none has none."""
        nodes = self._members.everybody
        members = [node for node in self._members.grid.get_node_ids() if nodes[node] in sites]
        only = {"evaluate_only": True} if sites <= self.job.evaluate_only else {}
        # Of the test: what trained last is what a site lacks.
        stage, _ = self.plan.stage_of(round_ or self.plan.rounds)
        train = trainable_names(self._model, stage.train)
        frozen = self._frozen(self.job.average, train)
        order = self._order(
            round_,
            "evaluate",
            self.job.average,
            part=part,
            sites=len(members),
            frozen=frozen.mark,
            **only,
        )
        fresh = record_of({name: self.job.average[name] for name in train})
        content = RecordDict({"arrays": fresh, "config": order})
        messages = [Message(content, node, MessageType.EVALUATE) for node in members]
        deadline = self.job.patience
        for message in messages:
            message.metadata.ttl = deadline
        asked = {nodes[node] for node in members}
        counts: dict[str, AnyCounts] = {}
        missing = {site: NO_ANSWER if site in asked else NOT_HERE for site in sorted(sites)}
        absent = self._members.absent(training=False)
        missing |= {site: bad for site, bad in absent.items() if site in sites}
        for node, reply in self._replies(messages, frozen):
            site = nodes[node]
            facts = self.job.facts.get(site)
            measured = read_counts(reply, site, round_, part, self.plan, facts)
            self._tell(round_, site, part)
            if isinstance(measured, SiteEvaluation):
                counts[site] = measured.counts
                missing.pop(site, None)
                self._members.note(site, None, "counts")
            else:
                missing[site] = measured
                self._unmeasured(site, measured)
        return counts, missing

    def _unmeasured(self, site: str, bad: InvalidReply) -> None:
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
            arrays=digest(arrays) if arrays else "",
            **more,
        )
        if self.job.sign is not None:
            order = self.job.sign(order)
        return ConfigRecord(order.to_flat())  # type: ignore[arg-type]

    def _tell(self, round_: int, site: str, what: str) -> None:
        self.job.listen(SiteAnswered(self.job.arm.name, round_, site, what))


def _with_images(sizes: Mapping[str, tuple[int, int]]) -> set[str]:
    return {site for site, (images, _) in sizes.items() if images}


def _failures(missing: Mapping[str, InvalidReply]) -> list[Failure]:
    return [
        Failure(site=site, reason=bad.reason, kind=bad.kind)
        for site, bad in sorted(missing.items())
    ]
