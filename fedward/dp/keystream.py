"""ChaCha20 keystreams (RFC 8439) as a source of random numbers, on CPU and GPU.

Generators for simulation do not withstand an attacker: torch's on the CPU keeps 32 bits of a seed,
so that all its streams can be tried. A keystream under a secret 256-bit key cannot be told from
random bits by anybody who cannot break the cipher.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32
_BLOCK_WORDS = 8  # 64-bit words in a block of 64 bytes
_CONSTANT = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_ZEROS = memoryview(bytes(1 << 20))


def derive_key(*parts: object) -> bytes:
    """A 256-bit key that depends on every part and on nothing else.

    It is as secret as the parts are: with a simulation's seed it is repeatable, not secret.
    """
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.sha256(text.encode()).digest()


class Keystream:
    """The words of one ChaCha20 keystream, one after another.

    Parameters
    ----------
    key : bytes
        32 bytes. One key serves one purpose in one round.
    nonce : int
        Number of the stream under this key, below 2⁹⁶.
    device : torch.device or str
        Where :meth:`fill` writes. A GPU computes the stream itself: nothing is copied to it.
    block : int
        Block of 64 bytes to start with; a stream has 2³² of them.

    Raises
    ------
    ValueError
        The key has another length.
    """

    def __init__(
        self, key: bytes, nonce: int = 0, device: torch.device | str = "cpu", block: int = 0
    ) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        self._key, self._nonce, self._block = key, nonce.to_bytes(12, "little"), block
        self._cipher: CipherContext | None = None
        if torch.device(device).type == "cpu":
            start = block.to_bytes(4, "little") + self._nonce
            self._cipher = Cipher(ChaCha20(key, start), mode=None).encryptor()

    @classmethod
    def from_system(cls) -> Keystream:
        """A stream on the CPU under a fresh key from the operating system."""
        return cls(os.urandom(KEY_BYTES))

    def fill(self, words: Tensor) -> None:
        """Write the next words of the stream.

        Parameters
        ----------
        words : Tensor
            int64, contiguous, on the stream's device; a multiple of 8 words (whole blocks).
        """
        flat = words.view(-1)
        if self._cipher is None:
            blocks = len(flat) // _BLOCK_WORDS
            flat.copy_(chacha20(self._key, self._nonce, self._block, blocks, words.device))
            self._block += blocks
            return
        out = flat.numpy().data.cast("B")
        for start in range(0, len(out), len(_ZEROS)):
            part = out[start : start + len(_ZEROS)]
            self._cipher.update_into(_ZEROS[: len(part)], part)

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` words; CPU only. What is left of the last block is dropped."""
        words = torch.empty(-(-count // _BLOCK_WORDS) * _BLOCK_WORDS, dtype=torch.int64)
        self.fill(words)
        return words[:count].numpy().view(np.uint64)

    def happens(self, probability: float, count: int) -> NDArray[np.bool_]:
        """``(count,)`` independent draws, each true with the probability rounded down to 2⁻⁶⁴."""
        if probability >= 1:
            return np.ones(count, np.bool_)
        return self.words(count) < np.uint64(int(probability * 2.0**64))

    def fill_generator(self, generator: torch.Generator) -> None:
        """Give a torch generator a state from this stream.

        A CPU generator gets all of its 19,937 bits, where ``manual_seed`` keeps 32 of its seed; a
        GPU's gets its whole seed of 64 bits.
        """
        if generator.device.type != "cpu":
            generator.manual_seed(int(self.words(1)[0]))
            return
        generator.manual_seed(0)
        # torch's layout: seed, (left, seeded), next, then one 32-bit word in each 64 bits.
        state = generator.get_state()
        twister = state[24 : 24 + 8 * 624].view(torch.int64)
        twister.copy_(torch.from_numpy(self.words(624).astype(np.uint32).astype(np.int64)))
        generator.set_state(state)


def chacha20(key: bytes, nonce: bytes, counter: int, blocks: int, device: torch.device) -> Tensor:
    """Blocks of a ChaCha20 keystream (RFC 8439, section 2.3), all at once, in torch.

    Parameters
    ----------
    key, nonce : bytes
        32 and 12 bytes.
    counter : int
        Number of the first block; the last one's is below 2³².
    blocks : int
        How many.
    device : torch.device
        Where they are computed.

    Returns
    -------
    Tensor
        ``(8 * blocks,)`` int64: the stream's bytes in order, on a little-endian machine.
    """
    start = np.empty(16, np.uint32)
    start[:4], start[12] = _CONSTANT, 0
    start[4:12], start[13:] = np.frombuffer(key, "<u4"), np.frombuffer(nonce, "<u4")
    state = torch.from_numpy(start.view(np.int32)).to(device)[:, None].repeat(1, blocks)
    numbers = torch.arange(counter, counter + blocks, dtype=torch.int64, device=device)
    state[12] = _int32(numbers)
    work = state.clone().view(4, 4, blocks)
    a, b, c, d = work.unbind(0)
    for _ in range(10):
        _quarter_rounds(a, b, c, d)
        # The second half's rounds run along diagonals: turn the rows so that these are columns.
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    state += torch.cat([a, b, c, d])
    return state.T.flatten().view(torch.int64)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """Four quarter rounds side by side; 32-bit integers wrap around in torch."""
    for left, right, target, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        left += right
        target ^= left
        low = (target >> (32 - bits)) & ((1 << bits) - 1)  # torch shifts the sign in
        target <<= bits
        target |= low


def _int32(numbers: Tensor) -> Tensor:
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32)
