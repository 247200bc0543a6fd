"""A site's trainer: keeps data, model and frozen features warm and answers orders.

It knows nothing of the network or of Flower; what calls it may be a simulation in the same process
or a socket.
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from fedward.compression import COMPRESSED, RESIDUAL, compress, decompress_model
from fedward.dp.accounting import Mechanism, calibrate, epsilon_spent, private_steps_until
from fedward.errors import DataError, ModelError, PlanError, PrivacyError, ProtocolError
from fedward.models import (
    best_mode,
    build_model,
    freeze,
    from_arrays,
    sampled,
    shared_names,
    site_names,
    split_at_trainable,
    to_arrays,
    trainable_names,
)
from fedward.models.registry import GradSampleMode
from fedward.plan.load import SCHEMA_VERSION, plan_hash
from fedward.plan.schema import FEATURE_MEAN, Plan
from fedward.protocol import EvaluateOutcome, RoundOrder, SiteFacts, TrainOutcome
from fedward.rule_codes import RuleCode
from fedward.strategies import SiteHook, SiteRound, array_names
from fedward.strategies.fedprox import ProximalTerm
from fedward.tasks.private_counts import NoisyTables
from fedward_client.data.sample import PreparedSite
from fedward_client.site_state import SiteStates, StudyState
from fedward_client.training.batches import seed_for
from fedward_client.training.device import place
from fedward_client.training.evaluate import Answers, evaluate
from fedward_client.training.fit import Draws, Fit
from fedward_client.training.losses import build_loss
from fedward_client.training.optimizers import build_optimizer
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Source, digest_of

Arrays = dict[str, NDArray[Any]]
OWN, ALONE = "own", "alone"  # kinds of what a site keeps of models of its own
_BEGAN = "alone since round"


@dataclass
class _Prepared:
    """The model as one stage trains it."""

    names: tuple[str, ...]
    module: nn.Module
    source: Source
    frozen: str


class Trainer:
    """Trains and evaluates one plan on one site.

    Parameters
    ----------
    plan : Plan
        The study.
    site : PreparedSite
        The site's images, prepared for this plan.
    runtime : Runtime
        The machine.
    state : StudyState, optional
        Where the plan's strategy keeps what it needs from round to round; without it in memory.

    Attributes
    ----------
    may_choose : bool
        Whether the site may choose among models by exact figures on its validation patients; not
        where its policy lets only noisy counts out, whose ε would not cover the choice.
    """

    def __init__(
        self, plan: Plan, site: PreparedSite, runtime: Runtime, state: StudyState | None = None
    ) -> None:
        self.plan, self.site, self.runtime = plan, site, runtime
        self.state = state or SiteStates().of("", plan_hash(plan), site.cohort)
        runtime.enter()
        self._model = place(self._build(), runtime.torch_device)
        self._loss = build_loss(plan, runtime.torch_device)
        self.may_choose = True
        self._state_read: tuple[int, Arrays] | None = None
        self._choices: dict[tuple[int, str], str] = {}
        self._site_names = site_names(self._model, plan)
        self._prepared: _Prepared | None = None
        self._mechanism: Mechanism | None = None
        self._released: tuple[int, tuple[Arrays, TrainOutcome]] | None = None

    def _build(self) -> nn.Module:
        model = build_model(self.plan, seed=0)
        self._mode: GradSampleMode = self.runtime.grad_sample_mode or best_mode(model)
        ours = self.plan.privacy.on and self._mode != "functorch"
        return sampled(model) if ours else model

    def describe(self) -> SiteFacts:
        """What the site says of itself."""
        return site_facts(self.plan, self.site)

    def train(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder
    ) -> tuple[Arrays, TrainOutcome]:
        """Train one round from the given global model.

        Parameters
        ----------
        arrays : mapping
            The whole model, and what the plan's strategy declares to send with it.
        order : RoundOrder
            Plan and round.

        Returns
        -------
        tuple
            The arrays that train in this round's stage, then those that the strategy declares to
            be sent besides, compressed where the plan says so; and what they were made of.

        Raises
        ------
        DataError
            The site has too few training patients for the plan.
        ProtocolError
            The plan trains in no such round.
        PrivacyError
            A private round before the last one; the last one again gives the same update again.
        """
        if not 1 <= order.round <= self.plan.last_trained_round:
            raise ProtocolError(
                RuleCode.ROUNDS,
                values={"rounds": self.plan.last_trained_round, "round": order.round},
                fix="Order one of these",
            )
        if not self.plan.privacy.on:
            return self._train(arrays, order)
        # A second update for the same round would be a second release that ε does not count.
        released = self._released
        if released is not None and order.round < released[0]:
            raise PrivacyError(RuleCode.TRAINED_ONCE, values={"round": order.round}, fix="Go on")
        if released is None or order.round > released[0]:
            released = self._released = (order.round, self._train(arrays, order))
        return released[1]

    def _train(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder
    ) -> tuple[Arrays, TrainOutcome]:
        started, cpu = time.perf_counter(), time.process_time()
        self.runtime.enter()
        self._state_read = None
        arrays = self.opened(arrays, order.round)
        update: Arrays = {}
        kept: Arrays = {}
        loss: float | None
        if order.round == self.plan.own_round:
            loss, steps, kept = self._fine_tune(arrays, order)
            kept |= self._kept_alone(order.round)
        else:
            fit = self._fit(arrays, order)
            centering = self.plan.is_centering(order.round)
            loss, steps = self._measured(fit) if centering else self._in_turn(fit, order)
            values = to_arrays(self._model)
            update = {name: values[name] for name in self.shared}
            if self._site_names:
                kept = self._kept_own(order.round, self._site_names & set(self.trained))
            if fit.hook is not None:
                more, besides = self._finish(fit.hook)
                kept, update = kept | more, update | besides
            update, left = self._compressed(arrays, update, order)
            kept |= left
            personal = self.plan.personal
            if personal is not None and not centering:
                if personal.method == "ditto":
                    steps += self._second(arrays, order, OWN, personal.weight or 0.0)
                    kept |= self._kept_own(order.round, self.trained)
                if personal.alone:
                    steps += self._second(arrays, order, ALONE, 0.0)
                    kept |= self._kept_alone(order.round, self.trained)
        if kept:
            self.state.keep(order.round, kept)
        self._state_read = None
        outcome = TrainOutcome(
            site=self.site.name,
            round=order.round,
            patients=self.site.patients_in("train"),
            images=len(self.site.split["train"]),
            steps=steps,
            # An exact loss on training patients is a release that ε would not cover.
            loss=None if self.plan.privacy.on or loss is None else _finite(loss),
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu,
            **self._cost(order),
        )
        return update, outcome

    def _run(self, fit: Fit) -> tuple[float, int]:
        with fit.draws.in_layers(self.runtime.torch_device):
            return fit.run(self.optimizer(fit))

    def _in_turn(self, fit: Fit, order: RoundOrder) -> tuple[float, int]:
        """Train all at once; with FedRep what stays at the site first, and then what travels.

        FedRep (Collins et al., 2021, arXiv:2102.07078, algorithm 1): while one part trains, the
        other stands still. The strategy's hook is of what travels.
        """
        if self.plan.personal is None or self.plan.personal.method != "fedrep":
            return self._run(fit)
        draws = Draws.make(self.runtime, order.seed, self.site.name, order.round, "local")
        try:
            freeze(self._model, self._site_names & set(self.trained))
            _, first = self._run(replace(fit, hook=None, draws=draws))
            freeze(self._model, self.shared)
            loss, steps = self._run(fit)
        finally:
            freeze(self._model, self.trained)
        return loss, first + steps

    def _second(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder, kind: str, weight: float
    ) -> int:
        """Train a second model of the site's, held near the shared one that was received.

        Ditto (Li et al., 2021, arXiv:2012.04221, algorithm 1): each step's gradient has
        λ·(v − wᵗ) added, for the own model v and the received one wᵗ. With a λ of 0 it is what
        the site trains alone.
        """
        besides = self._received(arrays, order.round)
        received = {name: value for name, value in arrays.items() if name not in besides}
        from_arrays(self._model, received)
        parameters = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        near = ProximalTerm(SiteRound({"mu": weight}, parameters, {}, {}))
        model = received | self._of_kind(kind, order.round)
        fit = self._fit(model, order, own=kind, hook=near)
        return self._run(fit)[1]

    def _fine_tune(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder
    ) -> tuple[float, int, Arrays]:
        """Train the delivered model on by itself; keeps the best pass on the validation patients.

        With privacy it keeps the last one: no ε covers the choice.
        """
        passes, steps, loss = self.plan.passes(order.round), 0, 0.0
        now, best, score = dict(arrays), Arrays(), -math.inf
        optimizer: Optimizer | None = None
        for number in range(passes):
            fit = self._fit(now, order, own=OWN, of=(number, passes))
            if optimizer is None:
                optimizer = build_optimizer(
                    self.plan, [p for p in fit.module.parameters() if p.requires_grad]
                )
            with fit.draws.in_layers(self.runtime.torch_device):
                loss, more = fit.run(optimizer)
            steps += more
            values = to_arrays(self._model)
            now |= {name: values[name] for name in self.trained}
            found = self._score(now, order)
            if not best or found is None or found > score:
                best = {f"{OWN}/{name}": now[name].copy() for name in self.trained}
                score = -math.inf if found is None else found
        return loss, steps, best

    def _score(self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder) -> float | None:
        """The primary figure on the validation patients, higher being better; it stays here.

        None where the site may not choose by it, or it is not defined.
        """
        personal = self.plan.personal
        allowed = self.may_choose and not self.plan.privacy.on
        if personal is None or not personal.choose or not allowed:
            return None
        if not len(self.site.split["validation"]):
            return None
        primary = self.plan.metrics.primary
        part = order.model_copy(update={"part": "validation", "round": self.plan.rounds})
        value = self._answers(arrays, part).exact().figures([primary])[primary]
        if value is None:
            return None
        return value if self.plan.task.spec.metric(primary).better == "higher" else -value

    def _kept_own(self, round_: int, names: Collection[str]) -> Arrays:
        """What the site keeps of its own model after a round in which these arrays trained."""
        values = to_arrays(self._model)
        own = self._of_kind(OWN, round_) | {name: values[name] for name in names}
        return {f"{OWN}/{name}": value for name, value in own.items()}

    def _kept_alone(self, round_: int, names: Collection[str] = ()) -> Arrays:
        """The same of what it trains alone, and the round in which that began."""
        if self.plan.alone_round is None:
            return {}
        values = to_arrays(self._model) if names else {}
        alone = self._of_kind(ALONE, round_) | {name: values[name] for name in names}
        began = self._kept_before(round_).get(_BEGAN, np.array([round_], np.float32))
        return {_BEGAN: began} | {f"{ALONE}/{name}": value for name, value in alone.items()}

    def _of_kind(self, kind: str, round_: int) -> Arrays:
        """What the site keeps of a model of its own before a round; none before its first one."""
        if self.plan.personal is None:
            return {}
        mark = f"{kind}/"
        kept = self._kept_before(round_)
        return {n.removeprefix(mark): v for n, v in kept.items() if n.startswith(mark)}

    def _kept_before(self, round_: int) -> Arrays:
        """What the site keeps before a round; read once while the round is trained."""
        if self._state_read is None or self._state_read[0] != round_:
            self._state_read = round_, self.state.before(round_)
        return self._state_read[1]

    def _alone(self) -> Arrays:
        """What the site trained alone, from the first round on.

        Raises
        ------
        DataError
            It began later, from a model that other sites had trained already.
        """
        if not self._began_alone():
            raise DataError(
                RuleCode.NOT_ALONE, fix="Take part from the first round of the study on"
            )
        return self._of_kind(ALONE, self.plan.last_round + 1)

    def _began_alone(self) -> bool:
        """Whether what the site trains alone began with the study's first round."""
        began = self._kept_before(self.plan.last_round + 1).get(_BEGAN, np.zeros(1, np.float32))
        return int(began[0]) == self.plan.first_training_round

    def _measured(self, fit: Fit) -> tuple[None, int]:
        """Put the mean of the site's features into the model; that is all of this round."""
        mean, steps = fit.measure()
        self._model.get_buffer(FEATURE_MEAN).copy_(mean)
        return None, steps

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the arrays that train in the round that was prepared last."""
        return self._prepared.names if self._prepared else ()

    @property
    def shared(self) -> tuple[str, ...]:
        """Those of them that are sent."""
        return tuple(name for name in self.trained if name not in self._site_names)

    def optimizer(self, fit: Fit) -> Optimizer | None:
        """The optimiser that a round goes on with; none: a fresh one."""
        return None

    def evaluate(
        self,
        arrays: Mapping[str, NDArray[Any]],
        order: RoundOrder,
        noise: NoisyTables | None = None,
    ) -> tuple[Arrays, EvaluateOutcome]:
        """Evaluate a model on one part of the site's patients, as counts that can be added up.

        Parameters
        ----------
        arrays : mapping
            The whole model.
        order : RoundOrder
            Plan, round and part.
        noise : NoisyTables, optional
            How to count where no exact figure may leave; none: exact counts.

        Raises
        ------
        DataError
            The part holds no image.
        """
        started = time.perf_counter()
        part, answers = order.part, self.answers(arrays, order)
        outcome = EvaluateOutcome(
            site=self.site.name,
            round=order.round,
            part=part,
            images=len(answers.patients),
            seconds=time.perf_counter() - started,
            unit=noise.unit if noise else None,
            noise=float(noise.scale) if noise else None,
            epsilon=self.plan.evaluation_epsilon(part) if noise and noise.by_patient else None,
        )
        if noise is None:
            return answers.exact().to_arrays(), outcome
        return answers.noisy(noise, self._randbelow(order)), outcome

    def answers(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder, *, surface: bool = True
    ) -> Answers:
        """A model's answers on one part of the site's patients, image by image; none of it leaves.

        In the round of the sites' own models they are of the site's own, or of the given one where
        the site chooses that. Without ``surface`` no HD95 is measured, which takes most of the
        time. Else parameters and errors as for :meth:`evaluate`.
        """
        return self._answers(self.model_of(arrays, order), order, surface=surface)

    def model_of(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder
    ) -> Mapping[str, NDArray[Any]]:
        """The model that a site answers with: the given one, or its own.

        Parameters
        ----------
        arrays : mapping
            The shared model.
        order : RoundOrder
            An evaluation.
        """
        self._state_read = None
        if order.round == self.plan.alone_round:
            return dict(arrays) | self._alone()
        stays_here = bool(self._site_names) and order.part == "validation"
        if order.round != self.plan.own_round and not stays_here:
            return arrays
        own = dict(arrays) | self._of_kind(OWN, order.round + 1)
        if stays_here:  # in each round, arrays that stay at the site are the site's
            return own
        models: dict[str, Mapping[str, NDArray[Any]]] = {OWN: own, "shared": arrays}
        if self.plan.alone_round is not None and self._began_alone():
            models[ALONE] = dict(arrays) | self._alone()
        return models[self._choice(models, order)]

    def _choice(self, models: Mapping[str, Mapping[str, NDArray[Any]]], order: RoundOrder) -> str:
        """Which of its models the site uses; measured once for each shared model that comes.

        The first one, unless another is better on the validation patients.
        """
        key = order.round, order.arrays
        if not order.arrays or key not in self._choices:
            scores = {kind: self._score(model, order) for kind, model in models.items()}
            known = {kind: score for kind, score in scores.items() if score is not None}
            first = next(iter(models))
            self._choices = {key: max(known, key=known.__getitem__) if first in known else first}
        return self._choices[key]

    def _answers(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder, *, surface: bool = True
    ) -> Answers:
        self.runtime.enter()
        part = order.part
        indices = self.site.split[part]
        if not len(indices):
            raise DataError(RuleCode.PART_PATIENTS, values={"part": part}, fix="Change [split]")
        prepared = self._prepare(arrays, order.round or self.plan.rounds)
        return evaluate(
            self.plan,
            prepared.module,
            prepared.source,
            self.site,
            indices,
            self.runtime,
            surface=surface and part == "test" and "hd95" in self.plan.metrics.report,
        )

    def _randbelow(self, order: RoundOrder) -> Callable[[int], int]:
        """Source of the counts' noise: the system's, or a seeded one for a simulation."""
        if not self.runtime.seeded_counts:
            return secrets.randbelow
        seed = seed_for(order.seed, self.site.name, order.round, order.part, "counts")
        return random.Random(seed).randrange

    def _fit(
        self,
        arrays: Mapping[str, NDArray[Any]],
        order: RoundOrder,
        *,
        own: str = "",
        hook: SiteHook | None = None,
        of: tuple[int, int] = (0, 1),
    ) -> Fit:
        """The training of a round, or one of several passes over an own model."""
        indices = self.site.split["train"]
        least = self.plan.participation.minimum_patients
        if (patients := self.site.patients_in("train")) < min(least, 1):
            raise DataError(
                RuleCode.NO_TRAINING_PATIENTS, values={"patients": patients}, fix="Bring more data"
            )
        received = {} if own else self._received(arrays, order.round)
        model = {name: value for name, value in arrays.items() if name not in received}
        if self._site_names and not own:
            model |= self._of_kind(OWN, order.round)
        prepared = self._prepare(model, order.round)
        draws = (order.seed, self.site.name, order.round, *((own, of[0]) if own else ()))
        return Fit(
            plan=self.plan,
            round=order.round,
            module=prepared.module,
            source=prepared.source,
            loss=self._loss,
            indices=indices,
            patients=self.site.patients[indices],
            runtime=self.runtime,
            draws=Draws.make(self.runtime, *draws),
            mechanism=self._private_mechanism(),
            mode=self._mode,
            hook=hook if own else self._hook(received, order.round),
            done=(of[0] / of[1], (of[0] + 1) / of[1]),
        )

    def _received(self, arrays: Mapping[str, NDArray[Any]], round_: int) -> Arrays:
        """What came beside the model: of each kind that the plan's strategy declares."""
        names = shared_names(self._model, self.plan, round_)
        declared = array_names(self.plan.strategy.spec.received, names)
        shapes = {name: tuple(p.shape) for name, p in self._model.named_parameters()}
        found = {name: np.asarray(arrays[name]) for name in declared if name in arrays}
        right = [
            value.shape == shapes[declared[name][1]]
            and value.dtype == np.float32
            and bool(np.isfinite(value).all())
            for name, value in found.items()
        ]
        if len(found) != len(declared) or not all(right):
            raise ProtocolError(
                RuleCode.STRATEGY_RECEIVED,
                fix="Run the same Fedward release on both ends",
            )
        return found

    def _hook(self, received: Arrays, round_: int) -> SiteHook | None:
        """The strategy's part in a round, by the signed plan alone."""
        spec = self.plan.strategy.spec
        if spec.site is None or self.plan.is_centering(round_):  # nothing trains there
            return None
        trained = dict(self._model.named_parameters())
        parameters = {name: trained[name] for name in self.shared}
        names = array_names(spec.kept, parameters)
        before = self._kept_before(round_) if spec.kept else {}
        kept = {name: value for name, value in before.items() if name in names}
        if kept.keys() != names.keys():  # at first, and in a stage that trains other arrays
            kept = {
                name: np.zeros(tuple(parameters[of].shape), np.float32)
                for name, (_, of) in names.items()
            }
        device = self.runtime.torch_device
        return spec.site(
            SiteRound(
                settings=spec.given(self.plan.strategy.settings),
                parameters=parameters,
                kept=_by_kind(kept, spec.kept, device),
                received=_by_kind(received, spec.received, device),
            )
        )

    def _finish(self, hook: SiteHook) -> tuple[Arrays, Arrays]:
        """What a round leaves at the site, and what is sent besides its update; nothing else."""
        spec, result = self.plan.strategy.spec, hook.finish()
        kept = self._declared(result.kept, spec.kept)
        besides = self._declared(result.sent, spec.sent)
        if not all(np.isfinite(value).all() for value in kept.values()):
            raise ModelError(
                RuleCode.ARRAYS_FINITE, fix="Lower the learning rate, or leave the site out"
            )
        return kept, besides

    def opened(self, arrays: Mapping[str, NDArray[Any]], round_: int) -> Mapping[str, NDArray[Any]]:
        """The arrays of a training order, decompressed where the plan has them compressed.

        Raises
        ------
        ProtocolError
            They are not compressed as the plan says.
        """
        how = self.plan.compression_of(round_)
        if how is None or how.download is None:
            return arrays
        parameters = dict(self._model.named_parameters())
        shapes = {
            name: tuple(parameters[name].shape)
            for name in shared_names(self._model, self.plan, round_)
        }
        content = arrays.get(COMPRESSED, np.zeros(0, np.float32))
        others = {name: value for name, value in arrays.items() if name != COMPRESSED}
        return others | decompress_model(how, content, shapes)

    def _compressed(
        self, received: Mapping[str, NDArray[Any]], update: Arrays, order: RoundOrder
    ) -> tuple[Arrays, Arrays]:
        """The update as it travels, and what its compression left out for the next one."""
        how = self.plan.compression_of(order.round)
        if how is None:
            return update, {}
        before = self._kept_before(order.round) if how.error_feedback else {}
        mark = f"{RESIDUAL}/"
        left = {n.removeprefix(mark): v for n, v in before.items() if n.startswith(mark)}
        # Chance that rounds what has its noise already needs no secrecy; but a private round at a
        # hospital ignores the order's seed altogether.
        parts = (order.seed, self.site.name, order.round, "compression")
        seeded = self.runtime.randomness == "seeded"
        draw = np.random.default_rng(seed_for(*parts) if seeded else None)
        sent, left = compress(how, received, update, left, draw)
        return sent, {f"{mark}{name}": value for name, value in left.items()}

    def _declared(self, made: Mapping[str, Mapping[str, Tensor]], kinds: Iterable[str]) -> Arrays:
        names = array_names(kinds, self.shared)
        if made.keys() != set(kinds) or any(
            one.keys() != set(self.shared) for one in made.values()
        ):
            raise PlanError(RuleCode.STRATEGY_ARRAYS, where="strategy.name")
        return {
            name: made[kind][of].detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
            for name, (kind, of) in names.items()
        }

    def _prepare(self, arrays: Mapping[str, NDArray[Any]], round_: int) -> _Prepared:
        """Load the arrays; rebuild what depends on frozen layers only when these changed."""
        from_arrays(self._model, arrays)
        stage, _ = self.plan.stage_of(round_)
        names = trainable_names(self._model, stage.train)
        frozen_names = [name for name in arrays if name not in set(names)]
        frozen = digest_of(arrays, frozen_names)
        if self._prepared and (self._prepared.names, self._prepared.frozen) == (names, frozen):
            return self._prepared
        freeze(self._model, names)
        prefix, module = split_at_trainable(self._model, set(names))
        if prefix is not None:
            prefix.eval()
        # What the prefix makes of an image depends on nothing behind it.
        leading = digest_of(arrays, [] if prefix is None else list(prefix.state_dict()))
        source = Source(self.plan, self.site, self.runtime, prefix, leading)
        self._prepared = _Prepared(names, module, source, frozen)
        return self._prepared

    def _private_mechanism(self) -> Mechanism | None:
        if not self.plan.privacy.on:
            return None
        if self._mechanism is None:
            self._mechanism = calibrate(self.plan, self.site.patients_in("train"))
        return self._mechanism

    def _cost(self, order: RoundOrder) -> dict[str, Any]:
        mechanism, delta = self._private_mechanism(), self.plan.privacy.delta
        if mechanism is None:
            return {}
        if delta is None:
            raise PrivacyError(RuleCode.NEEDS_DELTA, fix="Set privacy.delta")
        done = private_steps_until(self.plan, mechanism.sampling_rate, order.round)
        cost: dict[str, Any] = {
            "delta": delta,
            "noise_multiplier": mechanism.noise_multiplier,
            "sampling_rate": mechanism.sampling_rate,
        }
        if order.account:
            cost["epsilon"] = epsilon_spent(
                mechanism.noise_multiplier, mechanism.sampling_rate, done, delta
            )
        return cost


def site_facts(plan: Plan, site: PreparedSite) -> SiteFacts:
    """What a site says of itself: counts, and nothing about a person."""
    train = site.split["train"]
    left = sorted(site.left_out.items())
    sizes: dict[str, Any] = {
        f"{part}_images": len(site.split[part]) for part in ("train", "validation", "test")
    }
    people: dict[str, Any] = {
        f"{part}_patients": site.patients_in(part) for part in ("train", "validation", "test")
    }
    return SiteFacts(
        site=site.name,
        patients=len(np.unique(site.patients)),
        images=len(site.images),
        class_counts=plan.task.spec.class_counts(plan.task, site.targets, train),
        synthetic=site.synthetic,
        images_are_patients=site.images_are_patients,
        plan_schema=SCHEMA_VERSION,
        left_out_reasons=tuple(reason for reason, _ in left),
        left_out_counts=tuple(count for _, count in left),
        **sizes,
        **people,
    )


def _finite(value: float) -> float:
    return float(np.nan_to_num(value, nan=1e9, posinf=1e9, neginf=-1e9))


def _by_kind(
    arrays: Arrays, kinds: Iterable[str], device: torch.device
) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for name, value in arrays.items():
        kind, _, of = name.partition("/")
        found[kind][of] = torch.from_numpy(np.array(value)).to(device)
    return found
