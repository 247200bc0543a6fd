"""Gaussian noise on a grid, from a keystream, each number rounded as if it were computed exactly.

Noise that is drawn and added in floating point leaks through its last digits (Mironov, 2012, "On
significance of the least significant bits for differential privacy"; Holohan and Braghin, 2021,
arXiv:2107.10138): which numbers can come out depends on what the noise was added to. Here

1. the sum is rounded to a grid of equal steps ``g``, a power of two, in exact arithmetic;
2. the noise is a whole number of steps: a normal variable, rounded to the nearest step;
3. both are added as whole numbers, and only the result becomes a floating-point number.

A sum on the grid plus rounded noise is the rounded sum of both, so the outcome is a function of the
Gaussian mechanism's. Rounding moves two neighbouring sums apart by ``g √d`` at most, for which the
noise is a little wider (:data:`SLACK`).

The rounding of step 2 is exact. A normal variable comes from the transform of Box and Muller (1958)
in double precision, whose error is bounded. Where the bound leaves open which step is nearest
(about one number in a million), further bits are drawn and the number is computed again with many
digits (the idea is Ziv's, 1991, doi:10.1145/114697.116813). The noise is thus a function of the
keystream alone: the same with each processor, library and number of threads. docs/privacy.md works
the bounds out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fedward.dp.keystream import Keystream

SLACK: Final = 2.0**-10
"""How much wider than ``σ C`` the noise is: one half for the grid, one half for the single
precision in which gradients are clipped and summed."""

_UNIT: Final = 4096  # numbers drawn together: 2048 radii, then 2048 angles, of 64 bits each
_UNITS: Final = {"cpu": 16, "cuda": 512}  # of a chunk: in a core's cache; few launches on a GPU

# Bound of the error of a standard normal variable in double precision, where its radius lies
# between _NEAR and _FAR. Outside, the number is always computed again.
_ERROR: Final = 2.0**-43
_NEAR: Final = 2.0**-10
_FAR: Final = 5.4
_EXTRA: Final = 128  # bits that a second computation draws in addition to 63 or 64
_PRECISION: Final = 256  # bits with which it is made


@dataclass(frozen=True)
class Grid:
    """The steps of one sum, and how wide its noise is.

    Attributes
    ----------
    step : float
        Distance of two grid points, a power of two.
    deviation : float
        Standard deviation of the noise before its rounding.
    """

    step: float
    deviation: float

    @classmethod
    def over(cls, noise_multiplier: float, clipping_norm: float, count: int) -> Grid:
        """The grid of a sum of ``count`` numbers that one patient moves by ``clipping_norm``."""
        widest = clipping_norm * SLACK / 2 / math.sqrt(count)
        step = 2.0 ** math.floor(math.log2(widest))
        return cls(step, noise_multiplier * clipping_norm * (1 + SLACK))

    @property
    def ratio(self) -> float:
        """Deviation in steps."""
        return self.deviation / self.step


class GaussianNoise:
    """Noise for one step after another, under one key.

    Parameters
    ----------
    key : bytes
        32 bytes: from the operating system at a hospital, derived from the seed in a simulation.
    """

    def __init__(self, key: bytes) -> None:
        self._key, self._steps = key, 0

    @torch.no_grad()
    def add_(
        self,
        sums: Sequence[Tensor],
        noise_multiplier: float,
        clipping_norm: float,
        divisor: float = 1.0,
    ) -> None:
        """Add one step's noise in place, and divide.

        Parameters
        ----------
        sums : sequence of Tensor
            What the patients of a step add up to: float32 or float64, contiguous, on one device.
        noise_multiplier, clipping_norm : float
            σ and C: the noise has a standard deviation of σ C (1 + 2⁻¹⁰).
        divisor : float
            What the noisy sum is divided by: cheaper here, where it is in the cache.
        """
        flat = [part.view(-1) for part in sums]
        count = sum(len(part) for part in flat)
        grid = Grid.over(noise_multiplier, clipping_norm, count)
        chunks = _chunks(flat, _chunk_size(flat[0].device))
        for steps, parts in zip(self._draw(grid, count, flat[0].device), chunks, strict=True):
            sum_ = parts[0] if len(parts) == 1 else torch.cat(parts)
            # A power of two scales without rounding; what rounds is round_, then copy_.
            sum_.mul_(1 / grid.step).round_()
            sum_.copy_(steps[: len(sum_)].add_(sum_)).mul_(grid.step).div_(divisor)
            if len(parts) > 1:
                noisy = torch.split(sum_, [len(part) for part in parts])
                for part, own in zip(parts, noisy, strict=True):
                    part.copy_(own)

    @torch.no_grad()
    def steps(self, grid: Grid, count: int, device: torch.device | str = "cpu") -> Tensor:
        """``(count,)`` float64: one step's noise by itself, in whole steps of the grid."""
        chunks = [chunk.clone() for chunk in self._draw(grid, count, torch.device(device))]
        return torch.cat(chunks)[:count]

    def _draw(self, grid: Grid, count: int, device: torch.device) -> Iterator[Tensor]:
        """Chunks of noise, a chunk's memory being that of the one before."""
        number, self._steps = self._steps, self._steps + 1
        # Two streams for each step: the numbers, and further bits for those computed again.
        stream, further = Keystream(self._key, 2 * number, device), 2 * number + 1
        size, made = _chunk_size(device), None
        for start in range(0, count, size):
            units = -(-min(size, count - start) // _UNIT)
            if made is None or made.units != units:
                made = _BoxMuller(units, grid.ratio, device)
            stream.fill(made.words)
            for unit, part, column in made.run():
                pair = (start // _UNIT + unit) * (_UNIT // 2) + column
                bits = Keystream(self._key, further, block=pair).words(4).tobytes()
                radius, angle = (int(word) for word in made.words[unit, :, column])
                made.steps[unit, part, column] = _exactly(radius, angle, part, bits, grid.ratio)
            yield made.steps.view(-1)


class _BoxMuller:
    """Normal variables in whole steps from random words, in memory that is used again.

    Parameters
    ----------
    units : int
        Units of numbers made at once.
    ratio : float
        Standard deviation in steps.
    device : torch.device
        Where.

    Attributes
    ----------
    words : Tensor
        ``(units, 2, n)`` int64 of random bits: radii (without their sign bit) and angles.
    steps : Tensor
        ``(units, 2, n)`` float64: what they became.
    """

    def __init__(self, units: int, ratio: float, device: torch.device) -> None:
        shape = (units, 2, _UNIT // 2)
        self.units, self._ratio, self._margin = units, ratio, _ERROR * ratio
        self.words = torch.empty(shape, dtype=torch.int64, device=device)
        self.steps = torch.empty(shape, dtype=torch.float64, device=device)
        self._rest = torch.empty_like(self.steps)
        half = torch.full_like(self.steps[:1, :1, :1], 0.5 + self._margin)
        self._half, self._scale = half, torch.cat([half, half], 1)
        self._scale[:, 0], self._scale[:, 1] = 2.0**-63, math.pi * 2.0**-63
        # Views are made once: where chunks fit in a cache, making one takes as long as its use.
        self._radius_bits, self._radius, self._angle = self.words[:, 0], *self.steps.unbind(1)
        self._radius_of_both, self._cos, self._sin = self.steps[:, :1], *self._rest.unbind(1)

    def run(self) -> list[tuple[int, int, int]]:
        """Turn the words into steps; returns the places of those that are too close to call."""
        self._radius_bits.bitwise_and_(2**63 - 1)
        torch.mul(self.words, self._scale, out=self.steps)
        torch.cos(self._angle, out=self._cos)
        torch.sin(self._angle, out=self._sin)
        radius = self._radius.log_().mul_(-2 * self._ratio**2).sqrt_()
        near, far = _NEAR * self._ratio, _FAR * self._ratio
        outside = None
        if float(radius.amin()) < near or float(radius.amax()) > far:
            outside = ((radius < near) | (radius > far))[:, None]
        # Rounding to the nearest is the floor of one half more. With the margin on top, all numbers
        # that are too close to call have a small remainder, so one minimum tells if there are any.
        torch.addcmul(self._half, self._rest, self._radius_of_both, out=self._rest)
        torch.floor(self._rest, out=self.steps)
        self._rest.sub_(self.steps)
        if outside is None and float(self._rest.amin()) >= 2 * self._margin:
            return []
        unsure = self._rest < 2 * self._margin
        unsure = unsure if outside is None else unsure | outside
        return [(unit, part, column) for unit, part, column in unsure.nonzero().tolist()]


def _exactly(radius: int, angle: int, trigonometry: int, bits: bytes, ratio: float) -> int:
    """One number of :func:`_box_muller`, from more bits and with many digits."""
    # Hardly any round needs it, and it takes a tenth of a second to load.
    from mpmath import mp

    low = [int.from_bytes(half, "little") for half in (bits[:16], bits[16:])]
    with mp.workprec(_PRECISION):
        # The middle of what is still unknown: never 0 or 1.
        uniform = mp.mpf(2 * ((radius << _EXTRA) + low[0]) + 1) / 2 ** (64 + _EXTRA)
        turn = mp.mpf(2 * ((angle << _EXTRA) + low[1]) + 1) / 2 ** (64 + _EXTRA)
        part = (mp.cospi, mp.sinpi)[trigonometry](turn)
        return int(mp.floor(ratio * mp.sqrt(-2 * mp.log(uniform)) * part + 0.5))


def _chunks(flat: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Cut tensors into lists of parts, each list of ``size`` numbers but for the last."""
    parts: list[Tensor] = []
    room = size
    for tensor in flat:
        while len(tensor) >= room:
            yield [*parts, tensor[:room]]
            tensor, parts, room = tensor[room:], [], size
        if len(tensor):
            parts.append(tensor)
            room -= len(tensor)
    if parts:
        yield parts


def _chunk_size(device: torch.device) -> int:
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return _UNIT * _UNITS.get(device.type, _UNITS["cuda"]) * threads
