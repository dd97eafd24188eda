"""Stop strings against a naive search over the whole text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway.stop_strings import StopStrings

# Few letters, so that stops occur, overlap and begin again within themselves.
LETTERS = st.text(alphabet="ab🎈", max_size=30)
STOPS = st.lists(st.text(alphabet="ab🎈", min_size=1, max_size=5), max_size=4)
CUTS = st.lists(st.integers(0, 30), max_size=8)


def cut_at_first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """What is before the stop that is complete first (the longest that ends there)."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def in_pieces(text: str, cuts: Sequence[int]) -> list[str]:
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


@given(text=LETTERS, stops=STOPS, cuts=CUTS)
def test_text_is_cut_at_the_first_stop_however_it_comes(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    finder = StopStrings(stops)
    shown = ""
    for piece in in_pieces(text, cuts):
        shown += finder.feed(piece)
    expected, found = cut_at_first_stop(text, stops)
    assert finder.found == found
    assert shown + finder.flush() == expected
    assert finder.flush() == ""


@given(text=LETTERS, stops=STOPS)
def test_only_what_may_become_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    finder = StopStrings(stops)
    shown = ""
    for end, character in enumerate(text, 1):
        shown += finder.feed(character)
        if finder.found:
            break
        held = text[len(shown) : end]
        assert shown + held == text[:end]
        assert not held or any(stop.startswith(held) for stop in stops)
        # ... and no longer end of the text could, so everything that must be held is.
        longer = (text[start:end] for start in range(len(shown)))
        assert not any(stop.startswith(tail) for tail in longer for stop in stops)


@given(text=LETTERS, stops=STOPS, after=LETTERS)
def test_nothing_comes_after_a_stop(text: str, stops: list[str], after: str) -> None:
    finder = StopStrings(stops)
    finder.feed(text)
    if finder.found:
        assert finder.feed(after) == finder.flush() == ""
        assert finder.found


def test_without_stops_text_passes_at_once() -> None:
    finder = StopStrings([])
    assert finder.feed("anything") == "anything"
    assert finder.flush() == ""
    assert not finder.found


def test_a_stop_in_three_pieces() -> None:
    finder = StopStrings(["\n\nUser:"])
    assert [finder.feed(piece) for piece in ("Hi\n", "\nUs", "er: more")] == ["Hi", "", ""]
    assert finder.found


def test_a_false_start_is_shown_in_the_end() -> None:
    finder = StopStrings(["abc"])
    assert [finder.feed(piece) for piece in ("xab", "ab", "d")] == ["x", "ab", "abd"]
    assert finder.feed("ab") == ""
    assert finder.flush() == "ab"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["abcd", "bc"], "a"),  # "bc" is complete first
        (["abc", "bc"], ""),  # both at once: the longer one
        (["bc", "abc"], ""),
        (["bc", "bc"], "a"),
    ],
)
def test_which_of_several_stops_wins(stops: list[str], expected: str) -> None:
    finder = StopStrings(stops)
    assert finder.feed("abcd") == expected
    assert finder.found


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_the_cost_does_not_grow_with_the_text() -> None:
    """A long text of false starts of a long stop: quadratic work would take minutes."""
    finder = StopStrings(["a" * 50_000 + "b"])
    shown = sum(len(finder.feed("a")) for _ in range(200_000))
    assert shown == 150_000
