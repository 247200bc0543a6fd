"""Whoever has an update tries to take its noise off, or to read the patients from its last digits.

The attackers know the plan, the weights before and after a step, and the code. With noise from
torch's generator on the CPU, which keeps 32 bits of a seed, the first tried all seeds in minutes;
the last was certain of one world in a quarter of all numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedward.dp.gaussian import SLACK, GaussianNoise, Grid
from fedward.dp.keystream import KEY_BYTES, Keystream, derive_key
from fedward.models import build_model, to_arrays
from fedward_client.training.fit import Draws
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

Make = Callable[..., Any]
CLIPPING, CANDIDATES = 0.5, 10_000
PRIVATE = {
    "mechanism": "dp-sgd",
    "epsilon": 2.0,
    "delta": 1e-3,
    "clipping_norm": CLIPPING,
    "sampling_rate": 0.5,
}
ONE_STEP = {
    "learning_rate": 1.0,
    "rounds": 1,
    "local_epochs": None,
    "local_steps": 1,
    "optimizer": "sgd",
    "schedule": "constant",
}
KEYS = st.binary(min_size=32, max_size=32)


def by_torch(seed: int, sums: Sequence[torch.Tensor], deviation: float) -> list[torch.Tensor]:
    """Noise from torch's generator, parameter by parameter: what was released before."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.normal(0.0, deviation, one.shape, generator=generator) for one in sums]


def by_key(key: bytes, sums: Sequence[torch.Tensor], multiplier: float) -> list[torch.Tensor]:
    noise = [torch.zeros_like(one) for one in sums]
    GaussianNoise(key).add_(noise, multiplier, CLIPPING)
    return noise


def left(released: Sequence[torch.Tensor], noise: Sequence[torch.Tensor]) -> float:
    """Norm of what stays in the first layer once the noise is off."""
    return float((released[0] - noise[0]).norm())


def watched(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The keys that the system gives from now on."""
    keys, system = [], os.urandom

    def urandom(count: int) -> bytes:
        given = system(count)
        if count == KEY_BYTES:
            keys.append(given)
        return given

    monkeypatch.setattr(os, "urandom", urandom)
    return keys


def test_no_seed_of_32_bits_takes_the_noise_off(
    make_plan: Make, make_site: Make, make_order: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = watched(monkeypatch)
    plan = make_plan(privacy=PRIVATE, training=ONE_STEP)
    start, order = to_arrays(build_model(plan, 0)), make_order(plan)
    arrays, outcome = Trainer(plan, make_site(), Runtime()).train(start, order)
    monkeypatch.undo()

    # The attacker: one step of plain SGD gives the noisy sum, up to the rounding of weights.
    expected, multiplier = outcome.sampling_rate * outcome.patients, outcome.noise_multiplier
    names = [name for name, _ in build_model(plan, 0).named_parameters()]
    released = [torch.from_numpy((start[n] - arrays[n]) * expected) for n in names]
    norm = float(released[0].norm())
    assert multiplier is not None

    # Candidates are numbers of 32 bits, with the low and the high ones of all keys among them.
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**32, CANDIDATES).tolist()
    for key in keys:
        seeds += [int.from_bytes(key[:4], "little"), int.from_bytes(key[-4:], "little")]
    rest = [left(released, by_torch(s, released[:1], multiplier * CLIPPING)) for s in seeds]
    assert min(rest) > norm / 2
    # Half of a key is no help either.
    for key in keys:
        for part in (key[:16] + bytes(16), bytes(16) + key[16:]):
            assert left(released, by_key(part, released, multiplier)) > norm / 2

    # Who has the key has the noise, so the attack itself works: it is the key that protects.
    best = min(left(released, by_key(key, released, multiplier)) for key in keys)
    assert best < norm / 10


def test_the_same_attack_takes_noise_from_a_torch_generator_off() -> None:
    sums, seed = [0.02 * torch.randn(36, generator=torch.Generator().manual_seed(9))], 0x1234567890
    released = [a + b for a, b in zip(sums, by_torch(seed, sums, 0.5), strict=True)]
    seeds = [*range(CANDIDATES), seed & 0xFFFFFFFF]
    rest = [left(released, by_torch(one, sums, 0.5)) for one in seeds]
    assert int(np.argmin(rest)) == CANDIDATES
    assert min(rest) < float(released[0].norm()) / 10


@given(key=KEYS, bit=st.integers(0, 255))
def test_keys_that_differ_in_any_bit_give_unrelated_noise(key: bytes, bit: int) -> None:
    other = bytearray(key)
    other[bit // 8] ^= 1 << bit % 8
    grid, count = Grid.over(1.0, 1.0, 4096), 4096
    one, two = (GaussianNoise(bytes(k)).steps(grid, count) / grid.ratio for k in (key, other))
    # 5.5 deviations of the mean of 4096 products: once in 26 million keys.
    assert abs(float((one * two).mean())) < 5.5 / count**0.5
    assert int((one == two).sum()) < 5
    bits = [np.unpackbits(Keystream(bytes(k)).words(64).view(np.uint8)) for k in (key, other)]
    assert abs(int((bits[0] != bits[1]).sum()) - 2048) < 5.5 * 32


def test_a_hospital_s_keys_come_from_the_system_and_are_said_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = watched(monkeypatch)
    rounds = [Draws.make(Runtime(), 0, "site", 1) for _ in range(2)]
    assert len(keys) == len(set(keys)) >= 6  # noise, patients and the rest, each round
    told = "".join(map(repr, rounds)) + repr([vars(one.noise).keys() for one in rounds])
    assert not any(key.hex() in told or repr(key) in told for key in keys)
    grid = Grid.over(1.0, 1.0, 1000)
    noise = [one.noise.steps(grid, 1000) for one in rounds]
    assert not torch.equal(*noise)
    assert not np.array_equal(*(one.patients.words(64) for one in rounds))
    # What the proof does not rest on has no seed that can be tried either.
    states = [one.change.get_state() for one in rounds]
    assert not torch.equal(*states)
    assert {one.change.initial_seed() for one in rounds} == {0}


def test_a_hospital_s_dropout_does_not_follow_the_order() -> None:
    def drawn(runtime: Runtime) -> torch.Tensor:
        with Draws.make(runtime, 0, "site", 1).in_layers(torch.device("cpu")):
            return torch.rand(100)

    before = torch.get_rng_state()
    assert not torch.equal(drawn(Runtime()), drawn(Runtime()))
    assert torch.equal(*(drawn(Runtime(randomness="seeded")) for _ in range(2)))
    assert torch.equal(before, torch.get_rng_state())


def test_purposes_and_rounds_of_a_simulation_share_no_numbers() -> None:
    runtime = Runtime(randomness="seeded")
    seen = set()
    for parts in ((0, "site", 1), (0, "site", 2), (1, "site", 1), (0, "other", 1)):
        draws = Draws.make(runtime, *parts)
        seen |= {draws.patients.words(8).tobytes(), draws.noise._key}
    assert len(seen) == 8
    again = Draws.make(runtime, 0, "site", 1)
    assert again.noise._key in seen and again.patients.words(8).tobytes() in seen
    assert derive_key(0, "site", 1, "noise") == again.noise._key


def finer_than(outputs: torch.Tensor, step: float) -> float:
    """Share of outputs that are no multiples of a step."""
    return float(((outputs.double() / step) % 1 != 0).double().mean())


def test_the_last_digits_tell_nothing() -> None:
    """Neighbours: a sum of 0 and of 1. Small outputs have digits that a sum near 1 cannot have."""
    count, multiplier = 100_000, 1.0
    sums = [torch.full((count,), value) for value in (0.0, 1.0, 0.3)]

    before = [one + by_torch(1, [one], multiplier)[0] for one in sums]
    told = [finer_than(outputs, 2.0**-24) for outputs in before]
    assert told[0] > 0.2 and told[1] == 0  # such an output says for certain: it was 0

    grid = Grid.over(multiplier, 1.0, count)
    for one in sums:
        GaussianNoise(derive_key(1)).add_([one], multiplier, 1.0)
        assert finer_than(one, grid.step) == 0
        # Every point of the grid, odd and even, so no sum reaches fewer of them than another.
        odd = (one.double() / grid.step) % 2
        small = odd[one.abs() < grid.step * 2**24]  # whole numbers that single precision holds
        assert len(small) > count / 2
        assert abs(float(small.mean()) - 0.5) < 5 / (2 * len(small) ** 0.5)
    assert multiplier * (1 + SLACK) == grid.deviation
