"""Many arrays as one, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedward.errors import ProtocolError
from fedward.tensors import pack, unpack

ARRAYS = st.dictionaries(
    st.text(
        st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12
    ).filter(lambda name: name != "__metadata__"),
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    max_size=5,
)


@given(ARRAYS)
def test_what_was_packed_comes_out_in_its_order(arrays: dict[str, Any]) -> None:
    back = unpack(pack(arrays))
    assert list(back) == list(arrays)
    for name, value in arrays.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert back[name].tobytes() == value.tobytes()


@given(st.binary(max_size=200))
def test_bytes_that_are_something_else_are_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(np.frombuffer(content, np.uint8))


@given(st.data())
def test_damage_never_breaks_it(data: st.DataObject) -> None:
    content = bytearray(pack({"w": np.arange(6.0), "b": np.zeros(2, np.float32)}).tobytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:cut])):
        try:
            unpack(np.frombuffer(damaged, np.uint8))
        except ProtocolError:
            continue


def test_other_kinds_of_array_are_refused() -> None:
    for wrong in (np.zeros(3, np.float32), np.zeros((2, 2), np.uint8)):
        with pytest.raises(ProtocolError):
            unpack(wrong)
