"""One round of local fine-tuning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.dp.accounting import Mechanism, private_steps_in, steps_in_round, steps_per_round
from fedward.dp.gaussian import GaussianNoise
from fedward.dp.keystream import KEY_BYTES, Keystream, derive_key
from fedward.models.registry import GradSampleMode
from fedward.plan.schema import Plan
from fedward.strategies import SiteHook
from fedward_client.training.batches import (
    FILLER,
    PatientSampler,
    chunks,
    patients_at_once,
    seed_for,
    shuffled,
)
from fedward_client.training.device import autocast
from fedward_client.training.feature_mean import exact_mean, private_mean
from fedward_client.training.losses import Loss
from fedward_client.training.optimizers import build_optimizer, rate_at, set_rate
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Inputs, Source

if TYPE_CHECKING:
    from fedward_client.training.private import PrivateStep

_GRADIENT_FLOATS = 32_000_000  # what the gradients of all images of a part may take: 128 MB
_USUAL_BATCH = Runtime.physical_batch


@dataclass(frozen=True)
class Draws:
    """The random sources of one site in one round.

    The privacy proof rests on ``patients`` and ``noise``, which are keystreams. It lets the others
    be any numbers that do not depend on the patients and that nobody can guess: whoever knew which
    change or dropout an image met would see one patient more shift all that follow. So at a
    hospital they are seeded by the system with more bits than can be tried, but not cryptographic.

    Attributes
    ----------
    patients : Keystream
        Which patients, and which of their images, are in a private step.
    noise : GaussianNoise
        The noise of private steps.
    order : np.random.Generator
        The order of images without privacy.
    change : torch.Generator
        How images are augmented.
    seed_layers : callable
        Seeds a generator that layers (dropout) draw from.
    """

    patients: Keystream
    noise: GaussianNoise
    order: np.random.Generator
    change: torch.Generator
    seed_layers: Callable[[torch.Generator], object]

    @classmethod
    def make(cls, runtime: Runtime, *parts: object) -> Draws:
        """Sources that follow ``parts`` in a simulation, and the system's entropy at a hospital."""
        if runtime.randomness == "system":
            change, noise = torch.Generator(), GaussianNoise(os.urandom(KEY_BYTES))
            Keystream.from_system().fill_generator(change)
            layers = Keystream.from_system().fill_generator
            return cls(Keystream.from_system(), noise, np.random.default_rng(), change, layers)
        return cls(
            patients=Keystream(derive_key(*parts, "patients")),
            noise=GaussianNoise(derive_key(*parts, "noise")),
            order=np.random.default_rng(seed_for(*parts, "order")),
            change=torch.Generator().manual_seed(seed_for(*parts, "change")),
            seed_layers=lambda generator: generator.manual_seed(seed_for(*parts, "layers")),
        )

    @contextmanager
    def in_layers(self, device: torch.device) -> Iterator[None]:
        """Within it, layers draw from here; torch's own generators are as they were afterwards."""
        index = (device.index or 0) if device.type == "cuda" else None
        with torch.random.fork_rng(devices=[] if index is None else [index]):
            self.seed_layers(torch.default_generator)
            if index is not None:
                self.seed_layers(torch.cuda.default_generators[index])
            yield


@dataclass(frozen=True)
class Fit:
    """What one round's training needs.

    Attributes
    ----------
    module : nn.Module
        What trains (the model, or what follows its frozen leading layers).
    source : Source
        Inputs of ``module`` and targets.
    indices, patients : NDArray
        ``(n,)`` training images and the patient number of each.
    mechanism : Mechanism or None
        How to make the update private; None for plain training.
    hook : SiteHook or None
        What the plan's strategy adds to each step.
    done : tuple of float
        Share of the round's steps that are done at the beginning, and at the end.
    """

    plan: Plan
    round: int
    module: nn.Module
    source: Source
    loss: Loss
    indices: NDArray[np.int64]
    patients: NDArray[np.int64]
    runtime: Runtime
    draws: Draws
    mechanism: Mechanism | None
    mode: GradSampleMode
    hook: SiteHook | None = None
    done: tuple[float, float] = (0.0, 1.0)

    def run(self, optimizer: torch.optim.Optimizer | None = None) -> tuple[float, int]:
        """Train; returns the mean loss and the steps taken.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer, optional
            One to go on with; without it a fresh one, as a federated round has it.
        """
        self.module.train()
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = optimizer or build_optimizer(self.plan, parameters)

        def finish(step: int, steps: int, apply: Callable[[], object]) -> None:
            first, last = self.done
            rate = rate_at(self.plan, self.round, first + (last - first) * step / steps)
            set_rate(optimizer, rate)
            if self.hook is not None:
                with torch.no_grad():
                    self.hook.add_to_gradient(rate)
            apply()
            if self.runtime.watch is not None:
                self.runtime.watch(step + 1, steps)

        losses = list(
            self._private(optimizer, finish) if self.mechanism else self._plain(optimizer, finish)
        )
        seen = [value for value in losses if value is not None]
        return (float(torch.stack(seen).mean()) if seen else 0.0), len(losses)

    @torch.no_grad()
    def measure(self) -> tuple[Tensor, int]:
        """The mean of the site's features ``(d,)``, and the steps that it took."""
        sampler, draws, mechanism = self._sampler(), self.draws, self.mechanism

        def features(indices: NDArray[np.int64]) -> Tensor:
            return self.source.plain(indices)[0][0]

        if mechanism is None:
            return exact_mean(features, sampler.everyone()), 1
        steps = private_steps_in(self.plan, mechanism.sampling_rate, self.round)
        watch = self.runtime.watch
        mean = private_mean(features, sampler, mechanism, steps, draws.patients, draws.noise, watch)
        return mean, steps

    def _sampler(self) -> PatientSampler:
        rate = self.mechanism.sampling_rate if self.mechanism else 1.0
        each = self.plan.privacy.images_per_patient
        return PatientSampler(self.indices, self.patients, rate, each)

    def _plain(
        self, optimizer: torch.optim.Optimizer, finish: Callable[..., None]
    ) -> Iterator[Tensor | None]:
        training = self.plan.training
        amount = {"epochs": training.local_epochs, "steps": training.local_steps}
        steps = steps_in_round(self.plan, len(self.indices), len(np.unique(self.patients)))
        batches = shuffled(self.indices, training.batch_size, self.draws.order, **amount)
        for step, batch in enumerate(batches):
            optimizer.zero_grad(set_to_none=True)
            loss = self._accumulate(batch)
            if training.gradient_clipping is not None:
                nn.utils.clip_grad_norm_(self.module.parameters(), training.gradient_clipping)
            finish(step, steps, optimizer.step)
            yield loss

    def _accumulate(self, batch: NDArray[np.int64]) -> Tensor:
        """The gradient of a batch's mean loss, with only so many of its images on their way."""
        inputs, targets = self._inputs(np.repeat(batch, self._patches))
        most, total = self._at_once(), torch.zeros((), device=targets.device)
        for start in range(0, len(targets), most):
            part = slice(start, start + most)
            some = tuple(one[part] for one in inputs)
            loss = self._loss_of(self.module, some, targets[part]).sum() / len(targets)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _private(
        self, optimizer: torch.optim.Optimizer, finish: Callable[..., None]
    ) -> Iterator[Tensor | None]:
        from fedward_client.training.private import (
            PrivateStep,  # brings Opacus, which takes seconds
        )

        if self.mechanism is None or self.plan.privacy.clipping_norm is None:
            return
        count = len(np.unique(self.patients))
        private = PrivateStep(
            self.module,
            optimizer,
            self.mechanism,
            self.plan.privacy.clipping_norm,
            count,
            self.mode,
            self.draws.noise,
        )
        rate, sampler = self.mechanism.sampling_rate, self._sampler()
        steps = steps_per_round(self.plan, rate)
        each = sampler.per_patient * self._patches
        patients = patients_at_once(count, rate, each, self._at_once())
        with warnings.catch_warnings():
            # Images need no gradient, which torch finds worth a warning at Opacus' hooks.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            try:
                for step in range(steps):
                    loss = self._private_step(private, sampler, patients)
                    finish(step, steps, private.apply)
                    yield loss
            finally:
                private.close()

    def _private_step(
        self, private: PrivateStep, sampler: PatientSampler, patients: int
    ) -> Tensor | None:
        draw, each = sampler.draw(self.draws.patients), sampler.per_patient
        if not len(draw.images):
            private.accumulate_nobody()
            return None
        total, parts = torch.zeros(()), chunks(draw, patients, each)
        for number, part in enumerate(parts, start=1):
            rows = np.repeat(part.ravel(), self._patches)
            losses = self._losses(private.module, rows)
            owners = torch.arange(patients, device=losses.device)
            owners = owners.repeat_interleave(each * self._patches)
            real = torch.from_numpy(rows != FILLER).to(losses.device)
            total = total + losses.detach()[real].sum().cpu()
            private.accumulate(losses, owners, last=number == len(parts), real=real)
        return total / (len(draw.images) * self._patches)

    @property
    def _patches(self) -> int:
        """Inputs that an image gives to a step."""
        patch = self.plan.preprocessing.patch
        return 1 if patch is None else patch.per_image

    def _at_once(self) -> int:
        """Images on the device at once: more where only a small end of the model runs."""
        if self.source.prefix is None:
            return self.runtime.physical_batch
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        fit = min(4096, _GRADIENT_FLOATS // max(1, trained))
        return self.runtime.physical_batch * max(1, fit // _USUAL_BATCH)

    def _losses(self, module: nn.Module, batch: NDArray[np.int64]) -> Tensor:
        return self._loss_of(module, *self._inputs(batch))

    def _inputs(self, batch: NDArray[np.int64]) -> tuple[Inputs, Tensor]:
        return self.source.augmented(batch, self.draws.change)

    def _loss_of(self, module: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        with autocast(self.runtime.torch_device, private=self.mechanism is not None):
            logits = module(*inputs)
        return self.loss(logits.float(), targets)
