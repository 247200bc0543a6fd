"""The keystream is ChaCha20 on each device, and what is drawn from it is what it claims to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedward.dp.keystream import Keystream, chacha20, derive_key

CPU = torch.device("cpu")
# RFC 8439, sections 2.3.2 and A.1 (vectors 1 to 5): key, nonce, block and the block's first half.
RFC = [
    (
        bytes(range(32)),
        "000000090000004a00000000",
        1,
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e",
    ),
    (bytes(32), "0" * 24, 0, "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"),
    (bytes(32), "0" * 24, 1, "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"),
    (
        bytes(31) + b"\1",
        "0" * 24,
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a",
    ),
    (
        b"\0\xff" + bytes(30),
        "0" * 24,
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca",
    ),
    (
        bytes(32),
        "0" * 23 + "2",
        0,
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7",
    ),
]


@pytest.mark.parametrize(("key", "nonce", "block", "expected"), RFC)
def test_it_is_the_stream_of_the_standard(
    key: bytes, nonce: str, block: int, expected: str
) -> None:
    number = int.from_bytes(bytes.fromhex(nonce), "little")
    assert Keystream(key, number, block=block).words(8).tobytes()[:32].hex() == expected
    in_torch = chacha20(key, bytes.fromhex(nonce), block, 1, CPU)
    assert in_torch.numpy().tobytes()[:32].hex() == expected


@given(
    key=st.binary(min_size=32, max_size=32),
    nonce=st.integers(0, 2**96 - 1),
    block=st.integers(0, 2**32 - 9),
)
def test_torch_computes_the_same_stream(key: bytes, nonce: int, block: int) -> None:
    library = Keystream(key, nonce, block=block).words(64)
    in_torch = chacha20(key, nonce.to_bytes(12, "little"), block, 8, CPU)
    assert np.array_equal(library, in_torch.numpy().view(np.uint64))


def test_a_device_other_than_the_cpu_goes_on_where_it_stopped() -> None:
    ours, gpu = Keystream(derive_key(0)), Keystream(derive_key(0))
    gpu._cipher = None  # the way of a GPU, on the CPU: without the library
    for count in (8, 4096, 16):
        one, two = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
        ours.fill(one)
        gpu.fill(two)
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_the_same_stream() -> None:
    words = torch.empty(80_000, dtype=torch.int64, device="cuda")
    Keystream(derive_key(0), 5, "cuda").fill(words)
    assert np.array_equal(
        words.cpu().numpy().view(np.uint64), Keystream(derive_key(0), 5).words(80_000)
    )


def test_long_draws_are_one_stream() -> None:
    whole = Keystream(derive_key(0)).words(600_000)  # more than is enciphered at once
    parts = Keystream(derive_key(0))
    assert np.array_equal(whole, np.concatenate([parts.words(n) for n in (8, 299_992, 300_000)]))


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Keystream(b"short")


def test_each_part_of_a_derived_key_counts() -> None:
    parts = [
        ("seed", 1, "noise"),
        ("seed", 2, "noise"),
        ("seed", 1, "patients"),
        ("seed1", "noise"),
    ]
    keys = [derive_key(*each) for each in parts]
    assert len(set(keys)) == 4
    assert {len(key) for key in keys} == {32}
    assert derive_key("seed", 1, "noise") == keys[0]


def test_no_chance_is_above_what_was_asked_for() -> None:
    stream = Keystream(derive_key(0))
    assert stream.happens(1.0, 1000).all()
    assert not stream.happens(0.0, 1000).any()
    share = stream.happens(0.3, 200_000).mean()
    assert share == pytest.approx(0.3, abs=5 * (0.21 / 200_000) ** 0.5)
    # Words that sit at the bound: only those below it count.
    bound = int(0.3 * 2.0**64)
    stream.words = lambda count: np.array([bound - 1, bound, bound + 1], np.uint64)  # type: ignore[method-assign]
    assert stream.happens(0.3, 3).tolist() == [True, False, False]


def test_a_torch_generator_takes_all_bits_of_its_state() -> None:
    def drawn(key: bytes) -> torch.Tensor:
        generator = torch.Generator()
        Keystream(key).fill_generator(generator)
        return torch.empty(1000, dtype=torch.int64).random_(0, 2**31, generator=generator)

    assert torch.equal(drawn(derive_key(0)), drawn(derive_key(0)))
    assert not torch.equal(drawn(derive_key(0)), drawn(derive_key(1)))
    # numpy's Mersenne twister from the same 624 words: torch takes every second of its numbers.
    twister = np.random.MT19937()
    words = Keystream(derive_key(0)).words(624).astype(np.uint32)
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = twister.random_raw(2000)[1::2] & (2**31 - 1)
    assert np.array_equal(drawn(derive_key(0)).numpy(), expected)
