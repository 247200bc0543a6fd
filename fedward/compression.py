r"""Fewer bytes: a site sends its update compressed, and keeps what that leaves out for later.

With the received model x, the site's model y, a compressor Q and the error e of earlier rounds, 0
at first (error feedback: Seide et al., 2014, doi:10.21437/Interspeech.2014-274; Karimireddy et al.,
2019, arXiv:1901.09847, algorithm 2):

    p = y − x + e
    sent: Q(p)
    e ← p − Q(p)
    the aggregator goes on with x + Q(p)

The model may travel down compressed too. Sites train from Q(x), and the aggregator, which has x,
moves it by what the strategy makes of the updates: it forgets nothing that Q rounds away.

All arrays of an update, or of a model, travel as one array of bytes. Its length follows from the
plan and the model's shapes, so that no sender can make a receiver allocate more than these. With
differential privacy y has its noise before anything here sees it: compression is post-processing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedward.errors import ModelError, ProtocolError
from fedward.rule_codes import RuleCode

COMPRESSED: Final = "compressed"
"""Name of the one array that an update, or a model, travels as."""
RESIDUAL: Final = "residual"
"""Kind of what a site keeps of the error feedback: one array for each array that trains."""

Arrays = dict[str, NDArray[Any]]
Vector = NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]


class Settings(Protocol):
    """The plan's ``[compression]``."""

    @property
    def method(self) -> str:
        """Which one."""

    @property
    def error_feedback(self) -> bool:
        """Whether what a round leaves out is added to the next."""

    @property
    def rounding(self) -> str:
        """How numbers are rounded: ``nearest`` or ``stochastic``."""

    @property
    def share(self) -> float | None:
        """Share of the numbers that ``top-k`` sends."""

    @property
    def download(self) -> str | None:
        """Which one the model travels down with."""


class Compressor(ABC):
    """One method: values to bytes and back; it keeps nothing.

    Attributes
    ----------
    summary : str
        For people who read a plan.
    rounds : bool
        Whether it rounds to whole numbers, and ``compression.rounding`` means something.
    sparse : bool
        Whether it leaves numbers out, and ``compression.share`` means something.
    """

    summary = ""
    rounds = False
    sparse = False

    @abstractmethod
    def size(self, sizes: Sequence[int], how: Settings) -> int:
        """Bytes for arrays of so many numbers."""

    @abstractmethod
    def pack(
        self, values: Vector, sizes: Sequence[int], how: Settings, draw: np.random.Generator | None
    ) -> bytes:
        """The bytes of all arrays, one behind the other in ``values``; all of them finite.

        Parameters
        ----------
        draw : Generator or None
            For stochastic rounding.
        """

    @abstractmethod
    def unpack(self, content: bytes, sizes: Sequence[int], how: Settings) -> Vector:
        """What :meth:`pack` packed, from bytes of the right length that anybody may have made.

        Raises
        ------
        ProtocolError
            They are none that :meth:`pack` makes.
        """


class Bfloat16(Compressor):
    """Each number as bfloat16, rounded to the nearest: half of the bytes, 8 bits of precision."""

    summary = "16 bits for each number"

    def size(self, sizes: Sequence[int], how: Settings) -> int:
        return 2 * sum(sizes)

    def pack(
        self, values: Vector, sizes: Sequence[int], how: Settings, draw: np.random.Generator | None
    ) -> bytes:
        return to_bfloat16(values).tobytes()

    def unpack(self, content: bytes, sizes: Sequence[int], how: Settings) -> Vector:
        return from_bfloat16(np.frombuffer(content, "<u2"))


class _Scaled(NamedTuple):
    """Whole numbers and the scale of each."""

    scales: Vector
    numbers: NDArray[np.int8]


class Integers(Compressor):
    """Whole numbers of a few bits, with one scale for each array.

    With L = 2^(bits−1) − 1 the scale of an array is s = max|p| / L, and a number is p / s rounded:
    to the nearest, or up and down by chance so that its mean is right (Alistarh et al., 2017,
    arXiv:1610.02132).

    Parameters
    ----------
    bits : int
        For each number, at most 8.
    """

    rounds = True

    def __init__(self, bits: int) -> None:
        self.bits, self.most = bits, 2 ** (bits - 1) - 1
        self.summary = f"whole numbers of {bits} bits with one scale for each array"

    def size(self, sizes: Sequence[int], how: Settings) -> int:
        return 4 * len(sizes) + math.ceil(sum(sizes) * self.bits / 8)

    def pack(
        self, values: Vector, sizes: Sequence[int], how: Settings, draw: np.random.Generator | None
    ) -> bytes:
        ends = np.cumsum(sizes)[:-1]
        largest = [np.abs(one).max(initial=0.0) for one in np.split(values, ends)]
        scales = (np.array(largest, np.float32) / np.float32(self.most)).astype("<f4")
        every = np.repeat(scales, sizes)
        exact = np.divide(values, every, out=np.zeros_like(values), where=every > 0)
        if draw is not None:
            rounded = np.floor(exact + draw.random(exact.shape, np.float32))
        else:
            rounded = np.rint(exact)
        numbers = np.clip(rounded, -self.most, self.most).astype(np.int8)
        if self.bits < 8:
            single = np.unpackbits(numbers.view(np.uint8)[:, None], axis=1, bitorder="little")
            numbers = np.packbits(single[:, : self.bits], bitorder="little").view(np.int8)
        return b"".join((scales.tobytes(), numbers.tobytes()))

    def unpack(self, content: bytes, sizes: Sequence[int], how: Settings) -> Vector:
        scales, numbers = self._read(content, sizes)
        # Not finite, below 0, or beyond what one array's largest number needs.
        if not (np.isfinite(scales) & (scales >= 0)).all() or (numbers < -self.most).any():
            raise _broken()
        with np.errstate(over="ignore"):  # a scale that is too large is refused as not finite
            return np.asarray(numbers * np.repeat(scales, sizes), np.float32)

    def _read(self, content: bytes, sizes: Sequence[int]) -> _Scaled:
        head = 4 * len(sizes)
        scales = np.frombuffer(content[:head], "<f4")
        packed = np.frombuffer(content[head:], np.uint8)
        if self.bits == 8:
            return _Scaled(scales, packed.view(np.int8))
        single, used = np.unpackbits(packed, bitorder="little"), sum(sizes) * self.bits
        if single[used:].any():  # the last byte is filled with zeros
            raise _broken()
        whole = np.zeros((sum(sizes), 8), np.uint8)
        whole[:, 8 - self.bits :] = single[:used].reshape(-1, self.bits)
        numbers = np.packbits(whole, axis=1, bitorder="little").ravel().view(np.int8)
        return _Scaled(scales, numbers >> (8 - self.bits))  # which brings the sign down


class TopK(Compressor):
    """The numbers of the largest magnitude over all arrays, each with its place.

    Places are whole numbers of 32 bits that rise, values bfloat16: 6 bytes for each number that is
    sent (Aji and Heafield, 2017, arXiv:1704.05021). Of equal magnitudes the first ones are sent.
    """

    summary = "only the numbers of the largest magnitude"
    sparse = True

    def size(self, sizes: Sequence[int], how: Settings) -> int:
        return 6 * self._count(sizes, how)

    def pack(
        self, values: Vector, sizes: Sequence[int], how: Settings, draw: np.random.Generator | None
    ) -> bytes:
        count, magnitude = self._count(sizes, how), np.abs(values)
        least = np.partition(magnitude, len(values) - count)[len(values) - count]
        above = np.flatnonzero(magnitude > least)
        level = np.flatnonzero(magnitude == least)[: count - len(above)]
        places = np.sort(np.concatenate([above, level])).astype("<u4")
        return places.tobytes() + to_bfloat16(values[places]).tobytes()

    def unpack(self, content: bytes, sizes: Sequence[int], how: Settings) -> Vector:
        count = self._count(sizes, how)
        places = np.frombuffer(content[: 4 * count], "<u4")
        if (places[1:] <= places[:-1]).any() or places[-1] >= sum(sizes):
            raise _broken()
        values = np.zeros(sum(sizes), np.float32)
        values[places] = from_bfloat16(np.frombuffer(content[4 * count :], "<u2"))
        return values

    def _count(self, sizes: Sequence[int], how: Settings) -> int:
        return math.ceil(sum(sizes) * (how.share or 1.0))


METHODS: Final[dict[str, Compressor]] = {
    "bfloat16": Bfloat16(),
    **{f"int{bits}": Integers(bits) for bits in (8, 6, 5, 4, 3)},
    "top-k": TopK(),
}


def to_bfloat16(values: Vector) -> NDArray[np.uint16]:
    """The upper halves of single-precision numbers, rounded to nearest even; all stay finite."""
    bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
    return np.asarray(np.minimum(rounded, 0x7F7F) | (bits >> 16 & 0x8000), "<u2")


def from_bfloat16(halves: NDArray[np.uint16]) -> Vector:
    """Single-precision numbers of these upper halves."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def compressed_size(how: Settings, shapes: Shapes) -> int:
    """Bytes of an update of these arrays."""
    return METHODS[how.method].size(_sizes(shapes), how)


def compress(
    how: Settings,
    model: Mapping[str, NDArray[Any]],
    update: Mapping[str, NDArray[Any]],
    residual: Mapping[str, NDArray[Any]],
    draw: np.random.Generator,
) -> tuple[Arrays, Arrays]:
    """Compress a site's update.

    Parameters
    ----------
    how : Settings
        The plan's.
    model : mapping
        The arrays as they were received.
    update : mapping
        The arrays that trained, in the model's order.
    residual : mapping
        What earlier rounds left out, for some or all of them.
    draw : Generator
        For stochastic rounding.

    Returns
    -------
    tuple
        What is sent, ``{"compressed": (bytes,) uint8}``, and what this round leaves out, by the
        names of the update; empty without error feedback.

    Raises
    ------
    ModelError
        A number is not finite.
    """
    method, shapes = METHODS[how.method], {name: value.shape for name, value in update.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        parts = [(value - model[n] + residual.get(n, 0)).ravel() for n, value in update.items()]
    values = np.concatenate(parts).astype(np.float32)
    if not np.isfinite(values).all():
        raise ModelError(
            RuleCode.ARRAYS_FINITE, fix="Lower the learning rate, or leave the site out"
        )
    sizes = _sizes(shapes)
    content = method.pack(
        values, sizes, how, draw if method.rounds and how.rounding == "stochastic" else None
    )
    left = values - method.unpack(content, sizes, how) if how.error_feedback else values[:0]
    sent = {COMPRESSED: np.frombuffer(content, np.uint8)}
    return sent, _divided(left, shapes) if how.error_feedback else {}


def decompress(how: Settings, sent: Mapping[str, NDArray[Any]], shapes: Shapes) -> Arrays:
    """The differences to the model that a site sent.

    Parameters
    ----------
    how : Settings
        The plan's.
    sent : mapping
        What arrived, whoever made it.
    shapes : mapping
        Shape of each array of the update, in the model's order.

    Returns
    -------
    dict
        Name to float32 array; a number may be infinite where a scale was made so.

    Raises
    ------
    ProtocolError
        It is no update of these arrays, compressed as the plan says.
    """
    content, size = sent.get(COMPRESSED), compressed_size(how, shapes)
    if len(sent) != 1 or content is None or content.dtype != np.uint8 or content.shape != (size,):
        raise _broken()
    return _divided(METHODS[how.method].unpack(content.tobytes(), _sizes(shapes), how), shapes)


def compress_model(how: Settings, model: Mapping[str, NDArray[Any]]) -> Arrays:
    """What travels down of the arrays that train: ``{"compressed": (bytes,) uint8}``."""
    values = np.concatenate([one.ravel() for one in model.values()]).astype(np.float32)
    sizes = [value.size for value in model.values()]
    content = METHODS[how.download or ""].pack(values, sizes, how, None)
    return {COMPRESSED: np.frombuffer(content, np.uint8)}


def model_size(how: Settings, shapes: Shapes) -> int:
    """Bytes of :func:`compress_model`."""
    return METHODS[how.download or ""].size(_sizes(shapes), how)


def decompress_model(how: Settings, content: NDArray[Any], shapes: Shapes) -> Arrays:
    """The arrays that a site trains from.

    Raises
    ------
    ProtocolError
        They are none of these shapes, compressed as the plan says.
    """
    size = model_size(how, shapes)
    try:
        if content.dtype != np.uint8 or content.shape != (size,):
            raise _broken()
        values = METHODS[how.download or ""].unpack(content.tobytes(), _sizes(shapes), how)
    except ProtocolError:
        raise ProtocolError(
            RuleCode.MODEL_COMPRESSED, fix="Run the same Fedward release on both ends"
        ) from None
    return _divided(values, shapes)


def moved(model: Mapping[str, NDArray[Any]], differences: Arrays) -> Arrays:
    """The model's arrays moved by differences, in single precision."""
    with np.errstate(over="ignore", invalid="ignore"):  # of differences that anybody may have made
        return {n: np.add(model[n], value, dtype=np.float32) for n, value in differences.items()}


def _sizes(shapes: Shapes) -> list[int]:
    return [math.prod(shape) for shape in shapes.values()]


def _divided(values: Vector, shapes: Shapes) -> Arrays:
    parts = np.split(values, np.cumsum(_sizes(shapes))[:-1])
    return {n: one.reshape(shape) for (n, shape), one in zip(shapes.items(), parts, strict=True)}


def _broken() -> ProtocolError:
    return ProtocolError(
        RuleCode.UPDATE_COMPRESSED, fix="Run the same Fedward release on both ends"
    )
