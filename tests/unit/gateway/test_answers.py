"""Chunks have the same bytes however they were made."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.gateway.answers import AnswerFormat, ChatFormat, CompletionFormat, Head
from fastserve.gateway.generation import Choice, Delta, TextOptions
from fastserve.gateway.tokenizer import Tokenizer

# Names that hold what the frame of a chunk is looked for by.
NAMES = st.one_of(st.text(), st.sampled_from(["\0", '"\\u0000"', "a\0b"]))
TEXTS = st.one_of(st.text(), st.sampled_from(["\0", '"', "\\", "\u2028", "é\0"]))


def formats(name: str, tier: str | None, tokenizer: Tokenizer) -> list[AnswerFormat]:
    head = Head(name, 1_700_000_000, name, tier)
    pieces = tokenizer.pieces
    return [
        ChatFormat(head, pieces, logprobs=None),
        CompletionFormat(head, pieces, logprobs=None, echoes=None),
        CompletionFormat(head, pieces, logprobs=None, echoes=["Once ", "upon "]),
    ]


@given(
    name=NAMES,
    tier=st.none() | NAMES,
    deltas=st.lists(st.tuples(st.integers(0, 1), TEXTS), min_size=1, max_size=6),
    with_usage=st.booleans(),
)
def test_a_framed_chunk_is_the_whole_body_written_out(
    name: str,
    tier: str | None,
    deltas: list[tuple[int, str]],
    with_usage: bool,
    default_tokenizer: Tokenizer,
) -> None:
    for answer in formats(name, tier, default_tokenizer):
        begun: set[int] = set()
        for choice, text in deltas:
            chunk = answer.chunk(Delta(choice, text, [], None), with_usage=with_usage)
            if not text:
                assert chunk is None
                continue
            assert chunk is not None
            found = orjson.loads(chunk)
            shown = found["choices"][0]
            said = shown["delta"]["content"] if "delta" in shown else shown["text"]
            echo = ""
            if choice not in begun and isinstance(answer, CompletionFormat):
                echo = (answer._echoes or ["", ""])[choice]
            assert said == echo + text and shown["index"] == choice
            assert ("usage" in found) is with_usage
            assert (found["id"], found["model"], found.get("service_tier")) == (name, name, tier)
            # Byte for byte what it would be without a frame.
            assert orjson.dumps(found) == chunk
            begun.add(choice)


@given(
    ids=st.lists(st.integers(0, 49_151), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=5),
    continuation=st.booleans(),
)
def test_tokens_together_give_the_text_they_give_one_by_one(
    ids: list[int], cuts: list[int], continuation: bool, default_tokenizer: Tokenizer
) -> None:
    one_by_one = default_tokenizer.detokenizer(continuation=continuation)
    text = "".join(map(one_by_one.feed, ids)) + one_by_one.flush()
    together = default_tokenizer.detokenizer(continuation=continuation)
    places = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    parts = [ids[a:b] for a, b in pairwise(places)]
    assert "".join(map(together.feed_all, parts)) + together.flush() == text


@pytest.mark.parametrize("options", [TextOptions(), TextOptions(stop=["\0never"])])
@pytest.mark.parametrize("seen", [0, 3])
def test_a_choice_without_stop_strings_says_what_one_with_them_says(
    options: TextOptions, seen: int, default_tokenizer: Tokenizer
) -> None:
    ids = default_tokenizer.encode("Once upon a time, 👩‍👩‍👧‍👦 日本", add_special_tokens=False)
    choice = Choice(0, default_tokenizer, options, seen)
    text = ""
    for at in range(0, len(ids), 2):
        ends = at + 2 >= len(ids)
        tokens = [(token_id, None) for token_id in ids[at : at + 2]]
        delta = choice.feed(tokens, 2 if ends else 0)  # FINISH_REASON_LENGTH
        text += delta.text
        assert delta.scored == []
    assert choice.tokens == len(ids) and choice.finish_reason == "length"
    begun = default_tokenizer.detokenizer()
    assert text == default_tokenizer.decode(ids)[len("".join(map(begun.feed, ids[:seen]))) :]
