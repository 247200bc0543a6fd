"""An attacker who sees every update of a site and looks for canaries in each.

It knows the canaries' images, the model before the update, and how the other patients pull on
average; not who was put in, nor the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.compression import decompress, moved
from fedward.dp.accounting import private_steps_until
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder, TrainOutcome
from fedward_client.data.sample import PreparedSite
from fedward_client.training.optimizers import rate_at
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_simulation.audit.canaries import read
from fedward_simulation.audit.view import SiteView

Arrays = Mapping[str, NDArray[Any]]
_MOST_ROUNDS = 64  # that the attacker looks at, spread over the study
_GROUPS = 8  # of other patients, whose mean gradients are taken out of an update
_RIDGE = 1e-3
_LEAST_GAIN = 0.3  # of a canary's share of the clipping norm that nothing else explains


@dataclass
class Seen:
    """What the updates of one site told.

    Attributes
    ----------
    score : NDArray
        ``(canaries,)`` evidence over all rounds.
    inside, outside : list of tuple of float
        Observations of single steps with and without the canary, in units of the clipping norm,
        each with what a canary that is drawn gives on average: its share of the norm that nothing
        else explains. Only where an update is one private step.
    noise_multiplier, sampling_rate : float
        As the site said.
    """

    score: NDArray[np.float64]
    inside: list[tuple[float, float]] = field(default_factory=list)
    outside: list[tuple[float, float]] = field(default_factory=list)
    noise_multiplier: float = 0.0
    sampling_rate: float = 0.0


class WatchedTrainer(Trainer):
    """A site's trainer; an attacker keeps what each of its updates tells.

    Parameters
    ----------
    canaries : NDArray
        ``(m,)`` images, one patient each.
    inside : NDArray
        ``(m,)`` which of them are among the training data.
    """

    def __init__(
        self,
        plan: Plan,
        site: PreparedSite,
        runtime: Runtime,
        canaries: NDArray[np.int64],
        inside: NDArray[np.bool_],
    ) -> None:
        super().__init__(plan, site, runtime)
        self._canaries, self._inside = canaries, inside
        self._view = SiteView(plan, site, runtime)
        others = np.setdiff1d(site.split["train"], canaries)
        groups = np.array_split(np.random.default_rng(0).permutation(others), _GROUPS)
        self._others = [group[:64] for group in groups if len(group)]
        looked = np.linspace(1, plan.rounds, min(plan.rounds, _MOST_ROUNDS))
        self._rounds = set(looked.round().astype(int).tolist())
        self._seen = Seen(np.zeros(len(canaries)))

    def kept(self) -> Seen:
        """What the attacker knows by now."""
        return self._seen

    def train(
        self, arrays: Arrays, order: RoundOrder, *more: Any, **named: Any
    ) -> tuple[dict[str, NDArray[Any]], TrainOutcome]:
        """Train as ever, and hand the attacker what is released."""
        released, outcome = super().train(arrays, order, *more, **named)
        if order.round in self._rounds and not self.plan.is_centering(order.round):
            self._rounds.discard(order.round)
            start = self.opened(arrays, order.round)
            self._look(start, self._decompressed(start, released, order.round), outcome)
        return released, outcome

    def _decompressed(self, arrays: Arrays, released: Arrays, round_: int) -> Arrays:
        """What the aggregator makes of an update."""
        how = self.plan.compression_of(round_)
        if how is None:
            return released
        shapes = {name: arrays[name].shape for name in self.shared}
        return moved(arrays, decompress(how, released, shapes))

    def _look(self, arrays: Arrays, released: Arrays, outcome: TrainOutcome) -> None:
        self._view.load(arrays, outcome.round)
        names = self._view.names
        change = np.concatenate(
            [(arrays[n].astype(np.float64) - released[n]).ravel() for n in names]
        )
        gradients = read(self._view.gradients([np.array([i]) for i in self._canaries]))
        others = read(self._view.gradients(self._others)) if self._others else gradients[:0]
        observed = read(change[None])[0] * self._scale(outcome)
        if self.plan.privacy.clipping_norm is not None:
            # Of the whole gradient, though only some of its numbers may be read.
            norms = np.linalg.norm(gradients, axis=1) / self.plan.privacy.clipping_norm
            gradients = gradients / np.maximum(norms, 1.0)[:, None]
            gradients = gradients / self.plan.privacy.clipping_norm
        basis, _ = np.linalg.qr(others.T)
        gradients = gradients - (gradients @ basis) @ basis.T
        observed = observed - basis @ (basis.T @ observed)
        self._weigh(gradients, observed)
        if self._is_one_step():
            self._try_each(gradients, observed, outcome)

    def _scale(self, outcome: TrainOutcome) -> float:
        """What turns a change of weights into a sum of gradients, in units of the clipping norm."""
        rate = rate_at(self.plan, outcome.round, 0.0)
        if not self.plan.privacy.on:
            return self.plan.training.batch_size / rate
        drawn = (outcome.sampling_rate or 1.0) * outcome.patients
        return drawn / (rate * (self.plan.privacy.clipping_norm or 1.0))

    def _weigh(self, gradients: NDArray[np.float64], observed: NDArray[np.float64]) -> None:
        """Least squares for each canary's share; shares that the update tells well weigh more."""
        gram = gradients @ gradients.T
        size = float(np.trace(gram)) / len(gram)
        if not np.isfinite(size) or size <= 0:
            return
        inverse = np.linalg.inv(gram + _RIDGE * size * np.eye(len(gram)))
        share = inverse @ (gradients @ observed)
        self._seen.score += np.nan_to_num(share / np.diag(inverse))

    def _is_one_step(self) -> bool:
        training = self.plan.training
        return (
            self.plan.privacy.on
            and training.local_steps == 1
            and training.optimizer == "sgd"
            and not training.weight_decay
        )

    def _try_each(
        self, gradients: NDArray[np.float64], observed: NDArray[np.float64], outcome: TrainOutcome
    ) -> None:
        """One trial per canary, each along a direction of its own.

        The directions are orthonormal, so that the noise of one trial is independent of that of
        every other. Along its direction a canary shares with those behind it alone; their expected
        shares, which an attacker who knows all other patients knows, are taken off.
        """
        seen, rate = self._seen, outcome.sampling_rate or 1.0
        seen.noise_multiplier = outcome.noise_multiplier or 0.0
        seen.sampling_rate = rate
        directions, shares = np.linalg.qr(gradients.T)
        along = directions.T @ observed
        for place, inside in enumerate(self._inside[: len(shares)]):
            gain = shares[place, place]
            if abs(gain) < _LEAST_GAIN:
                continue
            expected = rate * float(shares[place, place + 1 :] @ self._inside[place + 1 :])
            value = float(np.sign(gain) * (along[place] - expected))
            (seen.inside if inside else seen.outside).append((value, abs(float(gain))))


def steps_in_all(plan: Plan, rate: float) -> int:
    """Private steps of the whole study."""
    return private_steps_until(plan, rate, plan.last_round)
