"""Frames: what goes in comes out, however the network cuts it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.errors import ProtocolError
from fedward.flower.framing import Frames, frame, object_frame, read_object

CONTENTS = st.lists(st.binary(max_size=40), max_size=6)


def cut(body: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({min(place, len(body)) for place in places} | {len(body)})
    return [body[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(CONTENTS, st.lists(st.integers(0, 400), max_size=30))
def test_frames_come_out_as_they_went_in(contents: list[bytes], places: list[int]) -> None:
    body = b"".join(piece for content in contents for piece in frame(content[:3], content[3:]))
    frames = Frames()
    assert [one for piece in cut(body, places) for one in frames.feed(piece)] == contents
    assert frames.whole


@given(CONTENTS.filter(bool), st.data())
def test_what_breaks_off_is_not_whole(contents: list[bytes], data: st.DataObject) -> None:
    ends = [0]
    for content in contents:
        ends.append(ends[-1] + 8 + len(content))
    body = b"".join(piece for content in contents for piece in frame(content))
    length = data.draw(st.integers(0, len(body)))
    frames = Frames()
    found = list(frames.feed(body[:length]))
    assert frames.whole == (length in ends)
    assert found == contents[: sum(end <= length for end in ends[1:])]


def test_a_frame_that_says_it_is_huge_is_refused_before_it_is_held() -> None:
    with pytest.raises(ProtocolError, match="bounded size"):
        list(Frames().feed((1 << 40).to_bytes(8, "big")))


def test_an_objects_frame_carries_its_id() -> None:
    identifier = hashlib.sha256(b"content").hexdigest()
    (content,) = Frames().feed(b"".join(object_frame(identifier, b"content")))
    assert read_object(content) == (identifier, b"content")
