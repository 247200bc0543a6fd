"""Private steps: clipping is per patient, noise has the stated variance, chunks change nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedward.dp.accounting import Mechanism
from fedward.dp.gaussian import SLACK, GaussianNoise
from fedward.dp.keystream import Keystream, derive_key
from fedward.models import build_model, sampled, to_arrays
from fedward.models.registry import GradSampleMode
from fedward.plan import Plan
from fedward.protocol import RoundOrder
from fedward_client.data.sample import PreparedSite
from fedward_client.training.batches import PatientDraw, PatientSampler, chunks, patients_at_once
from fedward_client.training.private import PrivateStep
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

MODES: tuple[GradSampleMode, ...] = ("hooks", "functorch", "bookkeeping")


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2))


def step_for(
    module: nn.Module,
    norm: float,
    noise: float,
    mode: GradSampleMode,
    patients: int = 10,
    rate: float = 1.0,
) -> PrivateStep:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    mechanism = Mechanism(noise_multiplier=noise, sampling_rate=rate, steps=1)
    module = sampled(module) if mode == "bookkeeping" else module
    noise_ = GaussianNoise(derive_key(1))
    return PrivateStep(module, optimizer, mechanism, norm, patients, mode, noise_)


def losses_of(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(module(images), labels, reduction="none")


def by_hand(
    module: nn.Module, images: torch.Tensor, labels: torch.Tensor, owners: list[int], norm: float
) -> list[torch.Tensor]:
    """Sum over patients of the clipped gradient of the mean loss of the patient's images."""
    parameters = list(module.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for patient in sorted(set(owners)):
        rows = [i for i, owner in enumerate(owners) if owner == patient]
        loss = losses_of(module, images[rows], labels[rows]).mean()
        gradient = torch.autograd.grad(loss, parameters)
        size = torch.sqrt(sum((g**2).sum() for g in gradient))
        factor = min(1.0, norm / float(size))
        total = [t + factor * g for t, g in zip(total, gradient, strict=True)]
    return total


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_the_sum_of_clipped_patients(mode: GradSampleMode) -> None:
    images, labels = torch.randn(5, 1, 8, 8) * 3, torch.tensor([0, 1, 1, 0, 1])
    module, norm = model(), 0.7
    expected = by_hand(model(), images, labels, [0, 1, 2, 3, 4], norm)
    private = step_for(module, norm, 0.0, mode, patients=10)
    assert private.accumulate(losses_of(private.module, images, labels), torch.arange(5), last=True)
    for parameter, sum_ in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, sum_ / 10, rtol=3e-4, atol=1e-6)
    private.close()


@pytest.mark.parametrize("mode", ["hooks", "functorch", "bookkeeping"])
def test_forty_slices_weigh_as_one_patient(mode: GradSampleMode) -> None:
    images, labels = torch.randn(42, 1, 8, 8) * 3, torch.randint(0, 2, (42,))
    owners = [0] * 40 + [1, 2]
    module, norm = model(), 0.5
    expected = by_hand(model(), images, labels, owners, norm)
    private = step_for(module, norm, 0.0, mode)
    private.accumulate(losses_of(private.module, images, labels), torch.tensor(owners), last=True)
    for parameter, sum_ in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, sum_ / 10, rtol=3e-4, atol=1e-6)
    moved = torch.sqrt(sum((p.grad**2).sum() for p in module.parameters())) * 10
    assert float(moved) <= 3 * norm + 1e-4
    private.close()


@pytest.mark.parametrize("mode", MODES)
def test_virtual_steps_equal_one_large_step(mode: GradSampleMode) -> None:
    images, labels = torch.randn(6, 1, 8, 8), torch.randint(0, 2, (6,))
    whole, parts = model(), model()
    one, many = step_for(whole, 0.7, 0.0, mode), step_for(parts, 0.7, 0.0, mode)
    one.accumulate(losses_of(one.module, images, labels), torch.arange(6), last=True)
    done = []
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        losses = losses_of(many.module, images[part], labels[part])
        done.append(many.accumulate(losses, torch.arange(2), last=start == 4))
    assert done == [False, False, True]
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=3e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_noise_has_the_stated_variance_also_when_nobody_is_drawn(mode: GradSampleMode) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 400))
    private = step_for(module, norm=0.8, noise=1.5, mode=mode, patients=50, rate=0.2)
    samples = []
    for _ in range(8):
        assert private.accumulate_nobody()
        samples.append(torch.cat([p.grad.flatten() for p in module.parameters()]).clone())
        private.optimizer.zero_grad(set_to_none=True)
    noise = torch.cat(samples)
    expected = 1.5 * 0.8 * (1 + SLACK) / (0.2 * 50)
    # 208,000 draws: the relative error of the deviation is about 1 / sqrt(2 n) = 0.16 %.
    assert float(noise.std()) == pytest.approx(expected, rel=0.01)
    assert abs(float(noise.mean())) < 5 * expected / len(noise) ** 0.5


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_takes_the_same_noise(mode: GradSampleMode) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 400))
    private = step_for(module, norm=0.8, noise=1.5, mode=mode)
    private.accumulate_nobody()
    expected = [torch.zeros_like(parameter) for parameter in module.parameters()]
    GaussianNoise(derive_key(1)).add_(expected, 1.5, 0.8)
    for parameter, one in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, one / 10)


def test_two_steps_draw_different_noise_and_the_key_repeats_it() -> None:
    def two(seed: int) -> list[torch.Tensor]:
        module = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
        private = step_for(module, 1.0, 1.0, "hooks")
        private.optimizer.noise = GaussianNoise(derive_key(seed))
        gradients = []
        for _ in range(2):
            private.accumulate_nobody()
            gradients.append(next(module.parameters()).grad.clone())
            private.optimizer.zero_grad(set_to_none=True)
        return gradients

    first, again, other = two(3), two(3), two(4)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_sampler_draws_patients_independently_at_the_rate() -> None:
    patients = np.repeat(np.arange(200), np.arange(200) % 5 + 1)
    sampler = PatientSampler(np.arange(len(patients)), patients, 0.3, images_per_patient=1)
    stream, counts, sizes = Keystream(derive_key(0)), np.zeros(200), []
    for _ in range(2000):
        draw = sampler.draw(stream)
        drawn = patients[draw.images]
        assert len(set(drawn.tolist())) == draw.patients == len(draw.images)
        counts[drawn] += 1
        sizes.append(draw.patients)
    # Binomial: deviation of a patient's share is sqrt(.3 * .7 / 2000) = .0102.
    assert np.abs(counts / 2000 - 0.3).max() < 0.05
    assert np.var(sizes) == pytest.approx(200 * 0.3 * 0.7, rel=0.15)


def test_sampler_takes_at_most_so_many_images_of_a_patient() -> None:
    patients = np.array([7] * 40 + [3] * 2)
    sampler = PatientSampler(np.arange(42), patients, 1.0, images_per_patient=4)
    draw = sampler.draw(Keystream(derive_key(0)))
    assert sorted(np.bincount(draw.owners).tolist()) == [2, 4]
    assert len(set(draw.images.tolist())) == 6


def test_each_choice_of_a_patient_s_images_is_as_likely() -> None:
    sampler = PatientSampler(np.arange(5), np.zeros(5, np.int64), 1.0, images_per_patient=2)
    stream = Keystream(derive_key(0))
    drawn = Counter(tuple(sorted(sampler.draw(stream).images.tolist())) for _ in range(5000))
    assert set(drawn) == set(itertools.combinations(range(5), 2))
    # Chi-square with 9 degrees of freedom: above 33.7 for one key of 10,000; this one is fixed.
    assert sum((n - 500) ** 2 / 500 for n in drawn.values()) < 33.7


def test_chunks_have_one_shape_and_never_cut_a_patient() -> None:
    draw = PatientDraw(np.arange(10), np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3]))
    parts = chunks(draw, patients=3, images_per_patient=4)
    assert [part.tolist() for part in parts] == [
        [[0, 1, 2, -1], [3, 4, -1, -1], [5, -1, -1, -1]],
        [[6, 7, 8, 9], [-1, -1, -1, -1], [-1, -1, -1, -1]],
    ]


@pytest.mark.parametrize(("count", "rate"), [(1, 0.5), (100, 0.1), (100, 1.0), (3000, 0.01)])
def test_chunks_have_room_for_the_usual_draw_and_fit_in_memory(count: int, rate: float) -> None:
    for each in (1, 4, 200):
        room = patients_at_once(count, rate, each, most=64)
        assert 1 <= room <= max(1, 64 // each)
        assert room <= count
    # Where memory is no limit, four deviations above the mean are.
    deviation = (count * rate * (1 - rate)) ** 0.5
    assert patients_at_once(count, rate, 1, most=10_000) <= count * rate + 4 * deviation + 1


@pytest.mark.parametrize("mode", MODES)
def test_what_fills_a_chunk_adds_nothing(mode: GradSampleMode) -> None:
    images, labels = torch.randn(3, 1, 8, 8) * 3, torch.tensor([0, 1, 1])
    room, owners = torch.zeros(8, 1, 8, 8), torch.arange(4).repeat_interleave(2)
    real = torch.tensor([True, False, True, True, False, False, False, False])
    room[real], targets = images, torch.zeros(8, dtype=torch.long)
    targets[real] = labels
    module, norm = model(), 0.7
    expected = by_hand(model(), images, labels, [0, 1, 1], norm)
    private = step_for(module, norm, 0.0, mode)
    losses = losses_of(private.module, room, targets)
    private.accumulate(losses, owners, last=True, real=real)
    for parameter, sum_ in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, sum_ / 10, rtol=3e-4, atol=1e-6)


def test_an_outlier_moves_the_model_no_further_than_the_bound(
    make_plan: Callable[..., Plan],
    make_site: Callable[..., PreparedSite],
    make_order: Callable[..., RoundOrder],
) -> None:
    """Neighbouring cohorts: one patient's images replaced by huge ones."""
    plan = make_plan(
        training={
            "learning_rate": 1.0,
            "rounds": 1,
            "local_epochs": None,
            "local_steps": 1,
            "optimizer": "sgd",
            "schedule": "constant",
        },
        privacy={
            "mechanism": "dp-sgd",
            "epsilon": 50.0,
            "delta": 0.1,
            "clipping_norm": 0.01,
            "sampling_rate": 1.0,
        },
    )
    site, start = make_site(), to_arrays(build_model(plan, 0))
    images = site.images.copy()
    victim = site.split["train"][0]
    images[victim] = 1e4
    runtime = Runtime(randomness="seeded")
    near, _ = Trainer(plan, site, runtime).train(start, make_order(plan, 1))
    far, _ = Trainer(plan, replace(site, images=images), runtime).train(start, make_order(plan, 1))
    distance = np.sqrt(sum(((near[k] - far[k]) ** 2).sum() for k in near))
    count = site.patients_in("train")
    assert 0 < distance <= 2 * 0.01 / count + 1e-6
