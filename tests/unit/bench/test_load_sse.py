"""Events out of bytes, however these are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fastserve.bench.load.sse import SseParser

STREAM = (
    b': a comment\r\nid: 4\r\ndata: {"a": 1}\r\n\r\n'
    b"data:no space\n\nevent: x\n\n\ndata: two\ndata: lines\n\r\n: ping\n\ndata: [DONE]\r\r"
)
EVENTS = [b'{"a": 1}', b"no space", b"two\nlines", b"[DONE]"]


def test_the_data_of_events_whatever_ends_their_lines() -> None:
    assert SseParser().feed(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_the_events_do_not_depend_on_how_the_stream_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    parser = SseParser()
    found = []
    for begin, end in pairwise(places):
        found += parser.feed(STREAM[begin:end])
    assert found == EVENTS


def test_an_event_is_not_told_before_its_empty_line() -> None:
    parser = SseParser()
    assert parser.feed(b"data: half") == []
    assert parser.feed(b" of it\n") == []
    assert parser.feed(b"\n") == [b"half of it"]
